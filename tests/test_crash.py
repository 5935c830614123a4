"""A kill, a full disk or a crowd at any moment: nothing half-written is ever seen, and the next run completes."""

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from crashing import (
    assert_nothing_half_written,
    child,
    die_at,
    ended,
    left_in_tmp,
    put,
    run_chain,
    step,
    wait_for,
)

from modelmint.errors import CorruptError, ResourceError
from modelmint.isolate import Limits, call
from modelmint.step import Context, Work, Workspace, run_step
from modelmint.store import Store
from modelmint.verify import verify

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that the kernel has; only a power cut would, and no test can make one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Memory where there is some: hundreds of stores are made here, and a disk takes milliseconds for each file."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


def digests(context: Context) -> list[str]:
    return [result.record.output for result in run_chain(context)]


def elsewhere(context: Context, folder: Path) -> Context:
    return replace(context, store=Store(folder))


@pytest.mark.usefixtures("no_fsync")
def test_killed_at_any_file_operation_nothing_is_half_written_and_a_rerun_completes(
    context: Context, folder: Path
) -> None:
    wanted = digests(elsewhere(context, folder / "reference"))
    number, reused_after = 0, set()
    while True:
        number += 1
        here = elsewhere(context, folder / f"killed-{number}")

        def dies(here: Context = here, number: int = number) -> None:
            die_at(number)
            run_chain(here)

        code = ended(child(dies))
        assert_nothing_half_written(here.store)
        done = {record.key for record in here.store.records()}
        results = run_chain(elsewhere(here, here.store.root))
        assert [result.record.output for result in results] == wanted
        assert {result.record.key for result in results if result.reused} == done
        assert left_in_tmp(here.store) == [] or len(done) == 3
        reused_after.add(len(done))
        shutil.rmtree(here.store.root)
        if code == 0:
            break
        assert code == -signal.SIGKILL, number
    # The kills did reach the start, the middle and the end of the chain.
    assert reused_after == {0, 1, 2, 3}
    assert number > 100


