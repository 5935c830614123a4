"""The content-addressed store: file contents, manifests, step records and releases in one folder.

::

    store/blobs/sha256/ab/cdef...     file contents, read-only
    store/artifacts/<digest>.json     manifest: sorted (path, size, sha256); its hash is the artifact's digest
    store/steps/<key>.json            step record: what was asked, what came out, who did it; written last
    store/releases/<name>/            lock.json, report.json and report.html of a release
    store/locks/                      one file per key, locked with flock
    store/tmp/                        work in progress, safe to delete

Laws, tested under the same words:

* a step record's existence means done: blobs are moved in, the manifest follows, the record comes last;
* each file appears under its final name by atomic rename, after fsync of the file and before fsync of the folder;
* what is handed to a tool has the bytes that its digest promises, or a `CorruptError` is raised and the blob evicted;
* the same key with other bytes is reported and never overwritten, except that of an observation the first wins.
"""
# Contract: to be filled in. Keep these signatures.

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from modelmint.artifact import Artifact, FileEntry, StepRecord


class Store:
    """One folder of blobs, manifests and records.

    Args:
        root: the folder; created on first use.
    """

    def __init__(self, root: Path) -> None: ...

    def add_folder(self, folder: Path) -> Artifact:
        """Hash every file of a folder, move the contents into the store and write the manifest.

        Raises:
            StageError: if the folder is empty or holds anything but plain files and folders (symlink, socket, ...).
            ResourceError: if the disk is full.
        """
        ...

    def add_file(self, path: Path, name: str) -> Artifact:
        """The artifact of one file, under the given name."""
        ...

    def artifact(self, digest: str) -> Artifact:
        """The manifest of that digest.

        Raises:
            CorruptError: if it is missing or its text has another digest.
        """
        ...

    def holds(self, artifact: Artifact) -> bool:
        """Whether every blob is there at the right size."""
        ...

    def materialize(self, digest: str, folder: Path, *, only: tuple[str, ...] = ()) -> Path:
        """Write an artifact's files into a new folder by reflink or copy, hashing as it goes; returns the folder."""
        ...

    def read(self, digest: str, path: str) -> bytes:
        """The verified contents of one (small) file of an artifact."""
        ...

    def blob(self, entry: FileEntry) -> Path:
        """Where the contents of a file lie in the store (read-only; for download and upload, not for tools)."""
        ...

    def record(self, key: str) -> StepRecord | None:
        """The record of a step that is done and whose output is whole; None otherwise."""
        ...

    def records(self) -> Iterator[StepRecord]:
        """Every readable step record, in the order of their keys."""
        ...

    def commit(self, record: StepRecord) -> StepRecord:
        """Write a record last; returns the one that holds (the first, where an observation was made twice).

        Raises:
            NonDeterminismError: if the key has a record with another output and the step is no observation.
        """
        ...

    def write_release(self, name: str, files: Mapping[str, bytes]) -> Path:
        """Keep a release's documents; the lock comes last. Returns their folder."""
        ...

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """A fresh folder under tmp/ for one step's work, removed afterwards whatever happens."""
        ...
