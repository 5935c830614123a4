"""Which process a run belongs to, and whether it is still there."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tasks.processes import is_dead, this_process, unwound_by_sigterm

pytestmark = pytest.mark.pure


def test_a_process_that_lives_is_not_dead() -> None:
    assert not is_dead(this_process())


def test_a_process_is_dead_once_it_ended_even_before_anybody_waited_for_it() -> None:
    host = this_process().partition(" ")[0]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        name = f"{host} {process.pid} {psutil.Process(process.pid).create_time():.2f}"
        assert not is_dead(name)
        process.kill()
        end = time.monotonic() + 10
        while not is_dead(name) and time.monotonic() < end:
            time.sleep(0.01)
        assert is_dead(name)
        assert process.returncode is None, "nobody waited for it"
    assert is_dead(name)


def test_an_id_that_was_given_to_another_process_does_not_revive_the_first() -> None:
    host, pid, started = this_process().split()
    assert is_dead(f"{host} {pid} {float(started) - 60:.2f}")


@pytest.mark.parametrize("name", ["", "elsewhere 1 1.00", "nonsense"])
def test_what_cannot_be_seen_from_here_is_not_called_dead(name: str) -> None:
    assert not is_dead(name)


def test_sigterm_unwinds_the_stack_and_the_default_comes_back() -> None:
    def told_to_end() -> None:
        with unwound_by_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(SystemExit, match="143"):
        told_to_end()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_of_somebody_else_is_left_alone() -> None:
    def theirs(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with unwound_by_sigterm():
            assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_sets_no_handler() -> None:
    seen: list[object] = []

    def within() -> None:
        with unwound_by_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
