"""The record in MLflow: an experiment per recipe, a run per release, a child run and a model per variant.

Laws, tested under the same words:

* a model is found again by the digest of its files and never doubled;
* a release that learned nothing new adds its own run only, which points to the models it found;
* no run is left running by a release that ended, however it ended: the next one of its recipe closes what was killed.

Every call names its run, because tasks work in threads, which share no active run. The tracking URI is always given,
because MLflow's own default depends on what lies in the working folder. It is one long file because it is the only one,
besides the plugin for files, that imports mlflow.
"""

import json
import logging
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelmint import locks
from modelmint.artifact import canonical_json, digest_of_bytes
from modelmint.errors import NetworkError, StageError
from modelmint.recipe import Recipe
from modelmint.release import EvaluationReport, Links, ReleaseReport, SourceReport, VariantReport, exit_code
from modelmint.settings import Settings, silence_telemetry
from modelmint.step import Context
from modelmint.store import Store
from tasks.notes import (
    NOTE,
    experiment_note,
    recipe_settings,
    release_facts,
    release_figures,
    release_table,
    source_facts,
    variant_facts,
    variant_settings,
)
from tasks.processes import is_dead, this_process, unwound_by_sigterm

# MLflow decides about its telemetry while it is imported.
silence_telemetry()

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models.utils import get_external_mlflow_model_spec  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from tasks.artifact_repository import (  # noqa: E402
    ARTIFACT_KEY,
    FILES_KEY,
    StoreArtifactRepository,
    artifact_uri,
    experiment_uri,
)

TABLE_FILE = "variants.json"
"""The table of variants among a release's artifacts, in the form that MLflow's pages draw."""

REMEMBERED = 50
"""How many sets of figures a model remembers by their digests; one older than that would be logged a second time."""

AGAINST_THE_TEXT = frozenset(
    {"kl_divergence", "kl_divergence_p99", "top_1_agreement", "perplexity", "perplexity_ratio", "conversion_kl"}
)
"""The measures that belong to the evaluation text; MLflow shows them by dataset."""

_PARENT = "mlflow.parentRunId"
_BY_US = {"mlflow.source.name": "modelmint release", "mlflow.source.type": "JOB"}
# MLflow's limits: characters of a tag, parameters of one call, characters of a dataset's digest.
_CHARACTERS = 8000
_PARAMETERS = 100
_DIGEST_CHARACTERS = 36


@dataclass(frozen=True)
class TrackedRelease:
    """A release's run.

    Attributes:
        settings: where it is recorded.
        experiment_id: of the recipe's experiment.
        run_id: of the release's run.
        artifact_uri: where the files of that run go.
        release: the release's name.
        flow_run: id of the orchestrator's run; empty for none.
        continues: name of the last release of the recipe if that did not finish; empty otherwise.
        continues_run: its run.
    """

    settings: Settings
    experiment_id: str
    run_id: str
    artifact_uri: str
    release: str
    flow_run: str = ""
    continues: str = ""
    continues_run: str = ""

    def links(self) -> Links:
        """Where the release is recorded, for its report."""
        return Links(flow_run=self.flow_run, tracking_run=self.run_id, tracking_url=run_url(self))


@dataclass(frozen=True)
class TrackedVariant:
    """What stands for a variant in MLflow.

    Attributes:
        variant: its name.
        digest: of its files; empty if they were not made.
        model_id: its model; empty if it was not made.
        run_id: its child run in this release; empty where the release learned nothing new about it.
    """

    variant: str
    digest: str
    model_id: str = ""
    run_id: str = ""


# --- a release -------------------------------------------------------------------------------------------------------


@contextmanager
def tracked(recipe: Recipe, release: str, context: Context, *, triggered_by: str = "") -> Iterator[TrackedRelease]:
    """Record a release: opens its run and makes sure that it ends with the block.

    A block that raises leaves the run FAILED with the reason; one that is interrupted or terminated leaves it KILLED;
    one that ends without `record` leaves it FAILED, too.
    """
    opened = open_release(context.settings, recipe, release, context.invocation.flow_run, triggered_by)
    try:
        with unwound_by_sigterm():
            yield opened
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        try:
            fail_release(opened, reason, killed=not isinstance(error, Exception))
        except StageError as second:
            error.add_note(str(second))
        raise
    with _mlflow(context.settings) as client:
        forgotten = client.get_run(opened.run_id).info.status == "RUNNING"
    if forgotten:
        fail_release(opened, "the release ended without a report")


