"""Commands about what is kept: releases shown and compared, the store listed, checked and cleaned, and exports."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import sample_release
from cli import CommandLine, command
from stored import damage, kept, record_of

from flows.export import export
from flows.stored import find_digest, find_release, lineage, read_report, release_names
from modelmint.artifact import Artifact, Step
from modelmint.errors import CorruptError, InputError
from modelmint.release import ReleaseReport
from modelmint.report import Verdict
from modelmint.store import Store

__all__ = ["command"]
pytestmark = pytest.mark.pure

MADE = "gguf:Q8_0"


@dataclass(frozen=True)
class Kept:
    """A store with two releases, of one variant of which there are files."""

    store: Store
    report: ReleaseReport
    made: Artifact


@pytest.fixture
def releases(command: CommandLine, tmp_path: Path) -> Kept:
    store = Store(command.home / "store")
    base = kept(store, tmp_path, **{"model.gguf": b"base"})
    made = kept(store, tmp_path, **{"model.gguf": b"variant"})
    converted = Step(
        stage="convert", stage_version=1, parameters={"format": "gguf"}, inputs={"source": "sha256:" + "5" * 64}
    )
    quantized = Step(
        stage="quantize",
        stage_version=1,
        parameters={"format": "gguf", "type": "Q8_0"},
        inputs={"base": base.digest},
    )
    for step, output in ((converted, base), (quantized, made)):
        store.commit(record_of(step, output))
    report = sample_release.sample()
    variants = tuple(
        v.model_copy(update={"digest": made.digest, "files": ("SmolLM2-Q8_0.gguf",)} if v.variant == MADE else {})
        for v in report.variants
    )
    for name in ("smollm2-1", "smollm2-2"):
        report = report.model_copy(update={"release": name, "variants": variants})
        store.write_release(name, {"report.json": report.to_json(), "lock.json": sample_release.lock().to_json()})
    return Kept(store, report, made)


# Finding.


def test_a_release_is_found_by_its_name_its_beginning_or_as_the_latest(releases: Kept) -> None:
    assert release_names(releases.store) == ["smollm2-2", "smollm2-1"]
    assert find_release(releases.store) == find_release(releases.store, "latest") == "smollm2-2"
    assert find_release(releases.store, "smollm2") == "smollm2-2"
    assert find_release(releases.store, "smollm2-1") == "smollm2-1"
    with pytest.raises(InputError, match="did you mean 'smollm2-1'"):
        find_release(releases.store, "smollm3-1")


def test_a_store_without_releases_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="modelmint release RECIPE"):
        find_release(Store(tmp_path / "store"))


def test_a_report_that_cannot_be_read_is_no_report(releases: Kept) -> None:
    path = releases.store.root / "releases" / "smollm2-2" / "report.json"
    path.chmod(0o644)
    path.write_text('{"schema": 1}')
    with pytest.raises(CorruptError, match="is no report that this version of modelmint reads"):
        read_report(releases.store)


def test_an_artifact_is_found_by_digest_beginning_or_variant(releases: Kept) -> None:
    digest = releases.made.digest
    for text in (digest, digest[:20], digest.removeprefix("sha256:")[:8], MADE):
        assert find_digest(releases.store, text) == digest
    with pytest.raises(InputError, match="has no artifact 'sha256:0000000'"):
        find_digest(releases.store, "sha256:0000000")
    with pytest.raises(InputError, match="has made no variant 'gguf:Q8_1'; did you mean 'gguf:Q8_0'"):
        find_digest(releases.store, "gguf:Q8_1")


def test_the_lineage_of_a_variant_leads_to_its_checkpoint(releases: Kept) -> None:
    found = lineage(releases.store, releases.made.digest)
    assert (found.format, found.name, found.source) == ("gguf", "gguf:Q8_0", "sha256:" + "5" * 64)
    of_base = lineage(releases.store, found.base)
    assert (of_base.base, of_base.source) == (found.base, found.source)


def test_what_is_no_variant_has_no_lineage(releases: Kept, tmp_path: Path) -> None:
    other = kept(releases.store, tmp_path, text=b"text")
    with pytest.raises(InputError, match="is no variant whose steps are in"):
        lineage(releases.store, other.digest)


# Looking.


def test_show_prints_the_latest_release_again(command: CommandLine, releases: Kept) -> None:
    assert "smollm2-2" in command("show").out
    assert "gguf:Q4_K_M" in command("show", "smollm2-1").out
    assert ReleaseReport.model_validate(command("show", "--json").object) == releases.report


def test_compare_holds_later_releases_against_the_first(command: CommandLine, releases: Kept) -> None:
    rows = command("compare", "smollm2-1", "latest", "--json").object["rows"]
    assert {(row["before"], row["after"]) for row in rows} == {("smollm2-1", "smollm2-2")}
    assert {change["judgement"] for row in rows for change in row["changes"]} == {"same"}
    assert "against smollm2-1" in command("compare", "smollm2-1", "smollm2-2").out


def test_compare_needs_two_releases(command: CommandLine, releases: Kept) -> None:
    answer = command("compare", "smollm2-2", "latest")
    assert answer.code == 1
    assert "needs two releases" in answer.err


# The store.


def test_ls_lists_results_with_the_releases_that_need_them(command: CommandLine, releases: Kept) -> None:
    rows = command("store", "ls", "--json").object["results"]
    assert {row["stage"]: row["digest"] for row in rows}["quantize"] == releases.made.digest
    assert releases.made.digest[:19] in command("store", "ls").out


def test_ls_of_nothing_says_so(command: CommandLine) -> None:
    assert "holds nothing yet" in command("store", "ls").err
    assert command("store", "ls", "--json").object["results"] == []


def test_verify_leaves_with_5_where_a_file_is_damaged_and_repairs_it_when_told(
    command: CommandLine, releases: Kept
) -> None:
    assert command("store", "verify").code == 0
    damage(releases.store.blob(releases.made.files[0]))
    answer = command("store", "verify", "--json")
    assert answer.code == 5
    assert [damage["path"] for damage in answer.object["damaged"]] == [
        releases.store.inside(releases.store.blob(releases.made.files[0]))
    ]
    assert "damaged: blobs/" in command("store", "verify").out
    assert command("store", "verify", "--repair").code == 0
    assert "1 steps lack files" in command("store", "verify").out


def test_gc_says_what_it_would_free_before_it_does(command: CommandLine, releases: Kept) -> None:
    planned = command("store", "gc", "--dry-run", "--json").object
    assert planned["size"] > 0
    assert planned["freed"] == 0
    assert releases.store.holds(releases.made)
    assert "would free" in command("store", "gc", "--dry-run").out
    assert command("store", "gc", "--json").object["freed"] == planned["size"]
    assert not releases.store.holds(releases.made)
    assert set(planned["kept"]) == {"smollm2-1", "smollm2-2"}


def test_path_says_where_files_lie(command: CommandLine, releases: Kept) -> None:
    (file,) = command("store", "path", MADE, "--json").object["files"]
    assert Path(file["path"]).read_bytes() == b"variant"
    assert command("store", "path", releases.made.digest).out == f"{file['path']}\n"


# Export.


def test_export_writes_what_passed_under_its_own_name(command: CommandLine, releases: Kept, tmp_path: Path) -> None:
    _only(releases, MADE)
    files = command("export", "--to", "out", "--json").object["files"]
    assert files == ["out/SmolLM2-Q8_0.gguf"]
    assert (tmp_path / "out" / "SmolLM2-Q8_0.gguf").read_bytes() == b"variant"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["SmolLM2-Q8_0.gguf"]


def test_export_leaves_out_what_failed_unless_it_is_asked_for(releases: Kept, tmp_path: Path) -> None:
    report = _only(releases, MADE, passed=False)
    assert export(releases.store, report, tmp_path / "out") == []
    assert [path.name for path in export(releases.store, report, tmp_path / "out", failed_as_well=True)] == [
        "SmolLM2-Q8_0.gguf"
    ]


def test_export_of_a_damaged_file_leaves_what_was_there(releases: Kept, tmp_path: Path) -> None:
    report = _only(releases, MADE)
    target = tmp_path / "out" / "SmolLM2-Q8_0.gguf"
    target.parent.mkdir()
    target.write_bytes(b"an earlier one")
    damage(releases.store.blob(releases.made.files[0]))
    with pytest.raises(CorruptError, match="is damaged in the store"):
        export(releases.store, report, target.parent)
    assert target.read_bytes() == b"an earlier one"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_export_to_something_that_is_no_folder_is_bad_input(releases: Kept, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give another folder"):
        export(releases.store, _only(releases, MADE), tmp_path / "file")


def _only(releases: Kept, name: str, *, passed: bool = True) -> ReleaseReport:
    """The latest release, written again with one variant."""
    variant = releases.report.variant(name).model_copy(update={"verdict": Verdict(passed=passed, checks=())})
    report = releases.report.model_copy(update={"variants": (variant,)})
    releases.store.write_release("smollm2-2", {"report.json": report.to_json()})
    return report
