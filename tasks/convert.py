"""Convert, as a task."""

from prefect import task
from prefect.client.schemas.objects import State
from pydantic import JsonValue

from modelmint import convert as stage
from modelmint.step import Context, StepResult
from tasks.shown import ONCE, shown, watched


@task(name="convert", task_run_name="convert {format_name}", **ONCE)
def convert(source: StepResult, format_name: str, options: dict[str, JsonValue], context: Context) -> State[StepResult]:
    """Make the unquantized base of one format."""
    label = f"convert {format_name}"
    return shown(stage.convert(source.record.output, format_name, options, watched(context, label)))