def open_release(
    settings: Settings, recipe: Recipe, release: str, flow_run: str = "", triggered_by: str = ""
) -> TrackedRelease:
    """Start a release's run; runs of the same recipe whose process died on this host are closed as KILLED first.

    Args:
        settings: where MLflow keeps its record, and where the store lies.
        recipe: what is wanted.
        release: the release's name.
        flow_run: id of the orchestrator's run; empty for none.
        triggered_by: who or what asked for it, such as a schedule's name.

    Raises:
        NetworkError: if the tracking server does not answer or refuses.
        StageError: if the database cannot be used.
    """
    tags = {
        "modelmint.kind": "release",
        "modelmint.release": release,
        "modelmint.recipe_digest": recipe.digest,
        "modelmint.source": str(recipe.source),
        "modelmint.process": this_process(),
        "modelmint.flow_run": flow_run,
        "modelmint.triggered_by": triggered_by,
        **_BY_US,
    }
    with _alone(settings), _mlflow(settings) as client:
        experiment_id = _experiment(client, settings, recipe)
        _close_dead_runs(client, experiment_id)
        last = _last_release(client, experiment_id)
        if last is not None and last.info.status != "FINISHED":
            tags["modelmint.continues"] = last.data.tags["modelmint.release"]
            tags["modelmint.continues_run"] = last.info.run_id
        run = client.create_run(experiment_id, run_name=release, tags=_filled(tags))
        client.log_batch(run.info.run_id, params=_params(recipe_settings(recipe)))
    return TrackedRelease(
        settings=settings,
        experiment_id=experiment_id,
        run_id=run.info.run_id,
        artifact_uri=run.info.artifact_uri,
        release=release,
        flow_run=flow_run,
        continues=tags.get("modelmint.continues", ""),
        continues_run=tags.get("modelmint.continues_run", ""),
    )


def record(opened: TrackedRelease, report: ReleaseReport, context: Context) -> list[TrackedVariant]:
    """Record what a release learned, with the documents that the store keeps of it, and end its run.

    Raises:
        NetworkError: if the tracking server does not answer or refuses.
        StageError: if the database cannot be used.
    """
    track_inputs(opened, report.source, report.evaluation)
    variants = track_variants(opened, report)
    documents = context.store.root / "releases" / report.release
    close_release(opened, report, {path.name: path.read_bytes() for path in sorted(documents.iterdir())}, variants)
    return variants


def track_inputs(opened: TrackedRelease, source: SourceReport, evaluation: EvaluationReport | None) -> None:
    """Name the checkpoint and the evaluation text as inputs of a release's run."""
    # One at a time: of two that name the same new dataset at once, MLflow refuses one.
    with _alone(opened.settings), _mlflow(opened.settings) as client:
        client.log_inputs(opened.run_id, datasets=_datasets(source, evaluation))
        client.log_batch(opened.run_id, tags=_tags(source_facts(source)))


def close_release(
    opened: TrackedRelease, report: ReleaseReport, files: Mapping[str, bytes], variants: Sequence[TrackedVariant]
) -> None:
    """End a release's run with its documents, its table and the models that it made or found.

    The run is FAILED where a stage could not finish and FINISHED otherwise: a variant refused by its gates is a result.

    Args:
        opened: the release's run.
        report: what the release learned.
        files: contents by file name, such as ``report.html``.
        variants: what `track_variant` returned.
    """
    drawn = {"mlflow.loggedArtifacts": json.dumps([{"path": TABLE_FILE, "type": "table"}])}
    outputs = [LoggedModelOutput(variant.model_id, step=0) for variant in variants if variant.model_id]
    with tempfile.TemporaryDirectory(prefix="modelmint-") as folder, _mlflow(opened.settings) as client:
        for name, text in {**files, TABLE_FILE: release_table(report)}.items():
            (Path(folder) / name).write_bytes(text)
        _log_files(opened.settings, opened.artifact_uri, folder)
        client.log_outputs(opened.run_id, outputs)
        client.log_batch(opened.run_id, metrics=_counts(report), tags=_tags({**release_facts(report), **drawn}))
        client.set_terminated(opened.run_id, "FAILED" if exit_code(report) == 4 else "FINISHED")