class FullDisk:
    """A disk on which the n-th thing that needs space, and all after it, finds none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        for name in ("write", "fsync", "mkdir", "link", "rename", "replace"):
            monkeypatch.setattr(os, name, partial(self._needing, getattr(os, name)))
        real_open = os.open

        def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            new = flags & os.O_CREAT and not os.path.lexists(path)
            return (
                self._needing(real_open, path, flags, *rest, **named) if new else real_open(path, flags, *rest, **named)
            )

        monkeypatch.setattr(os, "open", opened)

    def _needing(self, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)


def test_a_disk_that_fills_at_any_moment_is_named_and_leaves_nothing(context: Context, folder: Path) -> None:
    work = partial(put, weights=b"w" * 5000, tokenizer=b"t" * 10)
    number, recorded = 0, list[bool]()
    while True:
        here = elsewhere(context, folder / f"full-{number}")
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = FullDisk(monkeypatch, number)
            try:
                run_step(here, step("acquire"), work, machine="network")
            except ResourceError as error:
                message = str(error)
                assert "disk mounted at /" in message
                assert "bytes free (No space left on device)" in message
                assert "modelmint store gc" in message
            else:
                assert disk.left >= 0
                break
        if here.store.root.exists():
            assert_nothing_half_written(here.store)
        # Where the very last fsync found no space, the record was there already, with all its files.
        recorded.append(here.store.record(step("acquire").key) is not None)
        assert run_step(here, step("acquire"), work, machine="network").reused == recorded[-1]
        assert left_in_tmp(here.store) == []
        number += 1
    assert recorded == [False] * (number - 1) + [True]
    assert number > 20


@pytest.mark.usefixtures("no_fsync")
def test_a_full_disk_while_a_tool_gets_its_input_leaves_no_part_of_a_file(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_step(context, step("acquire"), partial(put, weights=b"w" * 5000))
    FullDisk(monkeypatch, 2)
    with pytest.raises(
        ResourceError, match=r"no space for .*/input: the disk mounted at /.* has \d+ of \d+ bytes free"
    ):
        context.store.materialize(done.record.output, tmp_path / "input")
    assert not (tmp_path / "input" / "weights").exists()


def test_eight_processes_one_step_is_executed_once(context: Context, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def work(place: Workspace) -> Work:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return put(place, model=b"m")

    def one() -> None:
        result = run_step(context, step("convert"), work)
        assert context.store.read(result.record.output, "model") == b"m"

    assert [ended(pid) for pid in [child(one) for _ in range(8)]] == [0] * 8
    assert len(log.read_text().split()) == 1


def holding(context: Context, ready: Path, after: Callable[[], object] = lambda: time.sleep(60)) -> int:
    """A process in the middle of a step."""

    def work(place: Workspace) -> Work:
        (place.out / "half").write_bytes(b"h")
        ready.write_text("ready")
        after()
        return Work()

    pid = child(lambda: run_step(context, step("convert"), work))
    wait_for(ready.exists, "the step has begun")
    return pid


def test_after_kill_9_of_the_holder_the_next_owner_comes_at_once_and_sweeps(context: Context, tmp_path: Path) -> None:
    pid = holding(context, tmp_path / "ready")
    waiting: list[float] = []

    def next_owner() -> None:
        run_step(elsewhere(context, context.store.root), step("convert"), partial(put, model=b"m"))
        waiting.append(time.monotonic())

    thread = threading.Thread(target=next_owner)
    thread.start()
    time.sleep(0.3)
    assert not waiting
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    assert ended(pid) == -signal.SIGKILL
    thread.join(5)
    assert waiting
    assert waiting[0] - killed < 5
    assert left_in_tmp(context.store) == []
    assert_nothing_half_written(context.store)


def test_sigterm_during_work_ends_it_soon_frees_the_lock_and_cleans_up(context: Context, tmp_path: Path) -> None:
    def terminated(number: int, frame: object) -> None:
        sys.exit(143)

    def sleep_until_told() -> None:
        signal.signal(signal.SIGTERM, terminated)
        time.sleep(60)

    pid = holding(context, tmp_path / "ready", sleep_until_told)
    time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid, 10) == 143
    assert left_in_tmp(context.store) == []
    assert not run_step(context, step("convert"), partial(put, model=b"m")).reused


def test_sigterm_while_waiting_for_a_lock_is_heard(context: Context, tmp_path: Path) -> None:
    holder = holding(context, tmp_path / "ready")
    waiter = child(lambda: run_step(context, step("convert"), partial(put, model=b"m")))
    time.sleep(0.2)
    os.kill(waiter, signal.SIGTERM)
    assert ended(waiter, 1) == -signal.SIGTERM
    os.kill(holder, signal.SIGKILL)
    assert ended(holder) == -signal.SIGKILL


def isolated(place: Workspace, pids: Path, seconds: float) -> Work:
    call(
        "tests.isolated_functions:hangs_with_family",
        {"pid_file": str(pids), "escape": False},
        limits=Limits(wall_seconds=seconds),
        keep_fds=(place.lock,),
        python_path=[ROOT],
    )
    return Work()


def test_a_tool_that_hangs_is_ended_at_its_limit_and_the_step_is_free(context: Context, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(ResourceError, match="wall_seconds is 2"):
        run_step(context, step("convert"), lambda place: isolated(place, pids, 2))
    assert [pid for pid in json.loads(pids.read_text()) if Path(f"/proc/{pid}").exists()] == []
    assert left_in_tmp(context.store) == []
    assert not run_step(context, step("convert"), partial(put, model=b"m")).reused


def test_a_tool_never_outlives_its_killed_worker_into_the_next_owners_time(context: Context, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    runner = child(lambda: run_step(context, step("convert"), lambda place: isolated(place, pids, 60)))
    wait_for(pids.exists, "the tool runs")
    os.kill(runner, signal.SIGKILL)
    killed = time.monotonic()
    assert ended(runner) == -signal.SIGKILL
    seen: list[list[int]] = []

    def work(place: Workspace) -> Work:
        seen.append([pid for pid in json.loads(pids.read_text()) if running(pid)])
        return put(place, model=b"m")

    run_step(context, step("convert"), work)
    assert time.monotonic() - killed < 5
    assert seen == [[]]


def running(pid: int) -> bool:
    """Whether a process is there and more than a zombie that init has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_flipped_byte_is_found_by_verify_and_on_use_and_the_step_rebuilt(context: Context, tmp_path: Path) -> None:
    store = context.store
    done = run_chain(context)
    entry = store.artifact(done[0].record.output).files[0]
    blob = store.blob(entry)
    content = bytearray(blob.read_bytes())
    content[3] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)

    assert [damage.path for damage in verify(store).damaged] == [store.inside(blob)]
    assert blob.exists()
    with pytest.raises(CorruptError, match=f"{entry.path} of artifact .* expected {entry.digest}, found sha256:"):
        store.materialize(done[0].record.output, tmp_path / "input")
    assert not blob.exists()
    assert not (tmp_path / "input" / entry.path).exists()

    again = run_chain(context)
    assert [result.reused for result in again] == [False, True, True]
    assert [result.record.output for result in again] == [result.record.output for result in done]
    assert verify(store).damaged == ()
