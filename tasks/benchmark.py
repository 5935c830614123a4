"""Benchmark, as one task for all variants: their trials are interleaved and have the machine to themselves."""

from dataclasses import dataclass

from prefect import task
from prefect.client.schemas.objects import State
from prefect.states import Completed

from modelmint import benchmark as stage
from modelmint.benchmark import Subject
from modelmint.errors import ModelMintError
from modelmint.recipe import Benchmark
from modelmint.step import Context, StepResult
from tasks.shown import ONCE, watched


@dataclass(frozen=True)
class Benchmarked:
    """How the benchmark of each variant ended, by its name."""

    outcomes: dict[str, StepResult | ModelMintError]


@task(name="benchmark", task_run_name="benchmark side by side", **ONCE)
def benchmark(subjects: dict[str, Subject], wanted: Benchmark, context: Context) -> State[Benchmarked]:
    """Measure speed and memory of all variants in one session."""
    outcomes = stage.benchmark(subjects, wanted, watched(context, "benchmark"))
    errors = [str(outcome) for outcome in outcomes.values() if isinstance(outcome, ModelMintError)]
    reused = all(isinstance(outcome, StepResult) and outcome.reused for outcome in outcomes.values())
    message = f"{len(outcomes) - len(errors)} of {len(outcomes)} measured" + "".join(f"; {error}" for error in errors)
    return Completed(name="Cached" if reused else "Completed", data=Benchmarked(outcomes), message=message)
