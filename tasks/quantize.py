"""Quantize, as a task for each variant."""

from prefect import task
from prefect.client.schemas.objects import State

from modelmint import quantize as stage
from modelmint.recipe import Variant
from modelmint.step import Context, StepResult
from tasks.shown import ONCE, shown, watched


@task(name="quantize", task_run_name="quantize {variant}", **ONCE)
def quantize(base: StepResult, variant: Variant, context: Context) -> State[StepResult]:
    """Make one variant from the base of its format."""
    return shown(stage.quantize(base.record.output, variant, watched(context, f"quantize {variant}")))