def fail_release(opened: TrackedRelease, reason: str, *, killed: bool = False) -> None:
    """End a release's run, and whatever child run is still open, as FAILED or KILLED with the reason."""
    status = "KILLED" if killed else "FAILED"
    children = f"tags.`{_PARENT}` = '{opened.run_id}' and attributes.status = 'RUNNING'"
    with _mlflow(opened.settings) as client:
        for run in client.search_runs([opened.experiment_id], children):
            _end(client, run.info.run_id, status, reason)
        _end(client, opened.run_id, status, reason)


# --- its variants ----------------------------------------------------------------------------------------------------


def track_variants(opened: TrackedRelease, report: ReleaseReport) -> list[TrackedVariant]:
    """Record every base and variant of a report, the bases first; see `track_variant`."""
    done: list[TrackedVariant] = []
    for variant in sorted(report.variants, key=lambda variant: not variant.is_base):
        base = next((it.model_id for it in done if variant.base and it.digest == variant.base), "")
        done.append(track_variant(opened, variant, report.source, report.evaluation, base_model_id=base))
    return done


def track_variant(
    opened: TrackedRelease,
    variant: VariantReport,
    source: SourceReport,
    evaluation: EvaluationReport | None,
    *,
    base_model_id: str = "",
) -> TrackedVariant:
    """Record a variant: its model once for its digest, and a child run if the release learned anything about it.

    Figures that MLflow does not have yet, such as those of another machine, are logged to the model that is there.

    Args:
        opened: the release's run.
        variant: as it was made, measured and judged.
        source: the checkpoint.
        evaluation: what quality was measured against; None if it came to none.
        base_model_id: model of the unquantized base that it was made from; empty where there is none.
    """
    figures = digest_of_bytes(canonical_json([m.model_dump(mode="json") for m in variant.measurements]))
    facts = variant_facts(variant)
    # One at a time, so that two processes with one variant do not both find that it has no model yet.
    with _alone(opened.settings), _mlflow(opened.settings) as client:
        model = _find_model(client, opened.experiment_id, variant.digest)
        known = model.tags.get("modelmint.figures", "").split() if model is not None else []
        whole = model is not None and model.status == LoggedModelStatus.READY
        if model is not None and whole and figures in known:
            _tag_model(client, model, facts)
            return TrackedVariant(variant.variant, variant.digest, model.model_id)
        run_id = _open_child(client, opened, facts)
        taken = model.model_id if model is not None and whole else base_model_id
        models = [LoggedModelInput(taken)] if taken else []
        client.log_inputs(run_id, datasets=_datasets(source, evaluation), models=models)
        if variant.digest and not whole:
            model = model or _create_model(
                client, opened, variant, source, run_id, {**facts, "modelmint.figures": figures}
            )
            _point_to_files(opened.settings, model, variant)
        model_id = model.model_id if model is not None else ""
        metrics = _metrics(variant, model_id, evaluation)
        client.log_batch(run_id, metrics=metrics, params=_params(variant_settings(variant)))
        if model is not None:
            remembered = " ".join(dict.fromkeys([figures, *known][:REMEMBERED]))
            _tag_model(client, model, {**facts, "modelmint.figures": remembered})
            if not whole:
                client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
                client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        client.set_terminated(run_id, "FAILED" if variant.outcome == "incomplete" else "FINISHED")
    return TrackedVariant(variant.variant, variant.digest, model_id, run_id)


def model_name(variant: str) -> str:
    """A variant's name as MLflow lets a model be called: without colons and dots."""
    return variant.replace(":", "-").replace(".", "_")


def _find_model(client: MlflowClient, experiment_id: str, digest: str) -> LoggedModel | None:
    if not digest:
        return None
    found = client.search_logged_models([experiment_id], f"tags.`modelmint.digest` = '{digest}'", max_results=1)
    return found[0] if found else None


