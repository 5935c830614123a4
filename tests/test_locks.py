"""Locks: who is kept out, who is let in, and that nobody starves or is left behind."""

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import child, ended, wait_for

from modelmint import locks
from modelmint.errors import ResourceError
from modelmint.locks import held, is_free, machine, remove_if_free

pytestmark = pytest.mark.pure


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_a_lock_keeps_other_threads_of_the_same_process_out(path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            with held(path, "a test"):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.0005)
                with guard:
                    inside -= 1

    for thread in [in_thread(enter) for _ in range(4)]:
        thread.join()
    assert most == 1


def test_a_lock_keeps_other_processes_out_and_is_free_after_kill_9(path: Path, tmp_path: Path) -> None:
    def hold() -> None:
        with held(path, "a long step"):
            (tmp_path / "ready").touch()
            time.sleep(60)

    pid = child(hold)
    wait_for((tmp_path / "ready").exists, "the lock is held")
    assert not is_free(path)
    with (
        pytest.raises(
            ResourceError, match=rf"not free within 0.05 s for me.*last taken by process {pid} \(a long step\)"
        ),
        held(path, "me", wait_seconds=0.05),
    ):
        pass
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    with held(path, "me", wait_seconds=0):
        assert not is_free(path)
    assert is_free(path)


def test_who_waits_says_for_whom_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="modelmint.locks")
    with held(path, "quantize Q8_0"):
        thread = in_thread(lambda: _take(path, "quantize Q4_0"))
        wait_for(lambda: bool(caplog.messages), "somebody waits")
        time.sleep(0.3)
    thread.join()
    assert caplog.messages == [f"quantize Q4_0 waits for lock, last taken by process {os.getpid()} (quantize Q8_0)"]


def _take(path: Path, purpose: str) -> None:
    with held(path, purpose):
        pass


def test_shared_holders_let_each_other_in_and_keep_an_exclusive_one_out(path: Path) -> None:
    with (
        held(path, "one", shared=True),
        held(path, "two", shared=True, wait_seconds=0),
        pytest.raises(ResourceError, match="wait for it to finish and try again"),
        held(path, "all", wait_seconds=0),
    ):
        pass
    with held(path, "all", wait_seconds=0):
        pass


def test_a_descriptor_that_a_child_inherited_keeps_the_lock(path: Path) -> None:
    with held(path, "a step") as descriptor:
        inherited = os.dup(descriptor)
    assert not is_free(path)
    os.close(inherited)
    assert is_free(path)


def test_a_lock_file_is_removed_only_while_nobody_holds_it(path: Path) -> None:
    assert not remove_if_free(path)
    with held(path, "a step"):
        assert not remove_if_free(path)
        assert path.exists()
    assert remove_if_free(path)
    assert not path.exists()


def test_who_waited_for_a_lock_file_that_was_removed_locks_its_successor(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race of unlink: opened, removed by somebody else, and only then locked."""
    real, opened = fcntl.flock, []

    def flock(descriptor: int, mode: int) -> None:
        if not opened:
            opened.append(descriptor)
            path.unlink()
        real(descriptor, mode)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with held(path, "a step"):
        assert opened
        assert path.exists()
        with pytest.raises(ResourceError, match="not free within 0 s"), held(path, "another", wait_seconds=0):
            pass


def test_an_exception_while_waiting_or_inside_frees_everything(path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(RuntimeError, match="inside"), held(path, "a step"):
        raise RuntimeError("inside")
    with held(path, "a step"), pytest.raises(ResourceError, match="not free"), held(path, "me", wait_seconds=0):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert is_free(path)


def test_keyboard_interrupt_is_heard_while_waiting(path: Path) -> None:
    def wait() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _take(path, "me")

    with held(path, "a long step"):
        pid = child(wait)
        time.sleep(0.2)
        os.kill(pid, signal.SIGINT)
        # The traceback of KeyboardInterrupt, and not a signal that nobody handled.
        assert ended(pid, 2) == 1


def test_a_lock_can_be_had_on_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage collection needs one to make space."""
    path.touch()

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with held(path, "garbage collection"):
        assert not is_free(path)


def test_heavy_steps_share_the_machine_and_a_benchmark_has_it_alone(tmp_path: Path) -> None:
    events: list[str] = []
    both = threading.Barrier(2, timeout=10)

    def shared() -> None:
        with machine(tmp_path, "shared", "convert"):
            both.wait()
            time.sleep(0.05)
            events.append("convert ends")

    def alone() -> None:
        with machine(tmp_path, "alone", "benchmark"):
            events.append("benchmark begins")
            time.sleep(0.05)
            events.append("benchmark ends")

    heavy = [in_thread(shared) for _ in range(2)]
    wait_for(lambda: both.n_waiting == 0 and not is_free(tmp_path / "machine"), "both convert")
    benchmarks = [in_thread(alone) for _ in range(2)]
    for thread in (*heavy, *benchmarks):
        thread.join()
    assert events[:2] == ["convert ends"] * 2
    assert events[2:] == ["benchmark begins", "benchmark ends"] * 2


def test_a_benchmark_does_not_starve_under_a_stream_of_other_steps(tmp_path: Path) -> None:
    """Without the turnstile there is always one of four overlapping holders inside."""
    stop = threading.Event()
    entered = [0] * 4
    until = time.monotonic() + 10

    def stream(number: int) -> None:
        time.sleep(number * 0.02)
        while not stop.is_set() and time.monotonic() < until:
            with machine(tmp_path, "shared", "convert"):
                entered[number] += 1
                time.sleep(0.08)

    threads = [in_thread(lambda number=number: stream(number)) for number in range(4)]
    try:
        wait_for(lambda: min(entered) > 1, "the stream flows")
        started = time.monotonic()
        with machine(tmp_path, "alone", "benchmark"):
            waited = time.monotonic() - started
            during = list(entered)
            time.sleep(0.2)
            assert entered == during
        assert waited < 5
        wait_for(lambda: all(now > before for now, before in zip(entered, during, strict=True)), "it flows again")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_machine_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ResourceError, match="is not yours; set MODELMINT_HOST_LOCK"):
        _enter(tmp_path / "link")
    assert (tmp_path / "new").exists() is False
    _enter(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def _enter(folder: Path) -> None:
    with machine(folder, "shared", "convert"):
        pass
