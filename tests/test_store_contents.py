"""What the store hands out is whole or refused; releases; and scratch space."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from crashing import left_in_tmp, step
from stored import NOBODY, damage, folder_of, kept, record_of

from modelmint import files
from modelmint.artifact import digest_of_bytes
from modelmint.errors import CorruptError, ResourceError
from modelmint.store import Store

pytestmark = pytest.mark.pure


# What is handed to a tool has the bytes that its digest promises, or a CorruptError is raised and the blob evicted.


def test_materialized_files_are_the_artifacts_and_no_links(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, **{"model": b"m", "tokenizer/vocabulary": b"v"})
    folder = store.materialize(output.digest, tmp_path / "deep" / "input")
    assert (folder / "model").read_bytes() == b"m"
    assert (folder / "tokenizer/vocabulary").read_bytes() == b"v"
    (folder / "model").write_bytes(b"a tool may write here")
    assert store.read(output.digest, "model") == b"m"
    assert store.blob(output.file("model")).stat().st_nlink == 1


def test_only_the_wanted_files_are_materialized(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m", card=b"c")
    store.materialize(output.digest, tmp_path / "input", only=("card",))
    assert [path.name for path in (tmp_path / "input").iterdir()] == ["card"]
    with pytest.raises(KeyError, match="absent"):
        store.materialize(output.digest, tmp_path / "other", only=("absent",))
    with pytest.raises(FileExistsError, match="card"):
        store.materialize(output.digest, tmp_path / "input")


@pytest.mark.parametrize("reflinks", [True, False])
def test_what_does_not_match_its_digest_is_evicted_and_never_handed_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reflinks: bool
) -> None:
    """The reflink of this test is a copy by other means: its result must be hashed like any other."""
    asked = []

    def ioctl(writer: int, request: int, reader: int) -> int:
        asked.append(request)
        if not reflinks:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        os.sendfile(writer, reader, 0, 1 << 20)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    output = kept(store, tmp_path, model=b"model")
    entry = output.files[0]
    folder = store.materialize(output.digest, tmp_path / "good")
    assert (folder / "model").read_bytes() == b"model"

    damage(store.blob(entry))
    found = digest_of_bytes(store.blob(entry).read_bytes())
    message = f"model of artifact {output.digest} is damaged in the store: expected {entry.digest}, found {found}"
    with pytest.raises(CorruptError, match=message):
        store.materialize(output.digest, tmp_path / "bad")
    assert not store.blob(entry).exists()
    assert list((tmp_path / "bad").iterdir()) == []
    with pytest.raises(CorruptError, match=f"model of artifact {output.digest} is missing"):
        store.materialize(output.digest, tmp_path / "gone")
    assert set(asked) == {0x40049409}


def test_reading_one_file_verifies_it_too(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, card=b"words")
    blob = store.blob(output.files[0])
    damage(blob)
    with pytest.raises(CorruptError, match=r"card of artifact .* is damaged"):
        store.read(output.digest, "card")
    assert not blob.exists()
    with pytest.raises(CorruptError, match=r"card of artifact .* is missing"):
        store.read(output.digest, "card")
    with pytest.raises(KeyError, match="absent"):
        store.read(output.digest, "absent")


def test_a_reflink_that_fails_for_want_of_space_is_no_reason_to_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ioctl(*arguments: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(OSError, match="No space left"):
        files.copy_and_hash(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_damaged_manifest_is_evicted(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m")
    damage(store.manifest(output.digest))
    with pytest.raises(CorruptError, match=f"the manifest of artifact {output.digest} is damaged"):
        store.artifact(output.digest)
    with pytest.raises(CorruptError, match=f"has no artifact {output.digest}"):
        store.artifact(output.digest)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../../etc/passwd", NOBODY[7:], NOBODY + "/x", "md5:" + NOBODY[7:]]
)
def test_no_digest_reaches_another_path(store: Store, digest: str) -> None:
    with pytest.raises(ValueError, match="not a digest of the form"):
        store.artifact(digest)
    with pytest.raises(ValueError, match="not a digest of the form"):
        store.record(digest)


# Releases, scratch space, and a store that cannot be made.


def test_a_release_is_complete_when_its_lock_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    real = Store._write

    def write(self: Store, final: Path, content: bytes, **named: Any) -> bool:
        written.append(final.name)
        return real(self, final, content, **named)

    monkeypatch.setattr(Store, "_write", write)
    folder = store.write_release("smol-1", {"lock.json": b"{}", "report.json": b"r", "report.html": b"<p>"})
    assert folder == store.root / "releases" / "smol-1"
    assert written == ["report.html", "report.json", "lock.json"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "lock.json": b"{}",
        "report.json": b"r",
        "report.html": b"<p>",
    }


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/a", "a b", "a\n"])
def test_a_release_has_a_plain_name(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="not a plain name"):
        store.write_release(name, {"lock.json": b"{}"})
    with pytest.raises(ValueError, match="not a plain name"):
        store.write_release("a", {name: b"{}"})


def test_a_workspace_is_fresh_and_removed_whatever_happens(store: Store) -> None:
    with store.workspace(NOBODY) as one, store.workspace(NOBODY) as two:
        assert one != two
        assert list(one.iterdir()) == list(two.iterdir()) == []
        folder_of(one, file=b"x")

    def fail() -> None:
        with store.workspace(NOBODY) as place:
            folder_of(place / "deep", file=b"x")
            raise RuntimeError("tool")

    with pytest.raises(RuntimeError, match="tool"):
        fail()
    assert left_in_tmp(store) == []


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_uses_is_not(store: Store) -> None:
    with store.workspace(NOBODY) as place:
        folder_of(place, file=b"x")
        folder_of(store.root / "tmp" / "dead-folder", file=b"x")
        (store.root / "tmp" / "dead-folder.owner").touch()
        (store.root / "tmp" / "dead-owner.owner").touch()
        (store.root / "tmp" / "dead-file").touch()
        assert len(store.scratch.abandoned()) == 4
        with Store(store.root).workspace(NOBODY):
            assert (place / "file").exists()
            assert [path for path in left_in_tmp(store) if path.name.startswith("dead")] == []
    assert left_in_tmp(store) == []


def test_a_workspace_that_cannot_be_removed_now_does_not_spoil_the_result(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rmtree(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patched, store.workspace(NOBODY):
        patched.setattr("shutil.rmtree", rmtree)
    assert "is left for the next sweep" in caplog.text
    with Store(store.root).workspace(NOBODY):
        pass
    assert left_in_tmp(store) == []


def test_a_store_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(ResourceError, match=r"cannot be made in .*/file/store: File exists; set MODELMINT_STORE"),
        Store(tmp_path / "file" / "store").workspace(NOBODY),
    ):
        pass


def test_documents_are_what_other_tools_can_read(store: Store, tmp_path: Path) -> None:
    output = kept(store, tmp_path, model=b"m")
    record = store.commit(record_of(step("convert"), output))
    assert json.loads(store.record_file(record.key).read_bytes())["output"] == output.digest
    assert json.loads(store.manifest(output.digest).read_bytes())["files"][0]["path"] == "model"
