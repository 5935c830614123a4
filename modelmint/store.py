"""The content-addressed store: file contents, manifests, step records and releases in one folder.

::

    store/blobs/sha256/ab/cdef...     file contents, read-only
    store/artifacts/<digest>.json     manifest: sorted (path, size, sha256); its hash is the artifact's digest
    store/steps/<key>.json            step record: what was asked, what came out, who did it; written last
    store/conflicts/<key>-<output>.json  record of a second, different output of one step; kept for the auditor
    store/releases/<name>/            lock.json, report.json and report.html of a release
    store/locks/                      one file per key, locked with flock
    store/tmp/                        work in progress, safe to delete

Digests and keys appear in file names as their 64 hexadecimal digits.

Laws, tested under the same words:

* a step record's existence means done: blobs are moved in, the manifest follows, the record comes last;
* each file appears under its final name by atomic rename, after fsync of the file and before fsync of the folder;
* what is handed to a tool has the bytes that its digest promises, or a `CorruptError` is raised and the blob evicted;
* the same key with other bytes is reported and never overwritten, except that of an observation the first wins.

One file a little over the usual length: what writes and what reads the layout above has to be read together.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from modelmint import locks
from modelmint.artifact import Artifact, FileEntry, StepRecord, canonical_json, digest_of_bytes, digest_of_file
from modelmint.errors import CorruptError, NonDeterminismError, ResourceError, StageError
from modelmint.files import (
    copy_and_hash,
    fsync_folder,
    full_disk_named,
    link_first,
    make_folder,
    plain_files,
    seal,
    write_durably,
)
from modelmint.scratch import Scratch

LOCK_FILE = "lock.json"
"""The document of a release from which its bytes can be rebuilt; where it is missing, the release is not complete."""

_PREFIX_DIGITS = 2
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Store:
    """One folder of blobs, manifests and records.

    Args:
        root: the folder; created on first use.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.scratch = Scratch(self.root / "tmp", self.root / "locks" / "tmp")

    # Writing, in the order in which a step is committed.

    def add_folder(self, folder: Path) -> Artifact:
        """Hash every file of a folder, move the contents into the store and write the manifest.

        Files outside of the store's own scratch folders, or with a second hard link, are copied: what somebody else can
        still write to is not taken over.

        Raises:
            StageError: if the folder is empty or holds anything but plain files and folders (symlink, socket, ...).
            ResourceError: if the disk is full.
        """
        files = {path.relative_to(folder).as_posix(): path for path in plain_files(folder)}
        if not files:
            raise StageError(f"{folder} is empty, and an artifact has at least one file")
        return self._add(files)

    def add_file(self, path: Path, name: str) -> Artifact:
        """The artifact of one file, under the given name.

        Raises:
            StageError: if it is no plain file, or the name leaves its folder.
            ResourceError: if the disk is full.
        """
        if path.is_symlink() or not path.is_file():
            raise StageError(f"{path} is not a plain file")
        return self._add({name: path})

    def commit(self, record: StepRecord) -> StepRecord:
        """Write a record last; returns the one that holds (the first, where an observation was made twice).

        Raises:
            NonDeterminismError: if the key has a record with another output and the step is no observation.
            CorruptError: if the output is not whole, and so the step is not done.
            ResourceError: if the disk is full.
        """
        if not self.holds(self.artifact(record.output)):
            raise CorruptError(f"{record.step.stage} cannot be recorded: its output {record.output} lacks files")
        final, content = self.record_file(record.key), _text(record)
        if self._write(final, content, first_wins=True):
            return record
        present = self._read_record(record.key)
        if present is not None and present.output == record.output:
            return present
        if present is not None and not record.step.observation:
            raise self._conflict(present, record)
        if present is not None and self._is_whole(present.output):
            return present
        # Unreadable, or an observation whose files are gone: nothing that could be contradicted.
        self._write(final, content)
        return record

    def write_release(self, name: str, files: Mapping[str, bytes]) -> Path:
        """Keep a release's documents; the lock comes last. Returns their folder.

        Raises:
            ValueError: if the release's or a file's name is more than one plain word.
            ResourceError: if the disk is full.
        """
        for word in (name, *files):
            if not _NAME.fullmatch(word):
                raise ValueError(f"not a plain name of letters, digits, dots, dashes and underscores: {word!r}")
        folder = self.root / "releases" / name
        for file in sorted(files, key=lambda file: (file == LOCK_FILE, file)):
            self._write(folder / file, files[file])
        return folder

    # Reading.

    def artifact(self, digest: str) -> Artifact:
        """The manifest of that digest.

        Raises:
            CorruptError: if it is missing or its text has another digest.
        """
        path = self.manifest(digest)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise CorruptError(
                f"the store {self.root} has no artifact {digest}; run the release again to rebuild it"
            ) from None
        found = digest_of_bytes(text)
        if found != digest:
            path.unlink(missing_ok=True)
            raise CorruptError(
                f"the manifest of artifact {digest} is damaged: its text has digest {found}; it was removed, "
                "run again to rebuild it"
            )
        return Artifact.model_validate_json(text)

    def holds(self, artifact: Artifact) -> bool:
        """Whether every blob is there at the right size."""
        try:
            return all(self.blob(entry).stat().st_size == entry.size for entry in artifact.files)
        except FileNotFoundError:
            return False

    def materialize(self, digest: str, folder: Path, *, only: tuple[str, ...] = ()) -> Path:
        """Write an artifact's files into a new folder by reflink or copy, hashing as it goes; returns the folder.

        Args:
            digest: the artifact.
            folder: made with its parents; none of the files may be there yet.
            only: paths of the files wanted; all if empty.

        Raises:
            CorruptError: if a file is missing or damaged; a damaged blob is evicted, and its step rebuilt next time.
            ResourceError: if the disk is full.
            KeyError: if the artifact has no file of that path.
            FileExistsError: if a file of that name is there.
        """
        artifact = self.artifact(digest)
        entries = [artifact.file(path) for path in only] or artifact.files
        with full_disk_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for entry in entries:
                target = folder / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    found = copy_and_hash(self.blob(entry), target)
                except FileNotFoundError:
                    raise self._missing(digest, entry) from None
                if found != entry.digest:
                    target.unlink()
                    raise self._evicted(digest, entry, found)
        return folder

    def read(self, digest: str, path: str) -> bytes:
        """The verified contents of one (small) file of an artifact.

        Raises:
            CorruptError: if it is missing or damaged; a damaged blob is evicted.
            KeyError: if the artifact has no file of that path.
        """
        entry = self.artifact(digest).file(path)
        try:
            content = self.blob(entry).read_bytes()
        except FileNotFoundError:
            raise self._missing(digest, entry) from None
        found = digest_of_bytes(content)
        if found != entry.digest:
            raise self._evicted(digest, entry, found)
        return content

    def blob(self, entry: FileEntry) -> Path:
        """Where the contents of a file lie in the store (read-only; for download and upload, not for tools)."""
        return self.blob_file(entry.digest)

    def blob_file(self, digest: str) -> Path:
        """Where contents of that digest lie."""
        digits = _hex(digest)
        return self.root / "blobs" / "sha256" / digits[:_PREFIX_DIGITS] / digits[_PREFIX_DIGITS:]

    def manifest(self, digest: str) -> Path:
        """Where the manifest of an artifact lies."""
        return self.root / "artifacts" / f"{_hex(digest)}.json"

    def record_file(self, key: str) -> Path:
        """Where the record of a step lies."""
        return self.root / "steps" / f"{_hex(key)}.json"

    def record(self, key: str) -> StepRecord | None:
        """The record of a step that is done and whose output is whole; None otherwise."""
        record = self._read_record(key)
        return record if record is not None and self._is_whole(record.output) else None

    def records(self) -> Iterator[StepRecord]:
        """Every readable step record, in the order of their keys."""
        for key in self.step_keys():
            record = self._read_record(key)
            if record is not None:
                yield record

    def step_keys(self) -> list[str]:
        """The keys of all record files, readable or not, sorted."""
        return _digests(self.root / "steps")

    def artifacts(self) -> list[str]:
        """The digests of all manifests, sound or not, sorted."""
        return _digests(self.root / "artifacts")

    def blobs(self) -> Iterator[Path]:
        """Every blob, in the order of their digests."""
        for folder in _listing(self.root / "blobs" / "sha256"):
            yield from _listing(folder)

    def conflicts(self) -> list[Path]:
        """The records that contradict an earlier one, sorted."""
        return _listing(self.root / "conflicts")

    def inside(self, path: Path) -> str:
        """A path of the store as it is called inside of it."""
        return path.relative_to(self.root).as_posix()

    # Being used.

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """A fresh folder under tmp/ for one step's work, removed afterwards whatever happens."""
        self._make()
        with self.scratch.folder(_hex(key)[:12]) as folder:
            yield folder

    @contextmanager
    def lock(self, key: str, purpose: str) -> Iterator[int]:
        """Hold the lock of one step's key; yields its descriptor for child processes."""
        self._make()
        with locks.held(self.lock_file(key), purpose) as descriptor:
            yield descriptor

    def lock_file(self, key: str) -> Path:
        """The file that is locked while a step is done."""
        return self.root / "locks" / f"{_hex(key)}.lock"

    @contextmanager
    def in_use(self, purpose: str) -> Iterator[None]:
        """Keep garbage collection away, for a step or for all steps of a release; may be nested."""
        self._make()
        with locks.held(self.root / "locks" / "in-use", purpose, shared=True):
            yield

    @contextmanager
    def not_in_use(self, purpose: str, wait_seconds: float) -> Iterator[None]:
        """Have the store to oneself, to remove things.

        Raises:
            ResourceError: if somebody still used it after that many seconds.
        """
        self._make()
        with locks.held(self.root / "locks" / "in-use", purpose, wait_seconds=wait_seconds):
            yield

    # Inside.

    def _add(self, files: Mapping[str, Path]) -> Artifact:
        with full_disk_named(self.root):
            self._make()
            try:
                entries = [self._take(path, name) for name, path in files.items()]
                artifact = Artifact.of(entries)
                text = artifact.to_json()
            except ValidationError as error:
                names = "; ".join(str(detail["msg"]) for detail in error.errors())
                raise StageError(f"a file cannot be kept: {names}; rename it") from error
            except UnicodeEncodeError as error:
                raise StageError(f"a file cannot be kept, its name is no UTF-8: {error}; rename it") from error
            for folder in {self.blob(entry).parent for entry in entries}:
                fsync_folder(folder)
            self._write(self.manifest(artifact.digest), text)
            return artifact

    def _take(self, path: Path, name: str) -> FileEntry:
        """Bring one file in under the name of its contents."""
        if self.scratch.root in path.absolute().parents and path.stat().st_nlink == 1:
            return self._move(path, name, digest_of_file(path))
        with self.scratch.folder("copy") as folder:
            copy = folder / "copy"
            return self._move(copy, name, copy_and_hash(path, copy))

    def _move(self, path: Path, name: str, digest: str) -> FileEntry:
        entry = FileEntry(path=name, size=path.stat().st_size, digest=digest)
        seal(path)
        blob = self.blob(entry)
        make_folder(blob.parent)
        # Also over a blob that is there: it has the same bytes, or it is damaged and healed by this.
        path.replace(blob)
        return entry

    def _write(self, final: Path, content: bytes, *, first_wins: bool = False) -> bool:
        """Write a document under its final name; whether it was written (not where `first_wins` and there is one)."""
        with full_disk_named(self.root):
            self._make()
            with self.scratch.file() as (path, descriptor):
                write_durably(descriptor, content)
                make_folder(final.parent)
                if not first_wins:
                    path.replace(final)
                elif not link_first(path, final):
                    return False
                fsync_folder(final.parent)
                return True

    def _read_record(self, key: str) -> StepRecord | None:
        try:
            record = StepRecord.model_validate_json(self.record_file(key).read_bytes())
        except (FileNotFoundError, ValidationError):
            # Absent for reuse either way; `verify` reports a record that cannot be read.
            return None
        return record if record.key == key else None

    def _is_whole(self, digest: str) -> bool:
        try:
            return self.holds(self.artifact(digest))
        except CorruptError:
            return False

    def _conflict(self, first: StepRecord, second: StepRecord) -> NonDeterminismError:
        """Keep the second record beside the first, and say so."""
        kept = self.root / "conflicts" / f"{_hex(second.key)}-{_hex(second.output)}.json"
        self._write(kept, _text(second))
        return NonDeterminismError(
            f"{second.step.stage} gave two different outputs for one key, {second.key}: first {first.output} on "
            f"{first.host} at {first.finished}, now {second.output} on {second.host}; the first holds, the second is "
            f"kept in {kept}: compare them, and delete {self.record_file(first.key)} to accept a new one"
        )

    def _missing(self, digest: str, entry: FileEntry) -> CorruptError:
        return CorruptError(
            f"{entry.path} of artifact {digest} is missing from the store: expected {entry.digest}, found nothing; "
            "run again to rebuild it"
        )

    def _evicted(self, digest: str, entry: FileEntry, found: str) -> CorruptError:
        """Remove a damaged blob, so that its step counts as not done, and say so."""
        self.blob(entry).unlink(missing_ok=True)
        return CorruptError(
            f"{entry.path} of artifact {digest} is damaged in the store: expected {entry.digest}, found {found}; the "
            "damaged copy was removed, run again to rebuild it"
        )

    def _make(self) -> None:
        """Make the folders that everything else goes through."""
        try:
            with full_disk_named(self.root):
                for name in ("tmp", "locks"):
                    make_folder(self.root / name)
        except OSError as error:
            raise ResourceError(
                f"the store cannot be made in {self.root}: {error.strerror}; set MODELMINT_STORE to a folder of yours"
            ) from error


def _text(record: StepRecord) -> bytes:
    return canonical_json(record.model_dump(mode="json"))


def _hex(digest: str) -> str:
    """The digits of a digest; refuses anything that could be another path."""
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256" or not _HEX.fullmatch(digits):
        raise ValueError(f"not a digest of the form sha256:<64 hexadecimal digits>: {digest!r}")
    return digits


def _digests(folder: Path) -> list[str]:
    names: Iterable[str] = (path.stem for path in _listing(folder) if path.suffix == ".json")
    return ["sha256:" + name for name in names if _HEX.fullmatch(name)]


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
