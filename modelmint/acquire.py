"""Brings a checkpoint into the store: `resolve` pins what was asked for, `acquire` fetches exactly that, hashed again.

What was fetched before an interruption is kept under ``downloads/`` of the store, by the key of the step, and
continued by whoever tries next; it enters the store only when every file has the bytes that its source declares.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from modelmint.artifact import CHUNK_BYTES, FileEntry, Step, digest_of_file
from modelmint.errors import ResourceError, SourceError, UnsupportedError
from modelmint.host import free_disk_bytes
from modelmint.isolate import Progress
from modelmint.recipe import ModelRef
from modelmint.settings import Settings
from modelmint.sources import PinnedFile, PinnedRef, source_of
from modelmint.step import Context, StepResult, Work, Workspace, run_step

__all__ = ["Meter", "PinnedFile", "PinnedRef", "acquire", "fetch_checked", "mismatch", "resolve", "step_of"]

STAGE_VERSION = 1
MAX_CHECKPOINT_BYTES = 400 * 10**9
"""Larger checkpoints are refused: a model of 100 B parameters in float32, several times what runs at the edge."""
_PROGRESS_SECONDS = 0.1


def resolve(ref: ModelRef, settings: Settings) -> PinnedRef:
    """Pin a reference: a branch becomes a commit, a folder the digest of its files, a bucket's prefix its listing.

    Raises:
        SourceError: if it is missing, gated or holds no checkpoint; says which and the way out.
        UnsafeSourceError: if it names files that could leave their folder.
        UnsupportedError: if its weights are in no form that is read.
        NetworkError: if the remote end failed for now.
    """
    pinned = source_of(ref).resolve(ref, settings)
    if pinned.size > MAX_CHECKPOINT_BYTES:
        raise UnsupportedError(
            f"{ref} declares {pinned.size / 1e9:.0f} GB, more than the {MAX_CHECKPOINT_BYTES / 1e9:.0f} GB that are "
            "accepted; use a smaller model"
        )
    return pinned


def step_of(pinned: PinnedRef) -> Step:
    """The step that acquires a pinned checkpoint."""
    return Step(stage="acquire", stage_version=STAGE_VERSION, parameters=pinned.parameters())


def acquire(pinned: PinnedRef, context: Context) -> StepResult:
    """Fetch a pinned checkpoint into the store, unless it is there already.

    Raises:
        SourceError: if a file is not what was pinned, or came twice with other bytes than its source declares.
        ResourceError: if the disk has no room for it; nothing is fetched then.
        NetworkError: if the remote end failed for now; the next call continues where this one ended.
    """
    step = step_of(pinned)
    # Not under tmp/, which is swept; the step's lock guards it.
    kept = context.store.root / "downloads" / step.key.removeprefix("sha256:")
    return run_step(context, step, lambda space: _work(pinned, context, kept, space), machine="network")


def _work(pinned: PinnedRef, context: Context, kept: Path, space: Workspace) -> Work:
    kept.mkdir(parents=True, exist_ok=True)
    missing = {file.path: file.size - _size(kept / file.path) for file in pinned.files}
    _refuse_without_room(pinned, sum(missing.values()), kept)
    meter = Meter(pinned.size, context.on_progress)
    meter.add(pinned.size - sum(missing.values()))
    for file in pinned.files:
        (kept / file.path).parent.mkdir(parents=True, exist_ok=True)
        _get(pinned, file, kept / file.path, context, meter)
    for file in pinned.files:
        target = space.out / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        (kept / file.path).rename(target)
    shutil.rmtree(kept)
    return Work()


def _refuse_without_room(pinned: PinnedRef, needed: int, folder: Path) -> None:
    free = free_disk_bytes(folder)
    if needed > free:
        raise ResourceError(
            f"{pinned} needs {needed / 1e9:.2f} GB more, but the disk of {folder.parent.parent} has "
            f"{free / 1e9:.2f} GB free; free some, or point MODELMINT_STORE at a larger disk"
        )


def _get(pinned: PinnedRef, file: PinnedFile, target: Path, context: Context, meter: "Meter") -> None:
    """Have a file under `target`, from the store if it has those contents already, else from its source."""
    if not _take_from_store(file, target, context, meter):
        fetch_checked(pinned, file, target, context.settings, meter.add)


def fetch_checked(
    pinned: PinnedRef, file: PinnedFile, target: Path, settings: Settings, on_bytes: Callable[[int], None]
) -> None:
    """Fetch a file with the bytes that its source declares; a bad one is evicted and fetched again, once.

    Raises:
        SourceError: if it came twice with other bytes, or is not what was pinned.
        NetworkError: if the remote end failed for now; what came is kept in `target`.
    """
    source = source_of(pinned.ref)
    for _ in range(2):
        source.fetch(pinned, file, target, settings, on_bytes)
        wrong = mismatch(file, target)
        if not wrong:
            return
        target.unlink()
        on_bytes(-file.size)
    raise SourceError(
        f"{pinned}: {file.path} came twice with other bytes than its source declares: {wrong}; "
        "the source or the way to it is damaged: try another network, or report it to the repository's owner"
    )


def _take_from_store(file: PinnedFile, target: Path, context: Context, meter: "Meter") -> bool:
    """Copy a file whose contents are in the store already: the weights of a commit that only changed the card."""
    if file.digest is None or _size(target) == file.size:
        return False
    blob = context.store.blob(FileEntry(path=file.path, size=file.size, digest=file.digest))
    if _size(blob) != file.size:
        return False
    before = _size(target)
    shutil.copyfile(blob, target)
    if mismatch(file, target):
        target.unlink()
        meter.add(-before)
        return False
    meter.add(file.size - before)
    return True


def mismatch(file: PinnedFile, path: Path) -> str:
    """What distinguishes a file from what its source declares; empty if nothing does."""
    size = path.stat().st_size
    if size != file.size:
        return f"{size} bytes instead of {file.size}"
    if file.digest is not None:
        digest = digest_of_file(path)
        return "" if digest == file.digest else f"{digest} instead of {file.digest}"
    if file.git_sha1:
        name = _git_sha1(path, size)
        return "" if name == file.git_sha1 else f"git blob {name} instead of {file.git_sha1}"
    return ""


def _git_sha1(path: Path, size: int) -> str:
    """The name that git gives these contents; what the Hub declares for files that are not in large file storage."""
    state = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Meter:
    """Counts bytes and tells how far a download is, at most ten times a second and at its end.

    Args:
        total: bytes in all.
        tell: who is told; None for nobody.
    """

    def __init__(self, total: int, tell: Callable[[Progress], None] | None) -> None:
        self._total = total
        self._tell = tell
        self._done = 0
        self._came = 0
        self._started = time.monotonic()
        self._told = 0.0

    def add(self, count: int) -> None:
        """Count bytes; negative ones have to come again."""
        now = time.monotonic()
        self._done += count
        self._came += max(count, 0)
        if self._tell is None or (now - self._told < _PROGRESS_SECONDS and self._done != self._total):
            return
        self._told = now
        rate = self._came / (now - self._started) if now > self._started and self._came else None
        remaining = (self._total - self._done) / rate if rate else None
        self._tell(Progress(self._done, self._total, "bytes", rate, remaining))
