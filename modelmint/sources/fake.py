"""A made-up checkpoint: ``fake:name``, for dry runs and tests. Its bytes follow from its name alone."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from modelmint.recipe import ModelRef
from modelmint.settings import Settings
from modelmint.sources import PinnedFile, PinnedRef, folder


def resolve(ref: ModelRef, settings: Settings) -> PinnedRef:
    """Pin a made-up checkpoint by the digest of what would be written."""
    with tempfile.TemporaryDirectory() as scratch:
        return folder.pin(ref, _written(ref, Path(scratch)))


def fetch(
    pinned: PinnedRef, file: PinnedFile, target: Path, settings: Settings, on_bytes: Callable[[int], None]
) -> None:
    """Write one file of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder.copy_pinned(_written(pinned.ref, Path(scratch)), pinned, file, target, on_bytes)


def read_range(pinned: PinnedRef, file: PinnedFile, start: int, length: int, settings: Settings) -> bytes:
    """Read part of a file of it."""
    with tempfile.TemporaryDirectory() as scratch:
        content = (_written(pinned.ref, Path(scratch)) / file.path).read_bytes()
    return content[start : start + length]


def _written(ref: ModelRef, scratch: Path) -> Path:
    from modelmint.formats.fake_model import write_checkpoint

    root = scratch / "checkpoint"
    root.mkdir()
    write_checkpoint(ref.location, root)
    return root