def _open_child(client: MlflowClient, opened: TrackedRelease, facts: Mapping[str, str]) -> str:
    tags = {
        **facts,
        _PARENT: opened.run_id,
        "modelmint.kind": "variant",
        "modelmint.release": opened.release,
        "modelmint.process": this_process(),
        **_BY_US,
    }
    name = facts["modelmint.variant"]
    return str(client.create_run(opened.experiment_id, run_name=name, tags=_filled(tags)).info.run_id)


def _create_model(
    client: MlflowClient,
    opened: TrackedRelease,
    variant: VariantReport,
    source: SourceReport,
    run_id: str,
    facts: Mapping[str, str],
) -> LoggedModel:
    """What `mlflow.create_external_model` does, without its global state."""
    tags = {
        **facts,
        "mlflow.model.isExternal": "true",
        "modelmint.artifact": artifact_uri(variant.digest),
        "modelmint.files": ", ".join(variant.files),
        "modelmint.source": source.reference,
        "modelmint.source_revision": source.revision,
        "modelmint.release": opened.release,
    }
    return client.create_logged_model(
        opened.experiment_id,
        name=model_name(variant.variant),
        source_run_id=run_id,
        tags=_filled(tags),
        params={param.key: param.value for param in _params(variant_settings(variant))},
        model_type=variant.format,
    )


def _point_to_files(settings: Settings, model: LoggedModel, variant: VariantReport) -> None:
    """Write the ``MLmodel`` file, through which the artifact repository finds the files in the store."""
    paths = [entry.path for entry in Store(settings.store).artifact(variant.digest).files]
    spec = get_external_mlflow_model_spec(model)
    files = dict(zip(variant.files, paths, strict=True))
    spec.metadata = {**(spec.metadata or {}), ARTIFACT_KEY: variant.digest, FILES_KEY: files}
    with tempfile.TemporaryDirectory(prefix="modelmint-") as folder:
        spec.save(str(Path(folder) / "MLmodel"))
        _log_files(settings, model.artifact_location, folder)


def _tag_model(client: MlflowClient, model: LoggedModel, tags: Mapping[str, str]) -> None:
    changed = {key: _bounded(value) for key, value in tags.items() if model.tags.get(key, "") != _bounded(value)}
    if changed:
        client.set_logged_model_tags(model.model_id, changed)


def _metrics(variant: VariantReport, model_id: str, evaluation: EvaluationReport | None) -> list[Metric]:
    metrics = []
    for m in variant.measurements:
        text = evaluation if m.measure in AGAINST_THE_TEXT else None
        name, digest = (text.data, _short(text.text_digest)) if text else (None, None)
        metrics.append(Metric(m.measure, m.value, _now(), 0, model_id or None, name, digest))
    return metrics


# --- runs that were left ---------------------------------------------------------------------------------------------


def _close_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        if is_dead(run.data.tags.get("modelmint.process", "")):
            _end(client, run.info.run_id, "KILLED", "its process ended without a word")


def _last_release(client: MlflowClient, experiment_id: str) -> Run | None:
    ended = "tags.`modelmint.kind` = 'release' and attributes.status != 'RUNNING'"
    found = client.search_runs([experiment_id], ended, max_results=1, order_by=["attributes.start_time DESC"])
    return found[0] if found else None


def _end(client: MlflowClient, run_id: str, status: str, reason: str) -> None:
    client.log_batch(run_id, tags=_tags({"modelmint.failure": reason, NOTE: f"**{status.lower()}**: {reason}"}))
    client.set_terminated(run_id, status)


# --- where to look ---------------------------------------------------------------------------------------------------


def run_url(opened: TrackedRelease) -> str:
    """The page of a release's run; for a record without a server, the part after the server's address."""
    return _page(opened.settings, f"experiments/{opened.experiment_id}/runs/{opened.run_id}")


def model_url(opened: TrackedRelease, model_id: str) -> str:
    """The page of a model; for a record without a server, the part after the server's address."""
    return _page(opened.settings, f"experiments/{opened.experiment_id}/models/{model_id}")


def _page(settings: Settings, path: str) -> str:
    # Without the parameter the pages open in a mode for agents, which shows neither metrics nor models.
    server = settings.tracking_uri.rstrip("/") if _is_served(settings) else ""
    return f"{server}/#/{path}?workflowType=machine_learning"


