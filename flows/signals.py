"""How a command ends when it is told to: Ctrl-C and SIGTERM stop its stages and close its runs within seconds."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from flows.console import say

GRACE_SECONDS = 8.0
"""How long stages may take to end in order; then the process ends, and with it every child."""


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def stopped_by_signals(stop: Callable[[], None], grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Call `stop` in a thread of its own as soon as SIGINT or SIGTERM comes, and end the process if that does not.

    The main thread gets its `KeyboardInterrupt` or `Terminated` besides. It may be busy unwinding, or wait for a thread
    that works, so the signal is heard through the wake-up descriptor, whatever handler others have set.

    Args:
        stop: makes the working threads end.
        grace: seconds until the process ends by itself.
    """
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(hears, stop, grace), name="signals", daemon=True).start()
    try:
        with raised_by_sigterm():
            yield
    except (KeyboardInterrupt, Terminated):
        say("stopped; steps that are done are kept, and the same command goes on from there", "yellow")
        raise
    finally:
        signal.set_wakeup_fd(before)
        tells.close()


@contextmanager
def raised_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the main thread."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _watch(hears: socket.socket, stop: Callable[[], None], grace: float) -> None:
    with hears:
        number = _next(hears)
        if number is None:
            return
        stop()
        hears.settimeout(grace)
        try:
            # A second Ctrl-C or SIGTERM is not patient; an end of the block is.
            again = _next(hears)
        except TimeoutError:
            again = number
        if again is not None:
            os._exit(128 + again)


def _next(hears: socket.socket) -> int | None:
    """The next of the two signals; None when the block has ended."""
    while data := hears.recv(1):
        if data[0] in (signal.SIGINT, signal.SIGTERM):
            return data[0]
    return None
