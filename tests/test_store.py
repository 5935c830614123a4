"""The laws of `modelmint.store`, under its own words."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashing import left_in_tmp, step
from stored import NOBODY, damage, folder_of, kept, record_of

from modelmint import files
from modelmint.artifact import Artifact, StepRecord, digest_of_bytes
from modelmint.errors import CorruptError, NonDeterminismError, StageError
from modelmint.store import Store

pytestmark = pytest.mark.pure


# A step record's existence means done.


def test_a_record_is_found_once_it_is_committed_and_its_output_whole(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m", card=b"")
    record = record_of(step("convert"), output)
    assert store.record(record.key) is None
    assert store.commit(record) == record
    assert store.record(record.key) == record
    assert list(store.records()) == [record]
    assert left_in_tmp(store) == []


def test_a_record_is_refused_while_its_output_is_not_whole(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m")
    store.blob(output.files[0]).unlink()
    with pytest.raises(CorruptError, match=f"convert cannot be recorded: its output {output.digest} lacks files"):
        store.commit(record_of(step("convert"), output))
    with pytest.raises(CorruptError, match=f"has no artifact {NOBODY}"):
        store.commit(record_of(step("convert"), output).model_copy(update={"output": NOBODY}))
    assert list(store.records()) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda store, output: store.blob(output.files[0]).unlink(),
        lambda store, output: os.truncate(store.blob(output.files[0]), 1),
        lambda store, output: store.manifest(output.digest).unlink(),
        lambda store, output: damage(store.manifest(output.digest)),
        lambda store, output: store.record_file(step("convert").key).write_bytes(b'{"schema": 1, "key'),
        lambda store, output: store.record_file(step("convert").key).write_bytes(b"\xff\0"),
        lambda store, output: store.record_file(step("convert").key).write_bytes(b""),
    ],
    ids=[
        "blob gone",
        "blob short",
        "manifest gone",
        "manifest changed",
        "record torn",
        "record garbage",
        "record empty",
    ],
)
def test_a_step_whose_record_or_output_is_not_whole_is_not_done_and_can_be_done_again(
    store: Store, tmp_path: Path, harm: Callable[[Store, Artifact], None]
) -> None:
    output = kept(store, tmp_path, model=b"model")
    record = store.commit(record_of(step("convert"), output))
    harm(store, output)
    assert store.record(record.key) is None

    assert kept(store, tmp_path, model=b"model") == output
    assert store.commit(record_of(step("convert"), output, host="there")).output == output.digest
    found = store.record(record.key)
    assert found is not None
    assert found.output == output.digest


def test_a_record_under_another_steps_key_is_not_believed(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m")
    store.commit(record_of(step("convert"), output))
    store.record_file(step("convert").key).rename(store.record_file(step("quantize").key))
    assert store.record(step("quantize").key) is None


def test_an_empty_store_answers_and_makes_nothing(store: Store) -> None:
    assert store.record(NOBODY) is None
    assert list(store.records()) == list(store.blobs()) == store.artifacts() == store.conflicts() == []
    with pytest.raises(CorruptError, match=f"{store.root} has no artifact {NOBODY}; run the release again"):
        store.artifact(NOBODY)
    assert not store.root.exists()


# Each file appears under its final name by atomic rename, after fsync of the file and before fsync of the folder.


def test_each_file_is_durable_before_its_name_and_each_name_before_the_record(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []

    def inode(path: Any) -> int:
        return Path(path).stat().st_ino if not isinstance(path, int) else os.fstat(path).st_ino

    def watch(name: str, see: Callable[..., int]) -> None:
        real = getattr(os, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            events.append((name, see(*arguments)))
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", inode)
    watch("rename", lambda source, target: inode(source))
    watch("replace", lambda source, target: inode(source))
    watch("link", lambda source, target, **named: inode(source))

    with store.workspace(step("convert").key) as place:
        output = store.add_folder(folder_of(place / "out", model=b"m", tokenizer=b"t"))
    store.commit(record_of(step("convert"), output))

    def at(kind: tuple[str, ...], path: Path) -> int:
        return max(index for index, event in enumerate(events) if event[0] in kind and event[1] == inode(path))

    named = ("rename", "replace", "link")
    record = store.record_file(step("convert").key)
    documents = [*(store.blob(entry) for entry in output.files), store.manifest(output.digest), record]
    for path in documents:
        assert at(("fsync",), path) < at(named, path) < at(("fsync",), path.parent), path
        if path != record:
            assert at(("fsync",), path.parent) < at(named, record), path
    manifest = store.manifest(output.digest)
    assert all(at(("fsync",), store.blob(entry).parent) < at(named, manifest) for entry in output.files)


def test_blobs_are_read_only_and_named_by_their_contents(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m")
    blob = store.blob(output.files[0])
    digits = digest_of_bytes(b"m").removeprefix("sha256:")
    assert blob == store.root / "blobs" / "sha256" / digits[:2] / digits[2:]
    assert blob.stat().st_mode & 0o777 == 0o444


def test_the_same_contents_are_kept_once(store: Store, tmp_path: Path) -> None:
    first = kept(store, tmp_path, a=b"same", b=b"same")
    second = kept(store, tmp_path, c=b"same")
    assert len(list(store.blobs())) == 1
    assert first.digest != second.digest
    assert kept(store, tmp_path, a=b"same", b=b"same").digest == first.digest


def test_what_the_store_does_not_own_is_copied_and_not_taken_away(store: Store, tmp_path: Path) -> None:
    mine = folder_of(tmp_path / "mine", model=b"m")
    output = store.add_folder(mine)
    assert (mine / "model").read_bytes() == b"m"
    (mine / "model").write_bytes(b"changed")
    assert store.read(output.digest, "model") == b"m"


def test_a_file_that_somebody_can_still_write_to_is_copied(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"m")
    with store.workspace(step("convert").key) as place:
        (place / "model").hardlink_to(elsewhere)
        output = store.add_folder(place)
    elsewhere.write_bytes(b"changed")
    assert store.read(output.digest, "model") == b"m"


def test_what_a_step_wrote_is_moved_and_not_copied(store: Store) -> None:
    with store.workspace(step("convert").key) as place:
        folder_of(place / "out" / "deep", model=b"m")
        before = (place / "out" / "deep" / "model").stat().st_ino
        output = store.add_folder(place / "out")
    assert [entry.path for entry in output.files] == ["deep/model"]
    assert store.blob(output.files[0]).stat().st_ino == before


def test_one_file_is_an_artifact_too(store: Store, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"words")
    artifact = store.add_file(tmp_path / "text", "data/evaluation.txt")
    assert [entry.path for entry in artifact.files] == ["data/evaluation.txt"]
    assert store.read(artifact.digest, "data/evaluation.txt") == b"words"
    with pytest.raises(StageError, match=r"not a clean relative path: '../evil'; rename it"):
        store.add_file(tmp_path / "text", "../evil")
    (tmp_path / "link").symlink_to(tmp_path / "text")
    with pytest.raises(StageError, match="link is not a plain file"):
        store.add_file(tmp_path / "link", "a")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "is a symbolic link; an artifact holds plain files only"),
        (lambda path: path.symlink_to("/etc"), "is a symbolic link"),
        (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
        (os.mkfifo, "is neither a file nor a folder"),
        (make_socket, "is neither a file nor a folder"),
    ],
    ids=["link to a file", "link to a folder", "broken link", "pipe", "socket"],
)
def test_anything_but_plain_files_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], message: str
) -> None:
    folder = folder_of(tmp_path / "o", model=b"m")
    monkeypatch.chdir(folder)  # the path of a socket is short
    make(Path("odd"))
    with pytest.raises(StageError, match=message):
        store.add_folder(folder)
    assert store.artifacts() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [(b"a\\b", "not a clean relative path"), (b"\xff", "its name is no UTF-8")],
    ids=["backslash", "bytes"],
)
def test_a_name_that_no_manifest_can_hold_is_refused(store: Store, tmp_path: Path, name: bytes, message: str) -> None:
    (tmp_path / "o").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "o") + b"/" + name)).write_bytes(b"")
    with pytest.raises(StageError, match=message):
        store.add_folder(tmp_path / "o")


def test_an_empty_folder_is_no_artifact(store: Store, tmp_path: Path) -> None:
    (tmp_path / "o" / "empty").mkdir(parents=True)
    with pytest.raises(StageError, match="o is empty, and an artifact has at least one file"):
        store.add_folder(tmp_path / "o")


# The same key with other bytes is reported and never overwritten, except that of an observation the first wins.


def test_the_same_output_again_keeps_the_first_record(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m")
    first = store.commit(record_of(step("convert"), output))
    assert store.commit(record_of(step("convert"), output, host="there", seconds=2)) == first
    assert store.record(first.key) == first


@pytest.mark.parametrize("evicted", [False, True])
def test_another_output_of_the_same_key_is_a_conflict_and_nothing_is_overwritten(
    store: Store, tmp_path: Path, evicted: bool
) -> None:
    one, other = kept(store, tmp_path, model=b"1"), kept(store, tmp_path, model=b"2")
    first = store.commit(record_of(step("convert"), one))
    text = store.record_file(first.key).read_bytes()
    if evicted:
        store.blob(one.files[0]).unlink()
    second = record_of(step("convert"), other, host="there")
    with pytest.raises(
        NonDeterminismError, match=f"first {one.digest} on here at 2026.*, now {other.digest} on there"
    ) as raised:
        store.commit(second)
    assert store.record_file(first.key).read_bytes() == text
    (conflict,) = store.conflicts()
    assert conflict.name == f"{first.key[7:]}-{other.digest[7:]}.json"
    assert StepRecord.model_validate_json(conflict.read_bytes()) == second
    assert str(conflict) in str(raised.value)

    # The way out that the message names.
    assert f"delete {store.record_file(first.key)} to accept a new one" in str(raised.value)
    store.record_file(first.key).unlink()
    assert store.commit(second) == second


def test_of_an_observation_the_first_wins_while_its_files_are_there(store: Store, tmp_path: Path) -> None:
    seen = step("evaluate").model_copy(update={"observation": True})
    one, other = kept(store, tmp_path, figures=b"1"), kept(store, tmp_path, figures=b"2")
    first = store.commit(record_of(seen, one))
    assert store.commit(record_of(seen, other)) == first
    assert store.conflicts() == []

    store.blob(one.files[0]).unlink()
    second = record_of(seen, other)
    assert store.commit(second) == second
    assert store.record(seen.key) == second


def test_of_several_records_at_once_one_wins(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's record appears between the look and the write."""
    one, other = kept(store, tmp_path, model=b"1"), kept(store, tmp_path, model=b"2")
    first = record_of(step("convert"), one)
    real = files.write_durably
    rival = Store(store.root)

    def write(descriptor: int, content: bytes) -> None:
        real(descriptor, content)
        monkeypatch.undo()
        rival.commit(first)

    monkeypatch.setattr("modelmint.store.write_durably", write)
    with pytest.raises(NonDeterminismError, match="two different outputs"):
        store.commit(record_of(step("convert"), other))
    assert store.record(first.key) == first