# --- the words of MLflow ---------------------------------------------------------------------------------------------


@contextmanager
def _mlflow(settings: Settings) -> Iterator[MlflowClient]:
    """A client, whose errors are told as ours, and without the password that its address may hold."""
    try:
        yield _client(settings.tracking_uri)
    except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
        kind = NetworkError if _is_served(settings) else StageError
        secret = urlsplit(settings.tracking_uri).netloc.rpartition("@")[0]
        message = f"MLflow at {settings.tracking_uri} failed: {error}; MLFLOW_TRACKING_URI says where it is"
        raise kind(message.replace(f"{secret}@", "***@") if secret else message) from (None if secret else error)


@cache
def _client(tracking_uri: str) -> MlflowClient:
    # It tells of every table that it makes.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    kind, _, file = tracking_uri.partition(":///")
    if kind == "sqlite" and not Path(file).exists():
        # With a write-ahead log a commit waits for the disk once instead of four times, and pages can be read
        # meanwhile. The file remembers it.
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA journal_mode = WAL")
    return MlflowClient(tracking_uri=tracking_uri)


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Write to MLflow with no other release of this host doing so."""
    folder = settings.home / "mlruns"
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(folder / "lock", "recording a release in MLflow"):
        yield


def _log_files(settings: Settings, location: str, folder: str) -> None:
    """Keep the files of a folder at the artifact location of a run or a model."""
    if location.startswith("modelmint:"):
        # MLflow would make it too, but from the environment rather than from these settings.
        StoreArtifactRepository(location, settings.tracking_uri, settings=settings).log_artifacts(folder)
        return
    repository: Any = get_artifact_repository(location, tracking_uri=settings.tracking_uri)
    repository.log_artifacts(folder)


def _is_served(settings: Settings) -> bool:
    return settings.tracking_uri.startswith(("http://", "https://"))


def _experiment(client: MlflowClient, settings: Settings, recipe: Recipe) -> str:
    tags = {NOTE: experiment_note(recipe), "mlflow.experimentKind": "custom_model_development"}
    found = client.get_experiment_by_name(recipe.name)
    if found is None:
        # A server decides for itself where the files of its clients go.
        location = None if _is_served(settings) else experiment_uri(recipe.name)
        return str(client.create_experiment(recipe.name, location, tags))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    for key, value in tags.items():
        if found.tags.get(key) != value:
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def _datasets(source: SourceReport, evaluation: EvaluationReport | None) -> list[DatasetInput]:
    inputs = []
    if source.digest or source.revision:
        facts = {"reference": source.reference, "revision": source.revision, "digest": source.digest}
        inputs.append(_dataset(source.model, source.revision or source.digest, facts, "source-model"))
    if evaluation is not None:
        facts = {"reference": evaluation.data, "digest": evaluation.text_digest}
        inputs.append(_dataset(evaluation.data, evaluation.text_digest, facts, "evaluation"))
    return inputs


def _dataset(name: str, digest: str, facts: Mapping[str, str], role: str) -> DatasetInput:
    kind = facts["reference"].partition(":")[0]
    dataset = Dataset(name, _short(digest), source_type=kind, source=json.dumps(facts))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", role)])


def _short(digest: str) -> str:
    """As much of a digest as MLflow keeps of a dataset's; the whole of it stands in the dataset's source."""
    return digest.removeprefix("sha256:")[:_DIGEST_CHARACTERS]


def _counts(report: ReleaseReport) -> list[Metric]:
    return [Metric(name, value, _now(), 0) for name, value in release_figures(report).items()]


def _params(settings: Mapping[str, str]) -> list[Param]:
    """At most as many parameters as MLflow takes at once; what is beyond stands in the report."""
    filled = [Param(key, value) for key, value in settings.items() if value]
    if len(filled) <= _PARAMETERS:
        return filled
    kept = _PARAMETERS - 1
    return [*filled[:kept], Param("more", f"{len(filled) - kept} more settings stand in report.json")]


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in _filled(tags).items()]


def _filled(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: _bounded(value) for key, value in tags.items() if value}


def _bounded(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 2] + " …"


def _now() -> int:
    return time.time_ns() // 1_000_000
