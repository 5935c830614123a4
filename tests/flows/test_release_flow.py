"""Whole releases of the made-up model: what they make, what the second one reuses, and what is on record afterwards."""

from collections import Counter

import pytest
from homes import MLFLOW_WARNS, Home, Server

from modelmint.artifact import StepRecord
from modelmint.errors import InputError, RecipeError, SourceError
from modelmint.formats.fake_model import write_checkpoint
from modelmint.release import ReleaseReport, exit_code
from modelmint.release_lock import ReleaseLock
from tasks import shown

pytestmark = [pytest.mark.flows, MLFLOW_WARNS]

SHIPPED = ["fake:Q8", "fake:Q4", {"variant": "fake:Q2", "required": False}]
"""The variants of the shipped fake recipe."""

VARIANTS = ("fake:Q8", "fake:Q4", "fake:Q2")
STEPS = Counter(
    {"acquire": 1, "inspect": 1, "text": 1, "convert": 1, "reference": 1, "quantize": 3, "evaluate": 4, "benchmark": 4}
)
"""The steps of that recipe: of the checkpoint, of the base, and of three variants."""

PINNED = "fake:tiny@sha256:8d807b30bd43a2d0a00df52a3e668a37e91368884645a9f1d2746eefadbb1d74"
REUSABLE = {
    f"acquire {PINNED}",
    f"inspect {PINNED}",
    "acquire text pydoc",
    "convert fake",
    "reference source",
    *(f"quantize {name}" for name in VARIANTS),
    *(f"evaluate {name}" for name in ("fake:F32", *VARIANTS)),
    "benchmark side by side",
}
"""The task runs of that recipe that do a step."""

ALWAYS = {"resolve fake:tiny", f"preview {PINNED}", "judge and report"}
"""Those that are cheap or look at what others have done: they run every time."""


