"""Stored documents of every released version stay readable: what a team wrote last year opens today.

A file here is never changed. When a document's schema version rises, a file with the new number joins the old ones.
``python tests/test_golden.py`` writes the files of the current versions where they are missing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelmint.artifact import Artifact, StepRecord
from modelmint.inspection import Inspection
from modelmint.recipe import Recipe
from modelmint.recipe_file import parse_recipe
from modelmint.release import ReleaseReport
from modelmint.release_lock import ReleaseLock
from modelmint.report import Measurements

pytestmark = pytest.mark.pure

FOLDER = Path(__file__).parent / "golden"

READERS: dict[str, Callable[[str], Any]] = {
    "artifact": Artifact.model_validate_json,
    "inspection": Inspection.model_validate_json,
    "measurements": Measurements.model_validate_json,
    "recipe": Recipe.model_validate_json,
    "release-lock": ReleaseLock.model_validate_json,
    "release-report": ReleaseReport.model_validate_json,
    "step-record": StepRecord.model_validate_json,
}
FILES = sorted(FOLDER.glob("*.json"))


def still_said(old: Any, new: Any, where: str = "") -> list[str]:
    """Where the new document lacks or contradicts something that the old one says."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [found for key, value in old.items() for found in still_said(value, new.get(key), f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [found for number, (one, two) in pairs for found in still_said(one, two, f"{where}[{number}]")]
    return [] if old == new else [where]


def document_of(path: Path) -> str:
    return path.stem.rpartition("-")[0]


def test_every_document_has_a_file_of_its_current_version():
    assert {document_of(path) for path in FILES} == set(READERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_stored_document_is_read_and_nothing_in_it_is_lost(path):
    text = path.read_text(encoding="utf-8")
    read = READERS[document_of(path)](text)
    version = json.loads(text)["schema"]
    assert path.stem.endswith(f"-{version}")
    if version == read.schema_version:
        assert still_said(json.loads(text), read.model_dump(mode="json")) == []


def test_a_recipe_as_people_wrote_it_is_read():
    recipe = parse_recipe((FOLDER / "recipe-1.yaml").read_text(encoding="utf-8"))
    assert [variant.name for variant in recipe.variants] == ["gguf:Q8_0", "gguf:Q4_K_M@outputs-q8", "gguf:Q4_0"]
    assert recipe.gates_of(recipe.variants[1])["kl_divergence"].max == 0.05
    assert "top_1_agreement" not in recipe.gates_of(recipe.variants[0])
    assert recipe.variants[2].required is False


def test_keys_and_digests_of_old_documents_have_not_moved():
    # What is stored is found by these: if one moves, every store out there is rebuilt from nothing.
    record = StepRecord.model_validate_json((FOLDER / "step-record-1.json").read_text(encoding="utf-8"))
    assert record.key == record.step.key
    assert record.key == "sha256:a8588ee479d1a4d45195b2bd56dbeabac42c0066a7315d93062203736abc59d1"
    artifact = Artifact.model_validate_json((FOLDER / "artifact-1.json").read_text(encoding="utf-8"))
    assert artifact.digest == "sha256:8991c2e0f2cb0700b2c0e4ba078450dfdcc75082ca086a88cbf66fa37b6c2a75"


def test_a_change_of_a_document_would_be_noticed():
    old = {"a": [1, {"b": 2}], "c": None}
    assert still_said(old, {"a": [1, {"b": 2, "new": 3}], "c": None}) == []
    assert still_said(old, {"a": [1, {"b": 3}], "c": None}) == [".a[1].b"]
    assert still_said(old, {"c": None}) == [".a"]


def write_missing() -> None:
    """Write the documents of the current versions that have no file yet."""
    import sample_release as sample

    report = sample.sample()
    short = report.model_copy(update={"variants": (report.variants[0], report.variants[5])})
    q4 = sample.quantizing("Q4_K_M").model_copy(
        update={"measurements": sample.measurements("Q4_K_M")[-3:], "invocation": sample.INVOCATION}
    )
    documents = {
        "artifact": sample.SNAPSHOT,
        "measurements": Measurements(
            measurements=sample.measurements("Q4_K_M"), answers=sample.ANSWERS, notes=("a note",), host=sample.HOST
        ),
        "recipe": sample.RECIPE,
        "release-lock": sample.lock(),
        "release-report": short,
        "step-record": q4,
    }
    for name, document in documents.items():
        body = document.model_dump(mode="json")
        path = FOLDER / f"{name}-{body['schema']}.json"
        if not path.exists():
            path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_missing()
