"""How the isolation tests make their calls, and what they look for afterwards."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelmint import isolated_child
from modelmint.isolate import Limits, Outcome, call

ROOT = Path(__file__).parents[1]
LIMITS = Limits(wall_seconds=60)


def run(name: str, limits: Limits = LIMITS, options: dict[str, Any] | None = None, **arguments: Any) -> Outcome:
    return call(f"tests.isolated_functions:{name}", arguments, limits=limits, python_path=[ROOT], **(options or {}))


def alive(pid: int) -> bool:
    """Whether a process runs; one that init has not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def appears(path: Path, seconds: float = 20) -> list[int]:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
    pids: list[int] = json.loads(path.read_text())
    return pids


def gone_within(pids: list[int], seconds: float) -> list[int]:
    """The processes that are still there after the time; empty as soon as all have gone."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [pid for pid in pids if alive(pid)]


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that no descriptor and no process, running or zombie, outlives what is done inside."""

    def held() -> tuple[int, set[int]]:
        children = {pid for pid, parent in isolated_child._parents() if parent == os.getpid()}
        return len(list(Path("/proc/self/fd").iterdir())), children

    descriptors, children = held()
    yield
    descriptors_now, children_now = held()
    assert descriptors_now <= descriptors
    assert children_now <= children
