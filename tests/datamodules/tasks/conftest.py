"""Fixtures of the tasks' tests."""

import pytest

from datamodules.tasks import TASKS, build_tasks
from datamodules.tasks.agent_prompts import AGENT_TASKS


@pytest.fixture
def tasks():
    """Every task, with the agent's own prompts."""
    return build_tasks([*TASKS, *AGENT_TASKS])
