"""Keeps a store in order: what is in it, and what can go.

Garbage collection keeps all that the lock files of published releases and of the last releases of each recipe name, and
all that these were made of. Records go first, then manifests, then blobs: nobody ever sees a record without its blobs.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from modelmint import locks
from modelmint.artifact import Artifact, StepRecord, canonical_json, digest_of_bytes
from modelmint.files import fsync_folder
from modelmint.report import Value
from modelmint.store import LOCK_FILE, Store

KEEP_LAST = 3
PUBLISHED_FILE = "published"
"""A release with a file of this name beside its lock is kept for good."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SUMMARY_CHARACTERS = 80

Kind = Literal["record", "manifest", "blob", "download", "scratch", "lock"]


class Release(Value):
    """A release whose documents are complete.

    Attributes:
        name: its folder's name.
        recipe: the name of its recipe.
        published: whether it was published.
        written: when its lock was written, seconds since the epoch.
        needs: every digest and step key that its lock names.
    """

    name: str
    recipe: str
    published: bool
    written: float
    needs: frozenset[str]


class GcItem(Value):
    """One file or folder that can go.

    Attributes:
        kind: what it is.
        path: inside the store.
        size: bytes that its removal frees.
        label: what it was, for a person.
    """

    kind: Kind
    path: str
    size: int
    label: str


class GcPlan(Value):
    """What garbage collection would remove, in the order in which it would.

    Attributes:
        keep_last: how many releases of each recipe are kept.
        kept: names of the releases that are kept.
        items: what can go.
    """

    keep_last: int
    kept: tuple[str, ...]
    items: tuple[GcItem, ...]

    @property
    def size(self) -> int:
        """Bytes that would be freed."""
        return sum(item.size for item in self.items)


class Collected(Value):
    """What garbage collection removed: its items, and how many of the plan's were needed again by then."""

    items: tuple[GcItem, ...]
    kept_after_all: int

    @property
    def size(self) -> int:
        """Bytes that were freed."""
        return sum(item.size for item in self.items)


class Listed(Value):
    """One result in the store, for a person.

    Attributes:
        digest: the artifact.
        key: the step that made it.
        stage: the step's stage.
        parameters: the step's parameters in short.
        size: bytes of its files.
        finished: when it was recorded, ISO 8601 in UTC.
        whole: whether all its files are there.
        releases: names of the releases that need it.
    """

    digest: str
    key: str
    stage: str
    parameters: str
    size: int
    finished: str
    whole: bool
    releases: tuple[str, ...]


def releases(store: Store) -> list[Release]:
    """Every complete release, oldest first."""
    found = []
    for path in (store.root / "releases").glob(f"*/{LOCK_FILE}"):
        text = path.read_text(encoding="utf-8")
        found.append(
            Release(
                name=path.parent.name,
                recipe=_recipe_of(text),
                published=(path.parent / PUBLISHED_FILE).exists(),
                written=path.stat().st_mtime,
                needs=frozenset(_DIGEST.findall(text)),
            )
        )
    return sorted(found, key=lambda release: (release.written, release.name))


def listing(store: Store) -> list[Listed]:
    """Every result in the store, oldest first."""
    known = releases(store)
    rows = []
    for record in store.records():
        artifact = _manifest_of(store, record.output)
        rows.append(
            Listed(
                digest=record.output,
                key=record.key,
                stage=record.step.stage,
                parameters=_summary(record.step.parameters),
                size=artifact.size if artifact else 0,
                finished=record.finished,
                whole=artifact is not None and store.holds(artifact),
                releases=tuple(release.name for release in known if record.output in release.needs),
            )
        )
    return sorted(rows, key=lambda row: (row.finished, row.key))


def plan_gc(store: Store, keep_last: int = KEEP_LAST) -> GcPlan:
    """What garbage collection would remove now; nothing is changed.

    Args:
        store: what is looked at.
        keep_last: how many releases of each recipe are kept besides the published ones.

    Raises:
        ValueError: if `keep_last` is negative.
    """
    if keep_last < 0:
        raise ValueError(f"keep_last = {keep_last}: at least 0 releases are kept")
    kept = _kept_releases(releases(store), keep_last)
    records = {record.key: record for record in store.records()}
    needed = _needed(records.values(), {digest for release in kept for digest in release.needs} | _contradicting(store))
    items = (*_records_to_go(store, records, needed), *_contents_to_go(store, needed), *_remains_to_go(store, needed))
    return GcPlan(keep_last=keep_last, kept=tuple(release.name for release in kept), items=items)


def collect(store: Store, plan: GcPlan, *, wait_seconds: float = 10.0) -> Collected:
    """Remove what a plan says and is still not needed; while nothing else uses the store.

    Args:
        store: what is cleaned.
        plan: what was shown to the person who asked.
        wait_seconds: how long to wait for running steps and releases.

    Raises:
        ResourceError: if the store was still in use then; nothing is removed.
    """
    with store.not_in_use("garbage collection", wait_seconds):
        still = {item.path for item in plan_gc(store, plan.keep_last).items}
        going = [item for item in plan.items if item.path in still]
        for kind, remove in _REMOVERS.items():
            folders = set()
            for item in going:
                if item.kind == kind:
                    path = store.root / item.path
                    remove(store, path)
                    folders.add(path.parent)
            # Durable before the next kind: a crash in between leaves orphans, never a record without its blobs.
            for folder in folders:
                fsync_folder(folder)
    return Collected(items=tuple(going), kept_after_all=len(plan.items) - len(going))


