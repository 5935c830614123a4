"""A Prefect server of our own on loopback, for commands on a machine where none is configured.

Without a server Prefect loses most task runs at exit, so a command needs a real one. There is one for each home folder,
shared by all commands that run at the same time::

    <home>/.modelmint/prefect/     PREFECT_HOME of the server: its database is the history that `modelmint ui` shows
    <home>/.modelmint/election     locked by whoever looks for the server or starts it
    <home>/.modelmint/users        share-locked by every command that uses it; free again even after kill -9
    <home>/.modelmint/server.json  address and process id, written when the server answers

A keeper process starts the server, watches `users`, and stops the server when nobody has used it for a while: long
enough for the last events to be stored, and for the next command to find it warm. The server ends with its keeper.
"""

import argparse
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from modelmint.errors import ResourceError, ToolError
from modelmint.settings import server_environment

START_SECONDS = 120.0
GRACE_SECONDS = 60.0
POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1

_keepers: "list[subprocess.Popen[bytes]]" = []
"""Those that this process has started; they outlive it, of which Python would warn if they were forgotten."""


@contextmanager
def local_server(home: Path, grace: float = GRACE_SECONDS) -> Iterator[str]:
    """Use the home's server, starting it if none answers; yields the address of its API.

    Args:
        home: folder of everything that is kept here.
        grace: how many seconds an unused server waits for the next command; for a keeper that is started now.

    Raises:
        ToolError: if the server does not come up; the message ends with what it printed.
        ResourceError: if the folder cannot be written.
    """
    folder = home / ".modelmint"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        users = (folder / "users").open("a")
    except OSError as error:
        raise ResourceError(f"{folder}: cannot keep the local server's files here: {error}") from error
    with users:
        with (folder / "election").open("a") as election:
            fcntl.flock(election, fcntl.LOCK_EX)
            # Taken while the election is held, so that a keeper about to stop either sees it or is gone before.
            fcntl.flock(users, fcntl.LOCK_SH)
            address = _answering(folder) or _start(folder, grace)
        yield address


def _answering(folder: Path) -> str | None:
    """The address of a server that is up and whose keeper lives."""
    try:
        known = json.loads((folder / "server.json").read_text())
        os.kill(int(known["keeper"]), 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError, ValueError, KeyError, TypeError):
        # No file, no such process, one of somebody else's under the same id, or a file that is none of ours.
        return None
    address = str(known["api"])
    return address if _healthy(address) else None


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _start(folder: Path, grace: float) -> str:
    """Start a keeper and wait until its server answers."""
    (folder / "server.json").unlink(missing_ok=True)
    log = folder / "server.log"
    with log.open("w") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.local_server", str(folder), "--grace", str(grace)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _keepers.append(keeper)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if keeper.poll() is not None:
            break
        if address := _answering(folder):
            return address
        time.sleep(0.05)
    keeper.terminate()
    tail = log.read_text(errors="replace")[-2000:]
    raise ToolError(f"the local Prefect server did not come up; {log} ends with:\n{tail}", stderr_tail=tail)


def keep(folder: Path, grace: float, port: int = 0) -> None:
    """Start the server, say where it is, and stop it when nobody has used it for `grace` seconds."""
    port = port or free_port()
    api = f"http://127.0.0.1:{port}/api"
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=server_environment(folder / "prefect", port),
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(_end_with, os.getpid()),
    )

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        while not _healthy(api):
            if server.poll() is not None:
                raise SystemExit(f"prefect server start ended with {server.returncode}")
            time.sleep(0.1)
        _write(folder / "server.json", json.dumps({"api": api, "keeper": os.getpid(), "server": server.pid}))
        _wait_until_unused(folder, grace, server)
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _end_with(keeper: int) -> None:
    """Have this process told to end when the keeper does, which may be killed without a word.

    Called between fork and exec; the keeper has one thread.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != keeper:
        os._exit(1)


def _wait_until_unused(folder: Path, grace: float, server: "subprocess.Popen[bytes]") -> None:
    """Return, with the election held and the address withdrawn, when nobody has used the server for `grace` seconds."""
    unused_since = time.monotonic()
    while server.poll() is None:
        time.sleep(min(POLL_SECONDS, grace))
        with (folder / "election").open("a") as election, (folder / "users").open("a") as users:
            if not _try_lock(election):
                continue
            if not _try_lock(users):
                unused_since = time.monotonic()
            elif time.monotonic() - unused_since >= grace:
                (folder / "server.json").unlink(missing_ok=True)
                return


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """The keeper's command line."""
    parser = argparse.ArgumentParser(description="Keep a local Prefect server while commands use it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    keep(arguments.folder, arguments.grace, arguments.port)


if __name__ == "__main__":
    main()
