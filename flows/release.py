"""The release flow: one recipe becomes a set of judged variants, with its record.

Read it from top to bottom: it is the order in which things happen. What a stage does is in `modelmint`; how it shows
itself is in `tasks`; here is only who waits for whom.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.order import Order, open_order
from modelmint import __version__, formats
from modelmint.assemble import Outcome, Shared, Trail
from modelmint.benchmark import Subject
from modelmint.convert import base_options
from modelmint.errors import ModelMintError
from modelmint.recipe import Variant
from modelmint.release import ReleaseReport, exit_code
from modelmint.step import StepResult
from tasks import track
from tasks.acquire import acquire, acquire_text, resolve
from tasks.benchmark import benchmark
from tasks.conclude import conclude, show
from tasks.convert import convert
from tasks.evaluate import evaluate, reference
from tasks.inspect import inspect, preview
from tasks.quantize import quantize
from tasks.shown import of, outcome


@dataclass(frozen=True)
class Made:
    """Everything that was made of one format: its base, what measured it, and the trails of its variants."""

    base: Trail
    variants: list[Trail]


def flow_run_name() -> str:
    """What a run is called in the UI: the recipe's name."""
    return str(runtime.flow_run.parameters["recipe"]).rpartition("/")[2].removesuffix(".yaml")


# One heavy task at a time: each uses every core that the settings give it.
@flow(
    name="release", flow_run_name=flow_run_name, task_runner=ThreadPoolTaskRunner(max_workers=1), persist_result=False
)
def release(recipe: str, variants: list[str] | None = None, name: str = "") -> State[ReleaseReport]:
    """Make, measure and judge the variants of a recipe.

    Args:
        recipe: name of a recipe in deployments/recipes, or the path of a YAML file.
        variants: only these of its variants; all of them if nothing is given.
        name: what the release is called; made from recipe and time if nothing is given.
    """
    started = time.monotonic()
    order = open_order(recipe, variants or [], name, str(runtime.flow_run.id or ""))
    context = order.context
    with context.store.in_use(f"release {order.name}"), track.tracked(order.recipe, order.name, context) as tracked:
        order = order.tracked_as(tracked)
        shared = prepare(order)
        made = [make(format_name, shared, order) for format_name in order.recipe.formats()]
        made = measure_speed(made, order) if order.recipe.benchmark else made
        report = conclude(
            shared,
            [(trails.base, trails.variants) for trails in made],
            order.context,
            release=order.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.monotonic() - started,
            links=tracked.links(),
            continues=tracked.continues,
            version=__version__,
        )
        track.record(tracked, report, order.context)
    show(report, order.context)
    passed = sum(variant.outcome == "passed" for variant in report.judged)
    message = f"{passed} of {len(report.judged)} variants pass"
    return Completed(data=report, message=message) if exit_code(report) == 0 else Failed(data=report, message=message)


def prepare(order: Order) -> Shared:
    """Pin, fetch and inspect the checkpoint, and fetch the text it is measured on."""
    recipe, context = order.recipe, order.context
    pinned = resolve(recipe.source, context.settings)
    preview(pinned, recipe, context)
    snapshot = acquire(pinned, context).result()
    inspected = inspect(snapshot, pinned, recipe, context).result()
    text = acquire_text(recipe.evaluation.data, context).result()
    return Shared(
        recipe=recipe,
        source=str(pinned),
        revision=pinned.revision,
        inspection=inspected.inspection,
        steps=(snapshot, inspected.result, text),
    )


def make(format_name: str, shared: Shared, order: Order) -> Made:
    """Convert one format's base, quantize and evaluate its variants; one that fails leaves the others alone."""
    recipe, context = order.recipe, order.context
    snapshot, text = shared.steps[0], shared.steps[-1]
    options = base_options(format_name, recipe.base.get(format_name, {}), recipe.source.model_name)
    threads = recipe.benchmark.threads if recipe.benchmark else 0

    def scored(name: str, made: PrefectFuture[StepResult]) -> PrefectFuture[StepResult]:
        return of(name, evaluate).submit(name, format_name, made, against, recipe.evaluation, threads, context)

    base = convert.submit(snapshot, format_name, options, context)
    if recipe.evaluation.reference == "source":
        against = reference.submit(snapshot, text, recipe.evaluation, "source", context)
    else:
        against = reference.submit(snapshot, text, recipe.evaluation, format_name, context, base=base)
    base_name = Variant(format=format_name, type=formats.load(format_name).base_type(options))
    base_score = scored(base_name.name, base)
    wanted = [variant for variant in recipe.variants if variant.format == format_name]
    made = [of(variant.name, quantize).submit(base, variant, context) for variant in wanted]
    scores = [scored(variant.name, it) for variant, it in zip(wanted, made, strict=True)]

    return Made(
        base=trail(base_name, is_base=True, convert=base, reference=against, evaluate=base_score),
        variants=[
            trail(variant, convert=base, quantize=it, reference=against, evaluate=score)
            for variant, it, score in zip(wanted, made, scores, strict=True)
        ],
    )


def trail(variant: Variant, *, is_base: bool = False, **stages: PrefectFuture[StepResult]) -> Trail:
    """Wait for the stages of one variant, and keep how each ended."""
    return Trail(variant, {stage: outcome(future) for stage, future in stages.items()}, is_base)


def measure_speed(made: list[Made], order: Order) -> list[Made]:
    """Benchmark everything that was made, side by side, with nothing else running."""
    wanted = order.recipe.benchmark
    assert wanted is not None, "called for recipes that ask for a benchmark"
    trails = [it for group in made for it in (group.base, *group.variants)]
    bases = {group.base.variant.format: group.base.artifact for group in made}
    subjects = {
        it.variant.name: Subject(it.variant.format, it.artifact, bases[it.variant.format])
        for it in trails
        if it.artifact
    }
    if not subjects:
        return made
    ended: dict[str, StepResult | ModelMintError] = benchmark(subjects, wanted, order.context).result().outcomes

    def benchmarked(it: Trail) -> Trail:
        found: Outcome = ended.get(it.variant.name)
        return Trail(it.variant, {**it.stages, "benchmark": found}, it.is_base)

    return [Made(benchmarked(group.base), [benchmarked(it) for it in group.variants]) for group in made]
