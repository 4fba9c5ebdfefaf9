"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A gate must give one answer to one state of the code; everybody else explores new examples.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def packs() -> Path:
    """The folder of real benchmark packs, beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the benchmark packs are not at {folder}")
    return folder
