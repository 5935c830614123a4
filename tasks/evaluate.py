"""Reference and evaluate, as tasks: the ruler, and what it says of each variant."""

from prefect import task
from prefect.client.schemas.objects import State

from modelmint import evaluate as stage
from modelmint import reference as ruler
from modelmint.recipe import Evaluation
from modelmint.step import Context, StepResult
from tasks.shown import ONCE, shown, watched


@task(name="reference", task_run_name="reference {kind}", **ONCE)
def reference(
    source: StepResult,
    text: StepResult,
    evaluation: Evaluation,
    kind: str,
    context: Context,
    base: StepResult | None = None,
) -> State[StepResult]:
    """Take the reference log-probabilities, from the source or from the base of the format named by `kind`."""
    held = None if base is None else (kind, base.record.output)
    label = f"reference {kind}"
    return shown(
        ruler.reference(source.record.output, text.record.output, evaluation, watched(context, label), base=held)
    )


@task(name="evaluate", task_run_name="evaluate {name}", **ONCE)
def evaluate(
    name: str,
    format_name: str,
    made: StepResult,
    against: StepResult,
    evaluation: Evaluation,
    threads: int,
    context: Context,
) -> State[StepResult]:
    """Measure one variant, or a base, against the reference."""
    return shown(
        stage.evaluate(
            format_name,
            made.record.output,
            against.record.output,
            evaluation,
            threads,
            watched(context, f"evaluate {name}"),
        )
    )
