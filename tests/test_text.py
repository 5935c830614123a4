"""Evaluation texts: the same bytes for everybody, whatever they came from."""

import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hub_server import HubServer, hub

from modelmint.errors import NetworkError, SourceError, UnsupportedError
from modelmint.recipe import DatasetRef
from modelmint.settings import Settings
from modelmint.step import Context
from modelmint.text import FILE, MAX_TEXT_BYTES, acquire_text

__all__ = ["hub"]
pytestmark = pytest.mark.pure


def text_of(ref: DatasetRef, context: Context) -> str:
    return context.store.read(acquire_text(ref, context).record.output, FILE).decode()


def test_the_topics_of_python_are_a_text_that_needs_no_download(context: Context) -> None:
    first = acquire_text(DatasetRef(), context)
    text = context.store.read(first.record.output, FILE).decode()
    assert len(text) > 300_000
    assert text.startswith('The "assert" statement')
    assert "\r" not in text
    assert first.record.step.parameters == {"source": "pydoc", "python": platform.python_version()}
    assert acquire_text(DatasetRef(), context).reused


def test_a_file_is_pinned_by_its_contents_not_by_its_path(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffZwölf\r\nBoxkämpfer\rjagen\n".encode())
    (tmp_path / "b.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    first = acquire_text(DatasetRef(source=f"file:{tmp_path / 'a.txt'}"), context)
    assert context.store.read(first.record.output, FILE).decode() == "Zwölf\nBoxkämpfer\njagen\n"
    assert acquire_text(DatasetRef(source=f"file:{tmp_path / 'b.txt'}"), context).reused
    assert str(tmp_path) not in first.record.model_dump_json()
    (tmp_path / "b.txt").write_text("another")
    assert not acquire_text(DatasetRef(source=f"file:{tmp_path / 'b.txt'}"), context).reused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", r"is no UTF-8 \(at byte 0\); convert it"),
        (b"a\0b", "is no text: it has NUL characters"),
        (b" \n\n", "is empty; name a text"),
    ],
)
def test_what_is_no_text_is_refused(context: Context, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SourceError, match=rf"a\.txt {message}"):
        acquire_text(DatasetRef(source=f"file:{tmp_path / 'a.txt'}"), context)
    assert list(context.store.records()) == []


def test_a_missing_file_a_folder_and_a_huge_file_are_named(context: Context, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing\.txt does not exist; name a text file"):
        acquire_text(DatasetRef(source=f"file:{tmp_path / 'nothing.txt'}"), context)
    with pytest.raises(SourceError, match="is a folder; name a text file"):
        acquire_text(DatasetRef(source=f"file:{tmp_path}"), context)
    with (tmp_path / "huge.txt").open("wb") as stream:
        stream.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(SourceError, match=f"has {MAX_TEXT_BYTES + 1} bytes, and at most .* cut it"):
        acquire_text(DatasetRef(source=f"file:{tmp_path / 'huge.txt'}"), context)


def test_a_dataset_without_its_extra_says_what_to_install(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelmint.text.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'modelmint\[datasets\]'; or name a text file"):
        acquire_text(DatasetRef(source="hf:acme/text"), context)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the library of datasets that keeps what it was asked; the real one needs the real Hub."""
    asked: list[dict[str, Any]] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        asked.append({"name": name, "config": config, **options})
        if name == "acme/empty":
            raise FileNotFoundError("No (supported) data files found in acme/empty")
        if name == "acme/offline":
            raise ConnectionError("the line is dead")
        if options["split"] == "nothing":
            raise ValueError("Bad split: nothing. Available splits: ['test']")
        return [
            {"text": " \n"},
            {"text": " = Title = \n"},
            {"text": ""},
            {"text": "Körper"},
            {"text": "x" * (17 << 20)},
            {},
        ]

    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("modelmint.text.importlib.util.find_spec", lambda name: module)
    return asked


def test_a_dataset_is_pinned_by_its_commit(
    context: Context, hub: HubServer, tmp_path: Path, library: list[dict[str, Any]]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("a dataset")
    commit = hub.publish("datasets/acme/text", tmp_path / "data")
    settings = Settings.model_validate(
        {"home": tmp_path, "host_lock": tmp_path / "host", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
    )
    told = Context(context.store, settings)
    ref = DatasetRef(source="hf:acme/text", config="raw")
    result = acquire_text(ref, told)
    assert context.store.read(result.record.output, FILE).decode().startswith(" = Title = \n\nKörper\n\nxxx")
    assert result.record.step.parameters["source"] == f"hf:acme/text@{commit}"
    assert library == [
        {
            "name": "acme/text",
            "config": "raw",
            "split": "test",
            "revision": commit,
            "streaming": True,
            "token": hub.token,
        }
    ]
    assert acquire_text(ref, told).reused
    with pytest.raises(SourceError, match=r"Available splits: \['test'\]; correct config or split"):
        acquire_text(DatasetRef(source="hf:acme/text", split="nothing"), told)
    with pytest.raises(SourceError, match="there is no text in column 'body'; set column"):
        acquire_text(DatasetRef(source="hf:acme/text", column="body"), told)
    hub.publish("datasets/acme/empty", tmp_path / "data")
    with pytest.raises(SourceError, match=r"data files found in acme/empty; use a dataset with files of text"):
        acquire_text(DatasetRef(source="hf:acme/empty"), told)
    hub.publish("datasets/acme/offline", tmp_path / "data")
    with pytest.raises(NetworkError, match=r"no connection to .*the line is dead"):
        acquire_text(DatasetRef(source="hf:acme/offline"), told)
    with pytest.raises(SourceError, match="no such repository"):
        acquire_text(DatasetRef(source="hf:acme/nothing"), told)
