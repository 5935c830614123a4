"""Locks between threads, processes and stores of one host, free at once when their holder dies.

Each is a `flock` on a file. The kernel gives it up when the last descriptor is closed, however the process ends, and
descriptors opened separately exclude each other within one process too. Waiting is by short sleeps, so that signals and
cancellation are heard in any thread.

::

    <folder>/turnstile    passed by everybody, held by whoever wants to be alone
    <folder>/machine      held shared by heavy steps, exclusively by a benchmark
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from modelmint.errors import ResourceError
from modelmint.files import full_disk_named

LONGEST_PAUSE_SECONDS = 0.2
_FIRST_PAUSE_SECONDS = 0.002
_SAY_AGAIN_SECONDS = 60.0
_INFORMATION_BYTES = 120

_log = logging.getLogger(__name__)


@contextmanager
def held(
    path: Path, purpose: str, *, shared: bool = False, wait_seconds: float | None = None, signed: bool = True
) -> Iterator[int]:
    """Hold the lock of a file; yields its descriptor, which a child process may inherit to hold it too.

    Args:
        path: the lock file; made if it is missing.
        purpose: what the lock is held for, told to those who wait.
        shared: whether other shared holders are welcome.
        wait_seconds: how long to wait for it; None for ever.
        signed: whether the holder is written into the file.

    Raises:
        ResourceError: if it was not free in time.
    """
    descriptor = _acquire(path, purpose, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait_seconds)
    try:
        if signed:
            _sign(descriptor, purpose)
        yield descriptor
    finally:
        # Closed, not unlocked: a child that inherited the descriptor keeps the lock until it ends.
        os.close(descriptor)


@contextmanager
def machine(folder: Path, share: Literal["shared", "alone"], purpose: str) -> Iterator[None]:
    """Hold a share of this host, or all of it.

    Who wants to be alone holds the turnstile while waiting, so that nobody new comes in before: a benchmark does not
    starve under a stream of other steps. Not to be nested: who holds a share and asks to be alone waits for itself.

    Args:
        folder: where the two lock files lie; all stores of a user on this host use the same.
        share: ``shared`` with other heavy steps, or ``alone``.
        purpose: what for, told to those who wait.

    Raises:
        ResourceError: if the folder belongs to somebody else.
    """
    _own(folder)
    turnstile, room = folder / "turnstile", folder / "machine"
    if share == "alone":
        with held(turnstile, purpose), held(room, purpose):
            yield
        return
    with ExitStack() as stack:
        with held(turnstile, purpose, shared=True, signed=False):
            stack.enter_context(held(room, purpose, shared=True))
        yield


def remove_if_free(path: Path) -> bool:
    """Remove a lock file that nobody holds; whether it was removed.

    Safe against somebody who has just opened it: who gets the lock of a file that has lost its name starts again.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        if not _try(descriptor, fcntl.LOCK_EX) or not _is_still(descriptor, path):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock of a file at this moment; also where the file is missing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return _try(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _acquire(path: Path, purpose: str, mode: int, wait_seconds: float | None) -> int:
    started = time.monotonic()
    pause, say_at = _FIRST_PAUSE_SECONDS, 0.0
    while True:
        with full_disk_named(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not _try(descriptor, mode):
                waited = time.monotonic() - started
                if wait_seconds is not None and waited >= wait_seconds:
                    raise ResourceError(
                        f"{path} was not free within {wait_seconds:g} s for {purpose}; it was last taken by "
                        f"{_signature(descriptor)}; wait for it to finish and try again"
                    )
                if waited >= say_at:
                    _log.info("%s waits for %s, last taken by %s", purpose, path.name, _signature(descriptor))
                    say_at = waited + _SAY_AGAIN_SECONDS
                time.sleep(pause)
                pause = min(LONGEST_PAUSE_SECONDS, pause * 1.5)
            if _is_still(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # It was removed while we waited: whoever comes now locks another file of that name.
        os.close(descriptor)


def _try(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is of the file that has the name now."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _sign(descriptor: int, purpose: str) -> None:
    text = f"process {os.getpid()} ({purpose})".encode()[:_INFORMATION_BYTES]
    try:
        os.pwrite(descriptor, text.ljust(_INFORMATION_BYTES) + b"\n", 0)
    except OSError as error:
        # It is for people who wait, and a full disk must not keep garbage collection from its lock.
        _log.info("the lock of %s is held, but its file could not be signed: %s", purpose, error)


def _signature(descriptor: int) -> str:
    text = os.pread(descriptor, _INFORMATION_BYTES, 0).decode(errors="replace").strip()
    return text or "somebody who has not signed it yet"


def _own(folder: Path) -> None:
    """Make the folder for this user only; refuse one that somebody else has put in its place."""
    with full_disk_named(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise ResourceError(
            f"the folder of the machine's lock, {folder}, is not yours; set MODELMINT_HOST_LOCK to another"
        )
