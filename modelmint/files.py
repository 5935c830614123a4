"""Writes files so that a crash or a full disk never leaves half of one under a final name.

The calls go through `os` rather than through file objects: each is one system call, so what a crash can leave behind
is known, and the tests can stop the process between any two of them.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelmint.artifact import CHUNK_BYTES, digest_of_file
from modelmint.errors import ResourceError, StageError

READ_ONLY = 0o444
_FICLONE = 0x40049409
_NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EACCES)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_full(folder: Path, why: str) -> ResourceError:
    """The error that says which disk is full, how full, and what to do."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    mount = next(path for path in (existing.resolve(), *existing.resolve().parents) if path.is_mount())
    usage = shutil.disk_usage(existing)
    return ResourceError(
        f"no space for {folder}: the disk mounted at {mount} has {usage.free} of {usage.total} bytes free ({why}); "
        "make space (`modelmint store gc` removes what no release needs) or move the store to a larger disk "
        "(MODELMINT_STORE), and run again: finished steps are reused"
    )


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn "no space left" of anything inside into the error that names the disk of the folder.

    Raises:
        ResourceError: if the disk or the user's quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise disk_full(folder, os.strerror(error.errno)) from error


def is_full(folder: Path) -> bool:
    """Whether a disk has less than 1 MiB left, so that a tool's failure there is most likely that and nothing else."""
    usage = os.statvfs(folder)
    return (usage.f_bfree if os.geteuid() == 0 else usage.f_bavail) * usage.f_frsize < 1 << 20


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable in its own parent, where they are missing."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def write_durably(descriptor: int, content: bytes) -> None:
    """Write the contents of an open, empty file and make them durable."""
    _write_all(descriptor, memoryview(content))
    os.fsync(descriptor)


def link_first(path: Path, final: Path) -> bool:
    """Give a finished file its final name too, unless that is taken; of several at once one wins."""
    try:
        final.hardlink_to(path)
    except FileExistsError:
        return False
    return True


def seal(path: Path) -> None:
    """Make a file read-only and its contents durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(descriptor, READ_ONLY)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_and_hash(source: Path, target: Path) -> str:
    """Copy a file to a new name, by reflink where the file system can, and return the digest of the copy.

    The digest is of what the copy holds, so that it stays true if the source changes a moment later. Never a link: a
    tool could write through it.

    Raises:
        FileNotFoundError: if the source is missing.
        FileExistsError: if the target is there already.
    """
    reader = os.open(source, os.O_RDONLY)
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            return digest_of_file(target) if _reflink(reader, writer) else _copy(reader, writer)
        except BaseException:
            # Half a file under the name that a tool will open is worse than none.
            target.unlink()
            raise
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def plain_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in the order of their names.

    Raises:
        StageError: for anything but plain files and folders, naming it.
    """
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from plain_files(path)
        elif entry.is_file(follow_symlinks=False):
            yield path
        else:
            kind = "a symbolic link" if entry.is_symlink() else "neither a file nor a folder"
            raise StageError(f"{path} is {kind}; an artifact holds plain files only, so write its contents instead")


def _reflink(reader: int, writer: int) -> bool:
    """Share the extents of one open file with another, empty one; False where the file system cannot."""
    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError as error:
        if error.errno not in _NO_REFLINK:
            raise
        return False
    return True


def _copy(reader: int, writer: int) -> str:
    state = hashlib.sha256()
    while chunk := os.read(reader, CHUNK_BYTES):
        state.update(chunk)
        _write_all(writer, memoryview(chunk))
    return "sha256:" + state.hexdigest()


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
