"""Scratch space of a store: every file and folder in it is locked by the process that works there, until that ends.

The lock tells the living from the dead: what is not locked was left by a process that was killed, and is swept away.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelmint import locks
from modelmint.errors import ResourceError
from modelmint.files import full_disk_named

_OWNER = ".owner"
_log = logging.getLogger(__name__)


class Scratch:
    """A folder of work in progress.

    Args:
        root: the folder; whoever owns it makes it before it is used.
        lock: file whose lock is held shared while something is made in the folder, and alone while it is swept.
    """

    def __init__(self, root: Path, lock: Path) -> None:
        self.root = root
        self._lock = lock
        self._swept = False

    @contextmanager
    def folder(self, label: str) -> Iterator[Path]:
        """A fresh folder, removed afterwards whatever happens; the first one made sweeps the others that were left."""
        if not self._swept:
            self._swept = True
            self.sweep()
        path = self.root / self._unique(label)
        with self._owned(_owner_file(path)):
            try:
                with full_disk_named(self.root):
                    path.mkdir()
                yield path
            finally:
                _clear(path)

    @contextmanager
    def file(self) -> Iterator[tuple[Path, int]]:
        """A new, empty file and its descriptor; removed afterwards if it was not moved to its final name."""
        path = self.root / self._unique("file")
        with self._owned(path) as descriptor:
            yield path, descriptor

    def abandoned(self) -> list[Path]:
        """What dead processes left."""
        try:
            present = sorted(self.root.iterdir())
        except FileNotFoundError:
            return []
        return [path for path in present if locks.is_free(_owner_file(path) if path.is_dir() else path)]

    def sweep(self) -> None:
        """Remove what dead processes left, unless somebody is making something this very moment: then another time."""
        try:
            with locks.held(self._lock, "sweeping", wait_seconds=0, signed=False):
                for path in self.abandoned():
                    _clear(path)
        except ResourceError:
            _log.debug("%s is in use this moment; it will be swept another time", self.root)

    @contextmanager
    def _owned(self, path: Path) -> Iterator[int]:
        """Make and lock a file; it is removed, if it is still there, before the lock is given up."""
        # Nobody sweeps between the making of the file and its lock.
        with locks.held(self._lock, "work", shared=True, signed=False), full_disk_named(self.root):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield descriptor
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    @staticmethod
    def _unique(label: str) -> str:
        return f"{label}-{os.getpid()}-{os.urandom(6).hex()}"


def _clear(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        # A process that is just dying may still write there, and no result is worse for it.
        _log.warning("%s could not be removed now and is left for the next sweep: %s", path, error)


def _owner_file(folder: Path) -> Path:
    return folder.with_name(folder.name + _OWNER)
