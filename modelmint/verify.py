"""Checks a store from end to end: every blob is hashed again, every document read again."""

import time
from pathlib import Path

from pydantic import ValidationError

from modelmint.artifact import Artifact, StepRecord, digest_of_bytes, digest_of_file
from modelmint.report import Value
from modelmint.store import Store


class Damage(Value):
    """A file of the store that is not what its name says.

    Attributes:
        path: inside the store.
        what: what is wrong, with expected and found digest.
    """

    path: str
    what: str


class VerifyReport(Value):
    """What a full check of a store found.

    Attributes:
        blobs, blob_bytes: how much was hashed.
        artifacts, records: how many documents were read.
        orphans, orphan_bytes: blobs that no manifest names; garbage collection takes them.
        damaged: files that are not what their names say.
        incomplete: keys of steps whose output is not whole, so that they will be done again.
        conflicts: files of records that contradict another; for a person to look at.
        repaired: whether the damaged files were removed.
        seconds: how long it took.
    """

    blobs: int
    blob_bytes: int
    artifacts: int
    records: int
    orphans: int
    orphan_bytes: int
    damaged: tuple[Damage, ...]
    incomplete: tuple[str, ...]
    conflicts: tuple[str, ...]
    repaired: bool
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged and nothing contradicts."""
        return not self.damaged and not self.conflicts


def verify(store: Store, *, repair: bool = False) -> VerifyReport:
    """Hash every blob and read every document.

    Args:
        store: what is checked; it is only read, unless `repair`.
        repair: whether damaged files are removed, so that their steps are done again.
    """
    started = time.monotonic()
    with store.in_use("verify"):
        damaged: list[Damage] = []
        manifests = _check_manifests(store, damaged)
        records = _check_records(store, damaged)
        named = {store.blob(entry) for artifact in manifests.values() for entry in artifact.files}
        count = total = orphans = orphan_bytes = 0
        for path in store.blobs():
            size = path.stat().st_size
            count, total = count + 1, total + size
            if path not in named:
                orphans, orphan_bytes = orphans + 1, orphan_bytes + size
            what = _wrong_with_blob(path)
            if what:
                damaged.append(Damage(path=store.inside(path), what=what))
        if repair:
            for damage in damaged:
                (store.root / damage.path).unlink(missing_ok=True)
        broken = {store.root / damage.path for damage in damaged}
        whole = {
            digest
            for digest, artifact in manifests.items()
            if store.holds(artifact) and not any(store.blob(entry) in broken for entry in artifact.files)
        }
    return VerifyReport(
        blobs=count,
        blob_bytes=total,
        artifacts=len(manifests),
        records=len(records),
        orphans=orphans,
        orphan_bytes=orphan_bytes,
        damaged=tuple(damaged),
        incomplete=tuple(record.key for record in records if record.output not in whole),
        conflicts=tuple(store.inside(path) for path in store.conflicts()),
        repaired=repair,
        seconds=time.monotonic() - started,
    )


def _check_manifests(store: Store, damaged: list[Damage]) -> dict[str, Artifact]:
    sound = {}
    for digest in store.artifacts():
        path = store.manifest(digest)
        text = path.read_bytes()
        found = digest_of_bytes(text)
        if found == digest:
            sound[digest] = Artifact.model_validate_json(text)
        else:
            damaged.append(Damage(path=store.inside(path), what=f"manifest of {digest} has digest {found}"))
    return sound


def _check_records(store: Store, damaged: list[Damage]) -> list[StepRecord]:
    sound = []
    for key in store.step_keys():
        path = store.record_file(key)
        try:
            record = StepRecord.model_validate_json(path.read_bytes())
        except ValidationError as error:
            what = f"record of {key} cannot be read: {error.errors()[0]['msg']}"
        else:
            what = "" if record.key == key else f"record of {key} is of another step, {record.key}"
            if not what:
                sound.append(record)
        if what:
            damaged.append(Damage(path=store.inside(path), what=what))
    return sound


def _wrong_with_blob(path: Path) -> str:
    expected = f"sha256:{path.parent.name}{path.name}"
    try:
        found = digest_of_file(path)
    except OSError as error:
        return f"blob {expected} cannot be read: {error}"
    return "" if found == expected else f"blob {expected} has digest {found}"
