"""Made-up work of three steps, and processes that do it and are killed on the way."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from modelmint.artifact import Step
from modelmint.step import Context, StepResult, Work, Workspace, run_step
from modelmint.store import Store
from modelmint.verify import verify

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "fcntl.flock"}
"""Audit events of calls that change files or locks; opening for writing, write and fsync are seen in other ways."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def step(name: str, **inputs: str) -> Step:
    return Step(stage=name, stage_version=1, parameters={"name": name}, inputs=inputs)


def put(place: Workspace, **files: bytes) -> Work:
    for name, content in files.items():
        (place.out / name).write_bytes(content)
    return Work()


def run_chain(context: Context) -> list[StepResult]:
    """Acquire, convert, quantize: each step reads the one before it."""
    source = run_step(
        context, step("acquire"), partial(put, weights=b"w" * 5000, tokenizer=b"t" * 10), machine="network"
    )
    results = [source]
    for name in ("convert", "quantize"):
        before = results[-1].record.output

        def work(place: Workspace, before: str = before, name: str = name) -> Work:
            folder = context.store.materialize(before, place.folder / "input")
            return put(place, model=min(folder.iterdir()).read_bytes()[::-1] + name.encode())

        results.append(run_step(context, step(name, source=before), work))
    return results


def child(function: Callable[[], object]) -> int:
    """Start a process that runs a function and exits 0, or 1 with a traceback; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:  # noqa: BLE001 - nothing may return into the parent's test
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, seconds: float = 30.0) -> int:
    """How a process ended: its exit code, or the negative signal; killed and failed if it takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} had not ended after {seconds} s")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.002)


def die_at(number: int) -> None:
    """From now on, kill this process at its n-th change of a file; a write counts before it and in its middle."""
    count = 0
    real_write, real_fsync = os.write, os.fsync

    def tick() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            tick()

    def write(descriptor: int, content: memoryview) -> int:
        tick()
        half = real_write(descriptor, content[: len(content) // 2])
        tick()
        return half + real_write(descriptor, content[half:])

    def fsync(descriptor: int) -> None:
        tick()
        real_fsync(descriptor)

    os.write, os.fsync = write, fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def assert_nothing_half_written(store: Store) -> None:
    """What a reader may see after a crash: sound files only, and no record without its output."""
    found = verify(store)
    assert found.damaged == ()
    assert found.incomplete == ()
    assert found.conflicts == ()


def left_in_tmp(store: Store) -> list[Path]:
    return sorted((store.root / "tmp").glob("*"))
