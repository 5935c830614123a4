"""Inspect, as tasks: before the download where the source allows it, and every weight after it."""

from dataclasses import dataclass

from prefect import task
from prefect.client.schemas.objects import State

from modelmint import inspect as stage
from modelmint.acquire import step_of
from modelmint.inspection import Inspection
from modelmint.recipe import Recipe
from modelmint.sources import PinnedRef
from modelmint.step import Context, StepResult
from tasks.shown import NETWORK, ONCE, network_failed, shown, watched


@dataclass(frozen=True)
class Inspected:
    """A checkpoint that may be used, and the step that found so."""

    inspection: Inspection
    result: StepResult


@task(name="preview", task_run_name="preview {pinned}", retry_condition_fn=network_failed, **NETWORK)
def preview(pinned: PinnedRef, recipe: Recipe, context: Context) -> None:
    """Refuse from its small files what would be refused after hours; nothing to do where the checkpoint is here."""
    if context.store.record(step_of(pinned).key) is None:
        inspection = stage.preview(pinned, context.settings, recipe.formats())
        stage.refuse(inspection, recipe, context.settings)


@task(name="inspect", task_run_name="inspect {pinned}", **ONCE)
def inspect(snapshot: StepResult, pinned: PinnedRef, recipe: Recipe, context: Context) -> State[Inspected]:
    """Look into every file of the checkpoint, and refuse what the recipe or this machine does not allow."""
    result = stage.inspect(snapshot.record.output, watched(context, "inspect"))
    inspection = stage.read_inspection(result, context.store, pinned)
    stage.refuse(inspection, recipe, context.settings, acquired=True)
    stage.refuse_formats_of(snapshot.record.output, recipe.formats(), context)
    state = shown(result)
    state.data = Inspected(inspection, result)
    return state
