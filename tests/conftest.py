"""What the tests of every area share."""

from pathlib import Path

import hypothesis
import pytest

from modelmint.settings import Settings
from modelmint.step import Context
from modelmint.store import Store

# Machines that run several suites at once are slow for a moment; that is no defect of the code under test.
# The same examples every time: a run of the same commit gives the same verdict.
hypothesis.settings.register_profile("shared machine", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def context(store: Store, tmp_path: Path) -> Context:
    """What a stage is given, with a store and a machine lock that no other test sees."""
    return Context(store, Settings(home=tmp_path, host_lock=tmp_path / "host"))