def _unlink(store: Store, path: Path) -> None:
    path.unlink(missing_ok=True)


def _remove_tree(store: Store, path: Path) -> None:
    shutil.rmtree(path)


def _sweep(store: Store, path: Path) -> None:
    store.scratch.sweep()


def _unlock(store: Store, path: Path) -> None:
    locks.remove_if_free(path)


_REMOVERS: dict[Kind, Callable[[Store, Path], None]] = {
    "record": _unlink,
    "manifest": _unlink,
    "blob": _unlink,
    "download": _remove_tree,
    "scratch": _sweep,
    "lock": _unlock,
}


def _kept_releases(known: list[Release], keep_last: int) -> list[Release]:
    by_recipe: dict[str, list[Release]] = defaultdict(list)
    for release in known:
        by_recipe[release.recipe].append(release)
    last = {
        release.name for group in by_recipe.values() for release in group[len(group) - min(keep_last, len(group)) :]
    }
    return [release for release in known if release.published or release.name in last]


def _needed(records: Iterable[StepRecord], roots: set[str]) -> set[str]:
    """The roots, and the keys, outputs and inputs of every step that made one of them, all the way back."""
    makers: dict[str, list[StepRecord]] = defaultdict(list)
    for record in records:
        makers[record.key].append(record)
        makers[record.output].append(record)
    needed: set[str] = set()
    waiting = list(roots)
    while waiting:
        digest = waiting.pop()
        if digest not in needed:
            needed.add(digest)
            for record in makers[digest]:
                waiting += [record.key, record.output, *record.step.inputs.values()]
    return needed


def _records_to_go(store: Store, records: Mapping[str, StepRecord], needed: set[str]) -> Iterator[GcItem]:
    for key in store.step_keys():
        if key not in needed:
            record = records.get(key)
            label = f"{record.step.stage} {_summary(record.step.parameters)}".strip() if record else "unreadable"
            yield _item("record", store, store.record_file(key), label)


def _contents_to_go(store: Store, needed: set[str]) -> Iterator[GcItem]:
    """Manifests that are not needed, then the blobs that no needed one names."""
    labels: dict[Path, str] = {}
    kept = {store.blob_file(digest) for digest in needed}
    for digest in store.artifacts():
        artifact = _manifest_of(store, digest)
        entries = artifact.files if artifact else ()
        if digest in needed:
            kept |= {store.blob(entry) for entry in entries}
        else:
            labels |= {store.blob(entry): entry.path for entry in entries}
            label = ", ".join(entry.path for entry in entries[:3]) or "unreadable"
            yield _item("manifest", store, store.manifest(digest), label)
    for path in store.blobs():
        if path not in kept:
            yield _item("blob", store, path, labels.get(path, "named by no manifest"))


def _remains_to_go(store: Store, needed: set[str]) -> Iterator[GcItem]:
    """What steps left beside their results."""
    for path in sorted((store.root / "downloads").glob("*")):
        yield _item("download", store, path, "an unfinished download")
    for path in store.scratch.abandoned():
        yield _item("scratch", store, path, "left by a process that was killed")
    for path in sorted((store.root / "locks").glob("*.lock")):
        if "sha256:" + path.stem not in needed and locks.is_free(path):
            yield _item("lock", store, path, "of a step that is not kept")


def _item(kind: Kind, store: Store, path: Path, label: str) -> GcItem:
    return GcItem(kind=kind, path=store.inside(path), size=_size(path), label=label)


def _manifest_of(store: Store, digest: str) -> Artifact | None:
    path = store.manifest(digest)
    text = path.read_bytes() if path.exists() else b""
    return Artifact.model_validate_json(text) if digest_of_bytes(text) == digest else None


def _contradicting(store: Store) -> set[str]:
    """Both outputs of each conflict: the auditor wants to compare them."""
    return {digest for path in store.conflicts() for digest in _DIGEST.findall(path.read_text(encoding="utf-8"))}


def _recipe_of(text: str) -> str:
    """The recipe's name in a lock of whatever version; empty where it has none."""
    recipe = json.loads(text).get("recipe", "")
    return str(recipe.get("name", "")) if isinstance(recipe, dict) else str(recipe)


def _summary(parameters: Mapping[str, object]) -> str:
    words = (f"{name}={_word(value)}" for name, value in sorted(parameters.items()) if value not in (None, "", [], {}))
    text = " ".join(words)
    return text if len(text) <= _SUMMARY_CHARACTERS else text[: _SUMMARY_CHARACTERS - 1] + "…"


def _word(value: object) -> str:
    return value if isinstance(value, str) else canonical_json(value).decode()


def _size(path: Path) -> int:
    try:
        files = list(path.rglob("*")) if path.is_dir() else [path]
        return sum(file.lstat().st_size for file in files if not file.is_dir())
    except FileNotFoundError:
        return 0  # a running step removed it while we looked; so will `collect` find
