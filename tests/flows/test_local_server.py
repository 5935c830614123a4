"""The server that commands start for themselves: one for each home, and gone when nobody needs it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from homes import Server, stop_keeper

from flows import local_server
from flows.local_server import free_port

pytestmark = pytest.mark.flows

GRACE = 3.0
USER = """
import sys
from pathlib import Path
from flows.local_server import local_server
with local_server(Path(sys.argv[1]), grace=float(sys.argv[2])) as api:
    print(api, flush=True)
    sys.stdin.read()
"""


@dataclass
class User:
    """A process that uses the server of a home until it is told to leave."""

    process: "subprocess.Popen[str]"

    def api(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@dataclass
class Place:
    """A home with users of its server."""

    home: Path
    stack: ExitStack

    def user(self) -> User:
        command = [sys.executable, "-c", USER, str(self.home), str(GRACE)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.stack.enter_context(process)
        self.stack.callback(process.kill)
        return User(process)

    def known(self) -> dict[str, Any]:
        return dict(json.loads((self.home / ".modelmint" / "server.json").read_text()))

    def keepers(self) -> list[psutil.Process]:
        folder = str(self.home / ".modelmint")
        return [it for it in psutil.process_iter(["cmdline"]) if folder in (it.info["cmdline"] or ())]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("place")
    with ExitStack() as stack:
        stack.callback(stop_keeper, home)
        yield Place(home, stack)


@pytest.fixture(scope="module")
def shared(place: Place) -> tuple[User, User, str]:
    """Two commands that come at the same time, where an earlier server has left its address."""
    folder = place.home / ".modelmint"
    folder.mkdir()
    stale = {"api": f"http://127.0.0.1:{free_port()}/api", "keeper": os.getpid(), "server": os.getpid()}
    (folder / "server.json").write_text(json.dumps(stale))
    one, other = place.user(), place.user()
    api = one.api()
    assert other.api() == api != stale["api"]
    return one, other, api


def test_two_commands_at_once_share_one_server(place: Place, shared: tuple[User, User, str]) -> None:
    _, _, api = shared
    assert place.known()["api"] == api
    assert [it.pid for it in place.keepers()] == [place.known()["keeper"]]
    assert Server(api).post("flow_runs/filter", {}) == []


def test_the_server_listens_on_loopback_only(place: Place, shared: tuple[User, User, str]) -> None:
    _, _, api = shared
    server = psutil.Process(place.known()["server"])
    listening = [
        connection.laddr
        for process in (server, *server.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert [f"http://{address.ip}:{address.port}/api" for address in listening] == [api]
    assert listening[0].ip == "127.0.0.1"


@pytest.fixture(scope="module")
def second(place: Place, shared: tuple[User, User, str]) -> User:
    """The user of the server that is started after the first one's keeper was killed without warning."""
    one, other, api = shared
    Server(api).post("flows/", {"name": "remembered"})
    before = place.known()
    psutil.Process(before["keeper"]).kill()
    assert waited(lambda: is_gone(before["server"])), "the server outlives its keeper"
    third = place.user()
    assert third.api() != api
    assert place.known()["keeper"] != before["keeper"]
    one.leave()
    other.leave()
    return third


def test_a_killed_keeper_takes_its_server_along_and_the_next_command_starts_another_with_the_same_history(
    place: Place, second: User
) -> None:
    flows = Server(place.known()["api"]).post("flows/filter", {})
    assert [flow["name"] for flow in flows] == ["remembered"]


def test_a_server_stays_while_it_is_used_and_ends_by_itself_afterwards(place: Place, second: User) -> None:
    known = place.known()
    time.sleep(GRACE + 2)
    assert Server(known["api"]).post("flow_runs/filter", {}) == []
    second.leave()
    assert Server(known["api"]).post("flow_runs/filter", {}) == [], "the last events have time to arrive"
    assert waited(lambda: not place.keepers())
    assert is_gone(known["server"])
    assert not (place.home / ".modelmint" / "server.json").exists()


@pytest.mark.parametrize(
    "left",
    [
        "",
        "[]",
        "{}",
        '{"api": "http://127.0.0.1:9/api"}',
        '{"api": "http://127.0.0.1:9/api", "keeper": "none"}',
        '{"api": "http://127.0.0.1:9/api", "keeper": 4194304}',
        '{"api": "http://127.0.0.1:9/api", "keeper": %d}',
    ],
    ids=["empty", "no mapping", "nothing said", "no keeper", "no number", "no such process", "nobody answers"],
)
def test_an_address_that_was_left_behind_is_not_believed(tmp_path: Path, left: str) -> None:
    (tmp_path / "server.json").write_text(left.replace("%d", str(os.getpid())))
    assert local_server._answering(tmp_path) is None


def test_the_process_of_somebody_else_is_no_keeper_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(process: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "server.json").write_text('{"api": "http://127.0.0.1:9/api", "keeper": 1}')
    monkeypatch.setattr(os, "kill", refused)
    assert local_server._answering(tmp_path) is None


def waited(until: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something became true in time."""
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def is_gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
