"""Which process a run belongs to, whether it is still there, and how one that is told to end does so in order."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil


def this_process() -> str:
    """Host, process id and start time: together they name one process, also after its id was given to another."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def is_dead(process: str) -> bool:
    """Whether a process of this host is gone; one of another host may live, for all that can be seen from here.

    Args:
        process: what `this_process` said there; empty where nothing is known, which is not dead either.
    """
    host, _, rest = process.partition(" ")
    pid, _, started = rest.partition(" ")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        found = psutil.Process(int(pid))
        return found.status() == psutil.STATUS_ZOMBIE or f"{found.create_time():.2f}" != started
    except psutil.NoSuchProcess:
        return True


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, where this thread may set handlers and nobody else has set one."""
    free = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if free:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