@pytest.fixture(scope="module")
def first(home: Home) -> ReleaseReport:
    """The shipped recipe for the first time, its progress shown however quickly a stage ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "ARTIFACT_SECONDS", 0.0)
        return home.release("fake")


@pytest.fixture(scope="module")
def second(home: Home, first: ReleaseReport) -> ReleaseReport:
    """The same once more."""
    return home.release("fake")


@pytest.fixture(scope="module")
def third(home: Home, second: ReleaseReport) -> ReleaseReport:
    """The same with one more variant."""
    return home.release(home.recipe([*SHIPPED, "fake:Q3"]))


@pytest.fixture(scope="module")
def broken(home: Home, third: ReleaseReport) -> ReleaseReport:
    """A recipe of its own, where stages of required variants fail, and a required variant fails its gates besides."""
    failing = [
        {"variant": f"fake:Q4@no-{stage}", "options": {"fail": stage}} for stage in ("quantize", "crash", "evaluate")
    ]
    return home.release(home.recipe(["fake:Q8", *failing, "fake:Q2"], name="broken"))


def executed(home: Home, report: ReleaseReport) -> list[StepRecord]:
    """The steps that a release did itself, as their records tell it."""
    return [record for record in home.records() if record.invocation.release == report.release]


def test_every_variant_is_made_measured_and_judged(home: Home, first: ReleaseReport) -> None:
    assert {it.variant: it.outcome for it in first.variants} == {
        "fake:F32": "base",
        "fake:Q8": "passed",
        "fake:Q4": "passed",
        "fake:Q2": "failed",
    }
    assert exit_code(first) == 0, "two bits fail, but are not required"
    (reason,) = [it for it in first.variant("fake:Q2").reasons if "KL divergence" in it]
    assert "above the gate's 0.15" in reason
    for variant in first.variants:
        assert home.store.holds(home.store.artifact(variant.digest))
        taken = {measurement.measure for measurement in variant.measurements}
        assert {"kl_divergence", "conversion_kl", "size", "decode_rate", "decode_speedup"} <= taken
    assert Counter(record.step.stage for record in executed(home, first)) == STEPS
    assert (first.step_count.executed, first.step_count.reused) == (STEPS.total(), 0)


def test_report_page_and_lock_lie_in_the_store(home: Home, first: ReleaseReport) -> None:
    folder = home.store.root / "releases" / first.release
    assert {path.name for path in folder.iterdir()} == {"lock.json", "report.html", "report.json"}
    assert ReleaseReport.model_validate_json((folder / "report.json").read_bytes()) == first
    assert all(name in (folder / "report.html").read_text() for name in VARIANTS)
    lock = ReleaseLock.model_validate_json((folder / "lock.json").read_bytes())
    assert lock.source == first.source.reference == PINNED
    assert lock.variants == {it.variant: it.digest for it in first.judged}
    assert {step.key for step in lock.steps} == {record.key for record in executed(home, first)}


def test_every_task_run_is_in_the_servers_database_under_its_variants_name(
    server: Server, first: ReleaseReport
) -> None:
    assert server.task_runs(first) == dict.fromkeys(REUSABLE | ALWAYS, "Completed")
    flow_run = server.flow_run(first)
    assert (flow_run["name"], flow_run["state"]["type"]) == ("fake", "COMPLETED")
    assert flow_run["state"]["message"] == "2 of 3 variants pass"


def test_the_user_interface_shows_table_verdicts_page_and_progress(server: Server, first: ReleaseReport) -> None:
    artifacts = {it["key"] or it["description"].partition(":")[0]: it for it in server.artifacts(first)}
    assert artifacts["fake-variants"]["type"] == "table"
    assert "fake:Q8" in artifacts["fake-variants"]["data"]
    assert artifacts["fake-verdicts"]["type"] == "markdown"
    assert "- **fake:Q2** failed" in artifacts["fake-verdicts"]["data"]
    assert first.release in artifacts["fake-page"]["data"]
    progress = {name for name, it in artifacts.items() if it["type"] == "progress"}
    assert {"acquire", "benchmark"} <= progress
    assert {artifacts[name]["data"] for name in progress} == {100.0}


def test_a_second_release_executes_nothing_shows_it_as_cached_and_locks_the_same_bytes(
    home: Home, server: Server, first: ReleaseReport, second: ReleaseReport
) -> None:
    assert (second.step_count.executed, second.step_count.reused) == (0, STEPS.total())
    assert executed(home, second) == []
    assert server.task_runs(second) == dict.fromkeys(REUSABLE, "Cached") | dict.fromkeys(ALWAYS, "Completed")
    locks = [home.store.root / "releases" / it.release / "lock.json" for it in (first, second)]
    assert locks[0].read_bytes() == locks[1].read_bytes()
    assert [it.measurements for it in first.variants] == [it.measurements for it in second.variants]


def test_one_more_variant_executes_its_own_steps_only(home: Home, server: Server, third: ReleaseReport) -> None:
    done = executed(home, third)
    assert Counter(record.step.stage for record in done) == {"quantize": 1, "evaluate": 1, "benchmark": 1}
    digest = third.variant("fake:Q3").digest
    (made,) = [record for record in done if record.step.stage == "quantize"]
    assert made.output == digest
    assert all(digest in record.step.inputs.values() for record in done if record is not made)
    assert third.step_count.executed == 3
    states = server.task_runs(third)
    new = {"quantize fake:Q3", "evaluate fake:Q3", "benchmark side by side"}
    assert {name for name, state in states.items() if state == "Completed"} == ALWAYS | new
    assert {name for name, state in states.items() if state == "Cached"} == REUSABLE - new


def test_the_record_has_a_run_for_each_release_and_a_run_and_a_model_for_each_variant_once(
    home: Home, first: ReleaseReport, second: ReleaseReport, third: ReleaseReport
) -> None:
    releases = home.runs()
    assert [run.info.run_name for run in releases] == [first.release, second.release, third.release]
    assert {run.info.status for run in releases} == {"FINISHED"}
    assert [run.info.run_id for run in releases] == [it.links.tracking_run for it in (first, second, third)]
    children = [(run.info.run_name, run.data.tags["mlflow.parentRunId"]) for run in home.runs("variant")]
    parent, later = releases[0].info.run_id, releases[2].info.run_id
    assert sorted(children) == sorted([*((name, parent) for name in ("fake:F32", *VARIANTS)), ("fake:Q3", later)])
    models = {model.tags["modelmint.digest"]: model for model in home.models()}
    assert len(home.models()) == 5
    assert set(models) == {it.digest for it in third.variants}
    for variant in third.variants:
        figures = {metric.key: metric for metric in models[variant.digest].metrics}
        assert {name: it.value for name, it in figures.items()} == {it.measure: it.value for it in variant.measurements}
        assert {it.model_id for it in figures.values()} == {models[variant.digest].model_id}


def test_a_required_variant_that_fails_a_gate_gives_exit_code_3(
    home: Home, server: Server, third: ReleaseReport
) -> None:
    report = home.release(home.recipe(["fake:Q8", "fake:Q2"], name="stricter"))
    assert exit_code(report) == 3
    assert server.flow_run(report)["state"]["type"] == "FAILED"
    assert [run.info.status for run in home.runs(recipe="stricter")] == ["FINISHED"], "a refusal is a result"


def test_a_stage_that_fails_gives_exit_code_4_and_leaves_the_other_variants_alone(
    server: Server, broken: ReleaseReport
) -> None:
    assert exit_code(broken) == 4, "a stage beats the gate that two bits fail"
    assert {it.variant: it.outcome for it in broken.judged} == {
        "fake:Q8": "passed",
        "fake:Q4@no-quantize": "incomplete",
        "fake:Q4@no-crash": "incomplete",
        "fake:Q4@no-evaluate": "incomplete",
        "fake:Q2": "failed",
    }
    reasons = {it.variant: it.reasons[0] for it in broken.judged if it.outcome == "incomplete"}
    assert "quantize failed: the quantization failed" in reasons["fake:Q4@no-quantize"]
    assert "SIGABRT" in reasons["fake:Q4@no-crash"]
    assert reasons["fake:Q4@no-evaluate"].startswith("evaluate failed: ")
    states = server.task_runs(broken)
    for stage in ("quantize", "crash"):
        assert states[f"quantize fake:Q4@no-{stage}"] == "Failed"
        (left_out,) = [state for name, state in states.items() if name.startswith(f"evaluate fake:Q4@no-{stage}-")]
        assert left_out == "NotReady"
    assert states["evaluate fake:Q4@no-evaluate"] == "Failed"
    assert states["evaluate fake:Q2"] in ("Completed", "Cached")
    assert server.flow_run(broken)["state"]["type"] == "FAILED"


def test_a_release_with_a_failed_stage_is_failed_on_record_and_named_by_the_next(
    home: Home, broken: ReleaseReport
) -> None:
    (run,) = home.runs(recipe="broken")
    assert run.info.status == "FAILED"
    children = {it.info.run_name: it.info.status for it in home.runs("variant", "broken")}
    assert {name for name, status in children.items() if status == "FAILED"} == {
        f"fake:Q4@no-{stage}" for stage in ("quantize", "crash", "evaluate")
    }
    again = home.release(home.recipe(["fake:Q8"], name="broken"))
    assert again.continues == broken.release
    assert exit_code(again) == 0


def test_a_base_that_fails_takes_its_variants_along_and_is_reported_all_the_same(
    home: Home, server: Server, third: ReleaseReport
) -> None:
    report = home.release(home.recipe(SHIPPED, name="baseless", base={"fake": {"fail": True}}))
    assert exit_code(report) == 4
    assert {it.variant: it.outcome for it in report.judged} == dict.fromkeys(VARIANTS, "incomplete")
    for variant in report.judged:
        assert variant.reasons[0].startswith("convert failed: the conversion failed")
    states = {name.rpartition("-")[0]: state for name, state in server.task_runs(report).items()}
    left_out = {f"{stage} {name}" for stage in ("quantize", "evaluate") for name in VARIANTS} | {"evaluate fake:F32"}
    assert {name for name, state in states.items() if state == "NotReady"} == left_out
    assert (home.store.root / "releases" / report.release / "lock.json").exists()


def test_an_unknown_recipe_or_variant_is_refused_before_anything_is_recorded(home: Home, third: ReleaseReport) -> None:
    before = len(home.runs())
    with pytest.raises(RecipeError, match=r"no recipe is called 'fakee'; did you mean 'fake'\?"):
        home.release("fakee")
    with pytest.raises(RecipeError, match=r"recipe fake has no variant 'fake:Q7'; did you mean 'fake:Q"):
        home.release("fake", ["fake:Q7"])
    with pytest.raises(RecipeError, match=r"unknown type 'Q9'"):
        home.release(home.recipe(["fake:Q9"]))
    assert len(home.runs()) == before


def test_a_licence_that_the_recipe_does_not_allow_is_refused(home: Home) -> None:
    with pytest.raises(SourceError, match=r"has the licence 'apache-2.0', and the recipe allows mit"):
        home.release(home.recipe(["fake:Q8"], name="licence", licenses=["mit"]))
    (run,) = home.runs(recipe="licence")
    assert run.info.status == "FAILED"
    assert "the recipe allows mit" in run.data.tags["modelmint.failure"]


def test_a_source_that_was_quantized_before_is_refused(home: Home) -> None:
    checkpoint = home.folder / "quantized"
    checkpoint.mkdir()
    write_checkpoint("tiny", checkpoint)
    (checkpoint / "README.md").write_text("---\nlicense: mit\nbase_model_relation: quantized\n---\n")
    recipe = home.recipe(["fake:Q8"], name="quantized", source=f"file:{checkpoint}")
    with pytest.raises(InputError, match=r"was quantized before: its card says .* write quantized_source: accept"):
        home.release(recipe)
    assert [run.info.status for run in home.runs(recipe="quantized")] == ["FAILED"]


def test_nothing_is_left_running(home: Home, server: Server, broken: ReleaseReport) -> None:
    home.release(home.recipe(SHIPPED, name="last"))
    experiments = [it.experiment_id for it in home.mlflow.search_experiments()]
    assert list(home.mlflow.search_runs(experiments, "attributes.status = 'RUNNING'")) == []
    runs = home.mlflow.search_runs(experiments, "tags.`modelmint.kind` = 'release'")
    flow_runs = {"id": {"any_": [run.data.tags["modelmint.flow_run"] for run in runs]}}
    assert len(flow_runs["id"]["any_"]) >= 8
    still = {"state": {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED"]}}}
    assert server.post("flow_runs/filter", {"flow_runs": {**flow_runs, **still}}) == []
    waiting = server.post("task_runs/filter", {"flow_runs": flow_runs, "task_runs": still})
    # Prefect keeps those that never began as pending.
    assert [run["name"] for run in waiting if run["state"]["name"] != "NotReady"] == []
