"""One Prefect server for all tests of whole releases, and homes in which to run them."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from homes import Home, Server, stop_keeper

from flows.environment import prepare
from flows.local_server import local_server
from modelmint.settings import Settings

SCRATCH = Path(tempfile.mkdtemp(prefix="modelmint-flows-"))
"""Home of the server, which is to answer until Prefect has flushed its logs at the very end of this process."""

atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
atexit.register(stop_keeper, SCRATCH)
(SCRATCH / ".modelmint").mkdir()
# Prefect and MLflow read their environment while they are imported.
prepare(Settings(home=SCRATCH, prefect_api_url=None))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The one server."""
    with local_server(SCRATCH) as api:
        yield Server(api)


@pytest.fixture(scope="module")
def home(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home for all tests of a file."""
    return Home(tmp_path_factory.mktemp("home"), server)


@pytest.fixture
def own_home(server: Server, tmp_path: Path) -> Iterator[Home]:
    """A home for one test, which leaves no command running."""
    home = Home(tmp_path, server)
    yield home
    home.end()
