"""Fixtures for the tests of the generator."""

import pytest

from tests.helpers.synthetic_data import generate_findings


@pytest.fixture(scope="session")
def findings() -> list[dict]:
    return generate_findings(12000, seed=3)
