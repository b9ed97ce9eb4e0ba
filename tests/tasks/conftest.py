"""Shared by the tests of multitune.tasks."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def data_dir() -> Path:
    """The folder of public data sets; the test is skipped without it."""
    if not os.environ.get("MULTITUNE_DATA"):
        pytest.skip("needs the public data sets: set MULTITUNE_DATA to their folder")
    return Path(os.environ["MULTITUNE_DATA"])
