"""Fixtures for the tests of the tasks."""

import pytest

from datamodules.tasks import TASKS, build_tasks
from tests.helpers.tasks_data import write_templates


@pytest.fixture(scope="session")
def templates(tmp_path_factory) -> str:
    """Folder with an agent template."""
    return write_templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture
def tasks(templates):
    """Every task, with the one of the agent template."""
    return build_tasks([*TASKS, "agent_summarize"], agent_templates=templates)
