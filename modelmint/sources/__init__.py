"""Where checkpoints come from: one module for each kind of source, and the pinned reference that they all give.

A source is a module with the names of `Source`; it is listed in `SOURCES` and imported on first use. Pinning is done
once: a branch of the Hub becomes a commit, a folder the digest of its files, a prefix of a bucket its listing.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from pydantic import Field, JsonValue

from modelmint.artifact import Digest, RelativePath
from modelmint.errors import UnsafeSourceError
from modelmint.recipe import ModelRef
from modelmint.report import Value
from modelmint.settings import Settings

SOURCES = {
    "hf": "modelmint.sources.hub",
    "file": "modelmint.sources.folder",
    "s3": "modelmint.sources.s3",
    "fake": "modelmint.sources.fake",
}
"""Module of each kind of source, by scheme."""


class PinnedFile(Value):
    """One file of a pinned checkpoint, as its source declares it before a byte of it is read.

    Attributes:
        path: inside the checkpoint.
        size: bytes.
        digest: of the contents, where the source knows it.
        git_sha1: git's name of the contents, where the source knows only that.
        etag: the entity tag of an S3 object.
        version: the version of an S3 object, where its bucket keeps versions.
    """

    path: RelativePath
    size: int = Field(ge=0)
    digest: Digest | None = None
    git_sha1: str = Field(default="", pattern=r"^([0-9a-f]{40})?$")
    etag: str = ""
    version: str = ""

    @property
    def identity(self) -> str:
        """What distinguishes these contents from others of the same size."""
        return self.digest or (f"git:{self.git_sha1}" if self.git_sha1 else f"etag:{self.etag}")


class PinnedRef(Value):
    """A checkpoint whose contents cannot change any more under this name.

    Attributes:
        ref: what was asked for.
        revision: the commit on the Hub; otherwise the digest of the tree or of the listing.
        files: those that are acquired, sorted by path.
        left_out: the paths of all others.
    """

    ref: ModelRef
    revision: str = Field(pattern=r"^([0-9a-f]{40}|sha256:[0-9a-f]{64})$")
    files: tuple[PinnedFile, ...] = Field(min_length=1)
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.ref.scheme == "file":
            # The path is this machine's own affair.
            return f"file:{self.ref.model_name}@{self.revision}"
        return f"{self.ref.model_copy(update={'revision': ''})}@{self.revision}"

    @property
    def size(self) -> int:
        """Bytes of all files that are acquired."""
        return sum(file.size for file in self.files)

    def file(self, path: str) -> PinnedFile:
        """The file of that path.

        Raises:
            KeyError: if it is not among those acquired.
        """
        for file in self.files:
            if file.path == path:
                return file
        raise KeyError(path)

    def parameters(self) -> dict[str, JsonValue]:
        """What goes into the key of acquiring it: names and digests, never a local path."""
        named = {"hf": str(self), "s3": str(self)}.get(self.ref.scheme, f"{self.ref.scheme}:{self.revision}")
        return {"source": named, "files": [[file.path, file.size, file.identity] for file in self.files]}


class Source(Protocol):
    """What a source's module offers."""

    def resolve(self, ref: ModelRef, settings: Settings) -> PinnedRef:
        """Pin a reference.

        Raises:
            SourceError: if it is missing, gated or holds no checkpoint.
            NetworkError: if the remote end failed for now.
        """
        ...

    def fetch(
        self, pinned: PinnedRef, file: PinnedFile, target: Path, settings: Settings, on_bytes: Callable[[int], None]
    ) -> None:
        """Write the contents of a file; those already in `target` are its beginning and are continued.

        Args:
            pinned: the checkpoint.
            file: one of its files.
            target: where to write; its folder exists.
            settings: addresses and tokens.
            on_bytes: told how many bytes came, negative where some have to come again.

        Raises:
            SourceError: if the file is not what was pinned.
            NetworkError: if the remote end failed for now; what came is kept in `target`.
        """
        ...

    def read_range(self, pinned: PinnedRef, file: PinnedFile, start: int, length: int, settings: Settings) -> bytes:
        """Read part of a file; fewer bytes than asked for only at its end.

        Raises:
            SourceError: if the file is not what was pinned.
            NetworkError: if the remote end failed for now.
        """
        ...


def source_of(ref: ModelRef) -> Source:
    """The module that serves a reference."""
    return cast(Source, importlib.import_module(SOURCES[ref.scheme]))


def clean_path(path: str, source: object) -> str:
    """A path that a source names, if it stays inside the folder it is written into.

    Raises:
        UnsafeSourceError: if it is absolute, has ``..``, a backslash or a NUL, or is not normal.
    """
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or any(char in path for char in "\0\\\n\r"):
        raise UnsafeSourceError(
            f"{source} has a file named {path!r}, which could be written outside of its folder; nothing was read; "
            "remove the file from the source or use another one"
        )
    return path
