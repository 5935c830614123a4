"""The record in MLflow, on a real SQLite database."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from recorded import MLFLOW_WARNS, context_in, renamed, stored_release

from modelmint.errors import NetworkError, StageError
from modelmint.recipe import Recipe
from modelmint.release import ReleaseReport, VariantReport
from modelmint.report import HardwareClass, Measurement, judge
from modelmint.settings import TELEMETRY_OFF
from modelmint.step import Context
from tasks import track

pytestmark = [pytest.mark.flows, MLFLOW_WARNS]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """One database for all tests of this file; each uses a recipe, and so an experiment, of its own."""
    return context_in(tmp_path_factory.mktemp("home"))


@pytest.fixture
def report(context: Context, request: pytest.FixtureRequest) -> ReleaseReport:
    name = request.node.name.removeprefix("test_").replace("_", "-").replace("[", "-").rstrip("]").lower()
    return stored_release(context, name, f"{name}-1")


@pytest.fixture(scope="module")
def client(context: Context) -> MlflowClient:
    return track._client(context.settings.tracking_uri)


def recorded(context: Context, report: ReleaseReport) -> track.TrackedRelease:
    with track.tracked(report.recipe, report.release, context) as opened:
        track.record(opened, report, context)
    return opened


def runs(client: MlflowClient, opened: track.TrackedRelease, kind: str) -> list[Run]:
    return list(client.search_runs([opened.experiment_id], f"tags.`modelmint.kind` = '{kind}'"))


def models(client: MlflowClient, opened: track.TrackedRelease) -> list[LoggedModel]:
    return list(client.search_logged_models([opened.experiment_id]))


def with_measurements(variant: VariantReport, measurements: tuple[Measurement, ...]) -> VariantReport:
    assert variant.verdict is not None
    gates = {check.measure: check.bound for check in variant.verdict.checks}
    return variant.model_copy(update={"measurements": measurements, "verdict": judge(measurements, gates)})


def test_a_release_is_a_run_with_its_settings_inputs_documents_and_models(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    opened = recorded(context, report)
    run = client.get_run(opened.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", report.release)
    assert client.get_experiment(opened.experiment_id).name == report.recipe.name
    assert run.data.params["evaluation.window"] == "512"
    assert run.data.params["variants"].startswith(
        "gguf:Q8_0, gguf:Q6_K, gguf:Q5_K_M, gguf:Q4_K_M, gguf:Q4_0 (optional)"
    )
    assert run.data.metrics["variants"] == 7
    assert run.data.metrics["variants_failed"] == 2
    assert run.data.tags["modelmint.recipe_digest"] == report.recipe.digest
    assert run.data.tags["modelmint.flow_run"] == "flow-run-1"
    assert run.data.tags["modelmint.source_revision"] == report.source.revision
    assert "| gguf:Q4_0 |" in run.data.tags["mlflow.note.content"]
    assert report.source.notice in run.data.tags["mlflow.note.content"]
    inputs = {it.tags[0].value: it.dataset for it in run.inputs.dataset_inputs}
    assert set(inputs) == {"source-model", "evaluation"}
    assert inputs["source-model"].name == "SmolLM2-135M-Instruct"
    assert report.source.revision in inputs["source-model"].source
    assert report.source.revision.removeprefix("sha256:").startswith(inputs["source-model"].digest)
    assert len(run.outputs.model_outputs) == 8
    documents = context.settings.home / "mlruns" / "artifacts" / report.recipe.name / opened.run_id / "artifacts"
    assert {path.name for path in documents.iterdir()} == {
        "report.html",
        "report.json",
        "lock.json",
        "variants.json",
    }
    assert (documents / "report.json").read_bytes() == report.to_json()
    assert len(client.search_runs([opened.experiment_id], f"dataset.name = '{report.source.model}'")) == 9


def test_a_variant_is_a_child_run_and_a_model_with_its_figures(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    opened = recorded(context, report)
    variant, base = report.variant("gguf:Q4_K_M"), report.variant("gguf:f16")
    by_digest = {model.tags["modelmint.digest"]: model for model in models(client, opened)}
    assert set(by_digest) == {it.digest for it in report.variants}
    model = by_digest[variant.digest]
    assert (model.name, model.model_type, model.status) == ("gguf-Q4_K_M", "gguf", "READY")
    assert model.tags["modelmint.artifact"] == f"modelmint:///{variant.digest.replace(':', '-')}"
    assert model.tags["modelmint.verdict"] == "passed"
    assert model.params == {
        "format": "gguf",
        "type": "Q4_K_M",
        "option.pure": "false",
        "tool.llama-cpp-python": "0.3.36",
    }
    figures = {metric.key: metric for metric in model.metrics}
    assert {key: metric.value for key, metric in figures.items()} == {m.measure: m.value for m in variant.measurements}
    assert report.evaluation is not None
    assert report.evaluation.text_digest.removeprefix("sha256:").startswith(figures["kl_divergence"].dataset_digest)
    assert figures["kl_divergence"].dataset_name == "pydoc"
    assert figures["decode_rate"].dataset_name is None
    assert "| mean KL divergence | 0.0573 | 0.0023 | nats/token | mean of 3072 |" in model.tags["mlflow.note.content"]
    run = client.get_run(model.source_run_id)
    assert (run.info.run_name, run.info.status) == ("gguf:Q4_K_M", "FINISHED")
    assert run.data.tags["mlflow.parentRunId"] == opened.run_id
    assert run.data.metrics == {m.measure: m.value for m in variant.measurements}
    assert [it.model_id for it in run.outputs.model_outputs] == [model.model_id]
    assert [it.model_id for it in run.inputs.model_inputs] == [by_digest[base.digest].model_id]


def test_a_model_is_found_again_by_the_digest_of_its_files_and_never_doubled(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    first = recorded(context, report)
    before = {model.model_id for model in models(client, first)}
    second = recorded(context, renamed(context, report, "again"))
    assert {model.model_id for model in models(client, second)} == before
    assert len(runs(client, second, "variant")) == 8
    assert len(runs(client, second, "release")) == 2
    assert {it.model_id for it in client.get_run(second.run_id).outputs.model_outputs} == before
    assert second.continues == ""


def test_threads_that_record_one_variant_make_one_model(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    opened = track.open_release(context.settings, report.recipe, report.release)
    variant = report.variant("gguf:Q8_0")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(track.track_variant, opened, variant, report.source, report.evaluation) for _ in range(4)]
        found = {job.result().model_id for job in jobs}
    track.fail_release(opened, "enough")
    assert len(found) == 1
    assert len(models(client, opened)) == 1
    assert len(runs(client, opened, "variant")) == 1


def test_new_figures_of_known_files_go_to_the_model_that_is_there(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    first = recorded(context, report)
    variant = report.variant("gguf:Q8_0")
    other = HardwareClass(instructions="x86_64 sse4_2", threads=8)
    slower = tuple(
        m.model_copy(update={"hardware": other, "value": 11.0}) if m.measure == "decode_rate" else m
        for m in variant.measurements
    )
    changed = renamed(context, report, "elsewhere").model_copy(
        update={
            "variants": tuple(
                with_measurements(it, slower) if it.variant == variant.variant else it for it in report.variants
            )
        }
    )
    second = recorded(context, changed)
    assert len(models(client, second)) == 8
    (child,) = [run for run in runs(client, second, "variant") if run.data.tags["modelmint.release"] == "elsewhere"]
    (model,) = [it for it in models(client, second) if it.tags["modelmint.digest"] == variant.digest]
    child = client.get_run(child.info.run_id)
    assert [it.model_id for it in child.inputs.model_inputs] == [model.model_id]
    assert child.outputs.model_outputs == []
    assert {metric.value for metric in model.metrics if metric.key == "decode_rate"} == {11.0, 140.0}
    for again in (report, changed):
        recorded(context, renamed(context, again, "known"))
    assert len(runs(client, first, "variant")) == 9


def test_a_verdict_that_other_gates_changed_is_told_by_the_model_without_a_new_run(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    recorded(context, report)
    variant = report.variant("gguf:Q8_0")
    assert variant.verdict is not None
    failed = variant.verdict.model_copy(update={"passed": False, "failure": "evaluate failed: too slow"})
    stricter = renamed(context, report, "stricter").model_copy(
        update={"variants": (variant.model_copy(update={"verdict": failed}),)}
    )
    opened = recorded(context, stricter)
    (model,) = [it for it in models(client, opened) if it.tags["modelmint.digest"] == variant.digest]
    assert model.tags["modelmint.verdict"] == "incomplete"
    assert model.tags["modelmint.reasons"] == "evaluate failed: too slow"
    assert len(runs(client, opened, "variant")) == 8


def test_a_stage_that_failed_leaves_failed_runs_with_the_reason_and_no_model(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    reason = "quantize failed: llama.cpp aborted with SIGABRT"
    broken = report.variant("gguf:Q4_K_M").model_copy(
        update={"digest": "", "size_bytes": 0, "files": (), "measurements": (), "verdict": judge((), {}, reason)}
    )
    variants = tuple(broken if it.variant == broken.variant else it for it in report.variants)
    opened = recorded(context, report.model_copy(update={"variants": variants}))
    assert client.get_run(opened.run_id).info.status == "FAILED"
    (child,) = [run for run in runs(client, opened, "variant") if run.info.run_name == broken.variant]
    assert child.info.status == "FAILED"
    assert child.data.tags["modelmint.reasons"] == reason
    assert len(models(client, opened)) == 7
    assert recorded(context, renamed(context, report, "repaired")).continues == report.release


def test_a_model_whose_recording_was_cut_off_is_completed(
    context: Context, client: MlflowClient, report: ReleaseReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*arguments: object) -> None:
        raise ConnectionError("cut off")

    monkeypatch.setattr(MlflowClient, "log_outputs", cut_off)
    with pytest.raises(ConnectionError, match="cut off"):
        recorded(context, report)
    monkeypatch.undo()
    opened = recorded(context, renamed(context, report, "complete"))
    assert len(models(client, opened)) == 8
    assert {model.status for model in models(client, opened)} == {"READY"}
    ended = {run.info.run_id: run.info.status for run in runs(client, opened, "variant")}
    assert sorted(ended.values()) == ["FAILED"] + ["FINISHED"] * 8
    assert opened.continues == report.release


@pytest.mark.parametrize(
    ("error", "status"),
    [(StageError("no disk left"), "FAILED"), (KeyboardInterrupt("by hand"), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_no_run_is_left_running(
    context: Context, client: MlflowClient, report: ReleaseReport, error: BaseException, status: str
) -> None:
    def stopped() -> None:
        with track.tracked(report.recipe, report.release, context) as opened:
            track._open_child(track._client(context.settings.tracking_uri), opened, {"modelmint.variant": "gguf:Q8_0"})
            raise error

    with pytest.raises(type(error), match=str(error)):
        stopped()
    again = track.open_release(context.settings, report.recipe, "again")
    ended = [*runs(client, again, "release"), *runs(client, again, "variant")]
    assert sorted(run.info.status for run in ended) == sorted([status, status, "RUNNING"])
    (first,) = [run for run in ended if run.info.run_name == report.release]
    assert first.data.tags["modelmint.failure"] == f"{type(error).__name__}: {error}"
    assert again.continues == report.release
    assert client.get_run(again.run_id).data.tags["modelmint.continues_run"] == first.info.run_id
    track.fail_release(again, "enough")


def test_a_release_that_says_nothing_at_its_end_is_failed(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    with track.tracked(report.recipe, report.release, context) as opened:
        pass
    run = client.get_run(opened.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["modelmint.failure"] == "the release ended without a report"


RELEASE = """
import sys, time
from pathlib import Path
sys.path[:0] = ["tests", "tests/tasks"]
from recorded import context_in
from modelmint.recipe import Recipe
from tasks import track
context = context_in(Path(sys.argv[1]))
recipe = Recipe.model_validate({"schema": 1, "name": sys.argv[2], "source": "fake:tiny", "variants": ["fake:int8"]})
with track.tracked(recipe, "abandoned", context):
    print("open", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def abandoned(context: Context, request: pytest.FixtureRequest) -> Iterator[tuple["subprocess.Popen[str]", Recipe]]:
    """A release in a process of its own, and its recipe."""
    name = request.node.name.removeprefix("test_").replace("_", "-")
    recipe = Recipe.model_validate({"schema": 1, "name": name, "source": "fake:tiny", "variants": ["fake:int8"]})
    command = [sys.executable, "-c", RELEASE, str(context.settings.home), name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process, recipe
        process.kill()


def test_a_release_killed_without_warning_is_closed_by_the_next_one_which_continues_it(
    context: Context, client: MlflowClient, abandoned: tuple["subprocess.Popen[str]", Recipe]
) -> None:
    process, recipe = abandoned
    beside = track.open_release(context.settings, recipe, "beside")
    (first,) = [run for run in runs(client, beside, "release") if run.info.run_name == "abandoned"]
    assert first.info.status == "RUNNING", "its process lives"
    assert beside.continues == ""
    track.fail_release(beside, "enough")
    client.delete_run(beside.run_id)
    process.kill()
    process.wait()
    after = track.open_release(context.settings, recipe, "after")
    first = client.get_run(first.info.run_id)
    assert first.info.status == "KILLED"
    assert first.data.tags["modelmint.failure"] == "its process ended without a word"
    assert (after.continues, after.continues_run) == ("abandoned", first.info.run_id)
    track.fail_release(after, "enough")


def test_a_release_told_to_end_closes_its_run(
    context: Context, client: MlflowClient, abandoned: tuple["subprocess.Popen[str]", Recipe]
) -> None:
    process, recipe = abandoned
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert time.monotonic() - started < 10
    experiment = client.get_experiment_by_name(recipe.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    assert run.data.tags["modelmint.failure"] == "SystemExit: 143"


def test_a_deleted_experiment_is_restored(context: Context, client: MlflowClient, report: ReleaseReport) -> None:
    opened = recorded(context, report)
    client.delete_experiment(opened.experiment_id)
    assert recorded(context, renamed(context, report, "again")).experiment_id == opened.experiment_id


def test_long_texts_and_many_settings_are_bounded(
    context: Context, client: MlflowClient, report: ReleaseReport
) -> None:
    base = {"gguf": {f"option_{number}": number for number in range(150)}}
    recipe = report.recipe.model_copy(update={"base": base})
    variants = tuple(it.model_copy(update={"notes": ("a tensor fell back " * 1000,)}) for it in report.variants)
    opened = recorded(context, report.model_copy(update={"recipe": recipe, "variants": variants}))
    run = client.get_run(opened.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 100
    assert run.data.params["more"].endswith("more settings stand in report.json")
    assert {len(it.data.tags["mlflow.note.content"]) for it in runs(client, opened, "variant")} == {8000}


def test_links_carry_the_parameter_that_shows_metrics(context: Context, report: ReleaseReport) -> None:
    opened = recorded(context, report)
    path = f"/#/experiments/{opened.experiment_id}/runs/{opened.run_id}?workflowType=machine_learning"
    assert track.run_url(opened) == path
    links = opened.links()
    assert (links.flow_run, links.tracking_run, links.tracking_url) == ("flow-run-1", opened.run_id, path)
    served = context.settings.model_copy(update={"tracking": "http://mlflow.example:5000/"})
    served.__dict__.pop("tracking_uri", None)
    at_server = track.TrackedRelease(served, "1", "r", "", "release")
    assert track.model_url(at_server, "m-1") == (
        "http://mlflow.example:5000/#/experiments/1/models/m-1?workflowType=machine_learning"
    )


def test_a_server_that_does_not_answer_is_named_without_its_password(
    context: Context, report: ReleaseReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = context_in(context.settings.home, "http://somebody:canary@127.0.0.1:9").settings
    with pytest.raises(
        NetworkError, match=r"MLflow at http://\*\*\*@127\.0\.0\.1:9 failed: .*MLFLOW_TRACKING_URI"
    ) as caught:
        track.open_release(settings, report.recipe, report.release)
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_telemetry_is_off_whoever_imports_it_first() -> None:
    code = "from tasks import track; from mlflow.telemetry import get_telemetry_client as it; print(it())"
    clean = {name: value for name, value in os.environ.items() if name not in TELEMETRY_OFF}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=clean, text=True) == "None\n"
