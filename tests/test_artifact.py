"""The laws of `modelmint.artifact`, under its own words."""

import hashlib
import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from modelmint.artifact import (
    CHUNK_BYTES,
    Artifact,
    Digest,
    FileEntry,
    Step,
    StepRecord,
    Tool,
    canonical_json,
    digest_of_bytes,
    digest_of_file,
)

pytestmark = pytest.mark.pure

EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
DIGESTS = st.binary(max_size=4).map(digest_of_bytes)
PATHS = st.lists(st.text(string.ascii_letters + "._-é ", min_size=1, max_size=5), min_size=1, max_size=3).map("/".join)
CLEAN_PATHS = PATHS.filter(lambda path: not {".", ".."} & set(path.split("/")))
ENTRIES = st.builds(FileEntry, path=CLEAN_PATHS, size=st.integers(0, 2**50), digest=DIGESTS)
MANIFESTS = st.lists(ENTRIES, min_size=1, max_size=5, unique_by=lambda entry: entry.path)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value: object) -> object:
    """The same value with every object's keys in the opposite order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


def test_a_digest_names_its_algorithm(tmp_path: Path) -> None:
    assert digest_of_bytes(b"") == EMPTY
    path = tmp_path / "file"
    path.write_bytes(b"x" * (2 * CHUNK_BYTES + 1))
    assert digest_of_file(path) == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    for wrong in (EMPTY[7:], "md5:" + EMPTY[7:], EMPTY.upper(), EMPTY[:-1], EMPTY + "0", EMPTY + "\n"):
        with pytest.raises(ValidationError, match="string_pattern_mismatch"):
            TypeAdapter(Digest).validate_python(wrong)


@given(MANIFESTS, st.randoms())
def test_a_manifest_is_sorted_and_its_digest_a_function_of_its_entries_alone(
    entries: list[FileEntry], random: object
) -> None:
    artifact = Artifact.of(entries)
    random.shuffle(entries)  # type: ignore[attr-defined]
    assert [entry.path for entry in artifact.files] == sorted(entry.path for entry in entries)
    assert Artifact.of(entries).digest == artifact.digest == digest_of_bytes(artifact.to_json())
    assert Artifact.model_validate_json(artifact.to_json()) == artifact
    assert artifact.size == sum(entry.size for entry in entries)


@given(MANIFESTS, st.sampled_from(["path", "size", "digest"]))
def test_a_manifests_digest_changes_with_any_entry(entries: list[FileEntry], field: str) -> None:
    first = entries[0]
    other = {"path": first.path + "x", "size": first.size + 1, "digest": digest_of_bytes(b"another")}[field]
    changed = [first.model_copy(update={field: other}), *entries[1:]]
    if len({entry.path for entry in changed}) == len(changed):
        assert Artifact.of(changed).digest != Artifact.of(entries).digest


def test_a_manifest_names_each_path_once_in_order() -> None:
    a, b = (FileEntry(path=path, size=0, digest=EMPTY) for path in "ab")
    for files in ((b, a), (a, a)):
        with pytest.raises(ValidationError, match="sorted by path, each path once"):
            Artifact(files=files)
    with pytest.raises(ValidationError, match="at least 1 item"):
        Artifact.of([])
    assert Artifact.of([b, a]).file("b") == b
    with pytest.raises(KeyError, match="c"):
        Artifact.of([a, b]).file("c")


# Frozen text: a manifest written by any version keeps its digest for ever.
def test_the_text_of_a_manifest_is_fixed() -> None:
    artifact = Artifact.of([FileEntry(path="é/model.gguf", size=3, digest=EMPTY)])
    text = f'{{"files":[{{"digest":"{EMPTY}","path":"é/model.gguf","size":3}}],"schema":1}}'
    assert artifact.to_json() == text.encode()
    assert artifact.digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "path", ["", ".", "/etc/passwd", "..", "a/../../b", "a/..", "a//b", "./a", "a/", "a\\b", "a\0b", "../out/model"]
)
def test_a_path_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="not a clean relative path"):
        FileEntry(path=path, size=0, digest=EMPTY)


@given(JSON_VALUES)
def test_canonical_json_is_one_text_for_one_value(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(shuffled(value)) == text
    assert canonical_json(json.loads(text)) == text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_canonical_json_has_no_text_for_what_is_not_finite(number: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        canonical_json({"a": [number]})


# One change of each field that can change the output; the key must see it.
@pytest.mark.parametrize(
    "change",
    [
        {"stage": "convert"},
        {"stage_version": 2},
        {"parameters": {"type": "Q4_0"}},
        {"parameters": {"type": "Q8_0", "pure": True}},
        {"inputs": {"base": digest_of_bytes(b"other")}},
        {"inputs": {"other": EMPTY}},
        {"tools": (Tool(name="llama.cpp", version="2"),)},
        {"tools": (Tool(name="llama.cpp", version="1", flags=("-O3",)),)},
        {"tools": (Tool(name="llama.cpp", version="1", source=EMPTY),)},
        {"tools": ()},
    ],
)
def test_a_steps_key_sees_all_that_can_change_its_output(change: dict[str, object]) -> None:
    step = Step(
        stage="quantize",
        stage_version=1,
        parameters={"type": "Q8_0"},
        inputs={"base": EMPTY},
        tools=(Tool(name="llama.cpp", version="1"),),
    )
    assert step.model_copy(update=change).key != step.key


def test_a_steps_key_sees_nothing_else() -> None:
    tools = (Tool(name="a", version="1"), Tool(name="b", version="2"))
    step = Step(stage="evaluate", stage_version=1, parameters={"a": 1, "b": 2}, tools=tools)
    assert Step(stage="evaluate", stage_version=1, parameters={"b": 2, "a": 1}, tools=tools[::-1]).key == step.key
    assert step.model_copy(update={"observation": True}).key == step.key


# Frozen text: a key computed anywhere, by any version, is the same key.
def test_the_text_that_a_key_is_made_of_is_fixed() -> None:
    tools = (Tool(name="b", version="2", flags=("-mavx2",)), Tool(name="a", version="1", source=EMPTY))
    step = Step(stage="quantize", stage_version=3, parameters={"type": "Q8_0"}, inputs={"base": EMPTY}, tools=tools)
    text = (
        f'{{"inputs":{{"base":"{EMPTY}"}},"parameters":{{"type":"Q8_0"}},"schema":1,"stage":"quantize","stage_version":3,'
        f'"tools":[{{"flags":[],"name":"a","source":"{EMPTY}","version":"1"}},'
        '{"flags":["-mavx2"],"name":"b","source":null,"version":"2"}]}'
    )
    assert step.key == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_a_record_is_of_its_own_step() -> None:
    step = Step(stage="convert", stage_version=1)
    record = StepRecord(key=step.key, step=step, output=EMPTY, seconds=1, finished="2026-01-01T00:00:00Z", host="h")
    assert StepRecord.model_validate_json(canonical_json(record.model_dump(mode="json"))) == record
    with pytest.raises(ValidationError, match=f"the record's key {EMPTY} is not the key of its step, {step.key}"):
        StepRecord.model_validate({**record.model_dump(), "key": EMPTY})


@pytest.mark.parametrize("value", [FileEntry, Artifact, Tool, Step, StepRecord])
def test_a_value_is_frozen_and_knows_its_fields(value: type[Step]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        value.model_validate({"unheard_of": 1})
    assert value.model_config["frozen"]
