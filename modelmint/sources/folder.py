"""A checkpoint in a folder of this machine: ``file:path``."""

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from modelmint.artifact import CHUNK_BYTES, Artifact, FileEntry
from modelmint.errors import SourceError, UnsafeSourceError
from modelmint.recipe import ModelRef
from modelmint.settings import Settings
from modelmint.sources import PinnedFile, PinnedRef, clean_path
from modelmint.sources.selection import needed


def resolve(ref: ModelRef, settings: Settings) -> PinnedRef:
    """Pin a folder by the digests of the files that are needed.

    Raises:
        SourceError: if the folder is missing, cannot be read or holds no checkpoint.
        UnsafeSourceError: if it holds anything but folders, plain files and links to such files inside it.
    """
    root = root_of(ref)
    return pin(ref, root)


def pin(ref: ModelRef, root: Path) -> PinnedRef:
    """Pin the checkpoint that lies in a folder; see `resolve`."""
    paths = listing(root, ref)
    wanted = needed(paths, ref)
    entries = []
    for path in wanted:
        digest, size = _copy(root, path, None, lambda count: None)
        entries.append(FileEntry(path=path, size=size, digest=digest))
    return PinnedRef(
        ref=ref,
        revision=Artifact.of(entries).digest,
        files=tuple(PinnedFile(path=entry.path, size=entry.size, digest=entry.digest) for entry in entries),
        left_out=tuple(path for path in paths if path not in set(wanted)),
    )


def fetch(
    pinned: PinnedRef, file: PinnedFile, target: Path, settings: Settings, on_bytes: Callable[[int], None]
) -> None:
    """Copy one file."""
    copy_pinned(root_of(pinned.ref), pinned, file, target, on_bytes)


def read_range(pinned: PinnedRef, file: PinnedFile, start: int, length: int, settings: Settings) -> bytes:
    """Read part of a file."""
    with os.fdopen(_open(root_of(pinned.ref), file.path), "rb") as stream:
        stream.seek(start)
        return stream.read(length)


def copy_pinned(root: Path, pinned: PinnedRef, file: PinnedFile, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Copy one file of a pinned folder, from the beginning.

    Raises:
        SourceError: if it has changed since it was pinned.
    """
    digest, _ = _copy(root, file.path, target, on_bytes)
    if digest != file.digest:
        target.unlink()
        raise SourceError(
            f"{pinned.ref}: {file.path} has changed since the run began (now {digest}, then {file.digest}); "
            "run again when nobody writes into the folder"
        )


def root_of(ref: ModelRef) -> Path:
    """The folder that a reference names.

    Raises:
        SourceError: if there is none.
    """
    root = Path(ref.location).expanduser()
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise SourceError(f"{ref}: {root.absolute()} {what}; name the folder of a checkpoint, the one with config.json")
    return root


def listing(root: Path, source: object) -> tuple[str, ...]:
    """Every file below a folder, sorted; names that begin with a dot, such as ``.git``, are not looked at.

    Raises:
        UnsafeSourceError: for a link that leaves the folder, and for sockets, pipes and devices.
        SourceError: if a folder cannot be read.
    """
    real = root.resolve()
    found: list[str] = []
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise SourceError(f"{source}: {root / folder} cannot be read: {error.strerror}") from error
        for entry in entries:
            path = clean_path(f"{folder}{entry.name}", source)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(path + "/")
            else:
                _refuse_special(root, real, path, source)
                found.append(path)
    return tuple(sorted(found))


def _refuse_special(root: Path, real: Path, path: str, source: object) -> None:
    mode = (root / path).lstat().st_mode
    if stat.S_ISREG(mode):
        return
    if not stat.S_ISLNK(mode):
        raise UnsafeSourceError(f"{source}: {path} is neither a file nor a folder; remove it or copy the checkpoint")
    target = (root / path).resolve()
    if not target.is_relative_to(real) or not target.is_file():
        raise UnsafeSourceError(
            f"{source}: {path} is a link to {(root / path).readlink()}, which is not a file of the folder; "
            "copy the checkpoint with its links followed (cp -rL), or name its repository with hf:"
        )


def _open(root: Path, path: str) -> int:
    """Open a file for reading without following a link out of the folder, even one made this very moment."""
    real = root.resolve()
    target = (real / path).resolve()
    if not target.is_relative_to(real):
        raise UnsafeSourceError(f"{root}: {path} leads out of the folder; copy the checkpoint and use the copy")
    # Not blocking: a pipe put in the file's place would wait for a writer for ever.
    descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeSourceError(f"{root}: {path} is no plain file; copy the checkpoint and use the copy")
    return descriptor


def _copy(root: Path, path: str, target: Path | None, on_bytes: Callable[[int], None]) -> tuple[str, int]:
    """Hash a file and write it to `target` if there is one; returns digest and size."""
    state, size = hashlib.sha256(), 0
    try:
        with os.fdopen(_open(root, path), "rb", buffering=0) as source, Path(target or os.devnull).open("wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                state.update(chunk)
                if target is not None:
                    out.write(chunk)
                size += len(chunk)
                on_bytes(len(chunk))
    except (FileNotFoundError, PermissionError) as error:
        raise SourceError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    return "sha256:" + state.hexdigest(), size
