"""``evaluate`` and ``benchmark``: measure stored variants, without a release around them."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flows import console
from flows.commands import LOOK, Json, complete_release, open_settings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from flows.stored import Lineage
    from flows.work import Work
    from modelmint.errors import ModelMintError
    from modelmint.recipe import Recipe
    from modelmint.report import Measurements
    from modelmint.step import StepResult

    ModelT = TypeVar("ModelT", bound=BaseModel)

EVALUATE_EPILOG = """\
Examples:

  modelmint evaluate latest --windows 48

  modelmint evaluate smollm2-135m --variant gguf:Q4_K_M --data file:my-text.txt

  modelmint evaluate sha256:1f0c...

What was measured before in the same way is read from the store; --anew measures it again and keeps the old figures.
"""
BENCHMARK_EPILOG = """\
Examples:

  modelmint benchmark --anew

  modelmint benchmark gguf:Q4_K_M gguf:Q8_0 --release smollm2-135m --trials 9 --threads 2

The variants and their base are measured side by side, with nothing else of ours on this machine.
"""
Anew = Annotated[bool, typer.Option("--anew", help="Measure again what was measured before; the result is not kept.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=EVALUATE_EPILOG, rich_help_panel=LOOK)(evaluate)
    app.command(epilog=BENCHMARK_EPILOG, rich_help_panel=LOOK)(benchmark)


def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(help="A release, or digests of variants.", show_default=False, autocompletion=complete_release),
    ],
    variants: Annotated[
        list[str] | None, typer.Option("--variant", "-v", help="Only this variant of the release.", show_default=False)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows of text.", min=1, show_default=False)] = None,
    data: Annotated[
        str | None, typer.Option(help="Another text: file:path, s3://bucket/key or pydoc.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--reference", help="source or base: what is measured against.", show_default=False),
    ] = None,
    anew: Anew = False,
    as_json: Json = False,
) -> None:
    """Measure the quality of stored variants again, on another text or more of it."""
    from modelmint.recipe import Evaluation

    subjects, recipe = _chosen(what, variants or [])
    wanted = recipe.evaluation if recipe else Evaluation()
    changes = {"windows": windows, "data": {"source": data} if data else None, "reference": against}
    wanted = _changed(wanted, changes)
    threads = recipe.benchmark.threads if recipe and recipe.benchmark else 0

    from modelmint import evaluate as stage
    from modelmint import reference as ruler
    from modelmint import text

    def measure(work: "Work") -> dict[str, "StepResult | ModelMintError"]:
        words = work.do("acquire text", partial(text.acquire_text, wanted.data))

        references: dict[tuple[str, str], StepResult] = {}

        def one(subject: "Lineage") -> "StepResult":
            base = (subject.format, subject.base) if wanted.reference == "base" else None
            of = (subject.source, subject.base if base else "")
            held = references[of] = references.get(of) or work.do(
                f"reference {base[0] if base else 'source'}",
                partial(ruler.reference, subject.source, words.record.output, wanted, base=base),
            )
            scored = partial(stage.evaluate, subject.format, subject.digest, held.record.output, wanted, threads)
            return work.do(f"evaluate {subject.name}", scored)

        return {subject.name: work.caught(partial(one, subject)) for subject in subjects}

    _measure("evaluate", measure, anew, as_json)


def benchmark(
    variants: Annotated[
        list[str] | None,
        typer.Argument(help="Variants of the release, or digests; all of them by default.", show_default=False),
    ] = None,
    release: Annotated[
        str,
        typer.Option(
            help="The release they belong to; the latest by default.",
            show_default=False,
            autocompletion=complete_release,
        ),
    ] = "",
    threads: Annotated[int | None, typer.Option(help="Threads of each tool.", min=0, show_default=False)] = None,
    trials: Annotated[int | None, typer.Option(help="Runs of each variant.", min=1, show_default=False)] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Length of the prompt.", min=1, show_default=False)] = None,
    generate_tokens: Annotated[
        int | None, typer.Option(help="How many tokens are decoded.", min=1, show_default=False)
    ] = None,
    anew: Anew = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory of stored variants, side by side."""
    from modelmint import benchmark as stage
    from modelmint.recipe import Benchmark

    digests = [name for name in variants or [] if _is_digest(name)]
    names = [name for name in variants or [] if not _is_digest(name)]
    releases = [release or "latest"] if names or not digests else []
    subjects, recipe = _chosen([*releases, *digests], names)
    wanted = recipe.benchmark if recipe and recipe.benchmark else Benchmark()
    changes = {
        "threads": threads,
        "trials": trials,
        "prompt_tokens": prompt_tokens,
        "generate_tokens": generate_tokens,
    }
    wanted = _changed(wanted, changes)

    def measure(work: "Work") -> dict[str, "StepResult | ModelMintError"]:
        found = {s.name: stage.Subject(s.format, s.digest, s.base) for s in subjects}
        return stage.benchmark(found, wanted, work.context("benchmark"))

    _measure("benchmark", measure, anew, as_json)


def _chosen(what: list[str], variants: list[str]) -> "tuple[list[Lineage], Recipe | None]":
    """The variants that are meant, bases before them, and the recipe of the first release among them."""
    from flows.commands import open_store
    from flows.stored import find_digest, lineage, read_report
    from modelmint.errors import InputError
    from modelmint.spelling import did_you_mean

    store, recipe = open_store(), None
    found: dict[str, str] = {}
    for name in what:
        if _is_digest(name):
            digest = find_digest(store, name)
            found[digest] = ""
            continue
        report = read_report(store, name)
        recipe = recipe or report.recipe
        made = {variant.variant: variant.digest for variant in report.variants if variant.digest}
        for variant in variants:
            if variant not in made:
                raise InputError(f"release {report.release} has made no {variant!r}{did_you_mean(variant, made)}")
        found |= {digest: name for name, digest in made.items() if name in variants or not variants}
    if not found:
        raise InputError("no variant of that release was made, so there is nothing to measure")
    return [lineage(store, digest, name) for digest, name in found.items()], recipe


def _is_digest(text: str) -> bool:
    return text.startswith("sha256:")


def _changed(model: "ModelT", changes: dict[str, Any]) -> "ModelT":
    """The settings of a recipe with those that were given on the command line."""
    from pydantic import ValidationError

    from modelmint.errors import InputError

    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return type(model).model_validate({**model.model_dump(), **given})
    except ValidationError as error:
        mistake = error.errors()[0]
        reason = str(mistake["msg"]).removeprefix("Value error, ")
        raise InputError(f"--{'.'.join(map(str, mistake['loc'][:1]))}: {reason}") from None


def _measure(
    stage: str, measure: "Callable[[Work], dict[str, StepResult | ModelMintError]]", anew: bool, as_json: bool
) -> None:
    """Do the measuring, print what came of it, and leave with 4 where something could not be measured."""
    from flows.work import working
    from modelmint import evaluate as documents
    from modelmint.errors import ModelMintError

    settings = open_settings()
    with working(settings, anew=stage if anew else "") as work:
        outcomes = measure(work)
        found = {
            name: documents.read(work.store, outcome.record.output)
            for name, outcome in outcomes.items()
            if not isinstance(outcome, ModelMintError)
        }
    errors = {name: str(outcome) for name, outcome in outcomes.items() if isinstance(outcome, ModelMintError)}
    if as_json:
        answers = [
            {
                "variant": name,
                "reused": not isinstance(outcome, ModelMintError) and outcome.reused,
                "error": errors.get(name, ""),
                **(found[name].model_dump(mode="json") if name in found else {}),
            }
            for name, outcome in outcomes.items()
        ]
        console.print_json({"stage": stage, "variants": answers})
    else:
        _print(found)
        for name, reason in errors.items():
            console.say_error(f"{name}: {reason}")
        reused = [o for o in outcomes.values() if not isinstance(o, ModelMintError) and o.reused]
        if reused:
            console.say(f"{len(reused)} of {len(outcomes)} measured before; --anew measures them again", style="dim")
    if errors:
        raise typer.Exit(4)


def _print(found: "dict[str, Measurements]") -> None:
    """A table of the figures, a column for each measure that was taken."""
    from rich import box
    from rich.table import Table

    from modelmint.columns import COLUMNS, MISSING, figure
    from modelmint.report import MEASURES

    shown = {column.measure: (column.unit, column.scale, column.decimals) for column in COLUMNS}
    by_name = {name: {m.measure: m for m in document.measurements} for name, document in found.items()}
    taken = [measure for measure in MEASURES if any(measure in figures for figures in by_name.values())]
    if not taken:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("measure", overflow="fold")
    table.add_column("unit")
    for name in by_name:
        table.add_column(name, justify="right", overflow="fold")
    for measure in taken:
        unit, scale, decimals = shown.get(measure, (MEASURES[measure].unit, 1.0, None))
        cells = []
        for figures in by_name.values():
            taken_here = figures.get(measure)
            cells.append(MISSING if taken_here is None else figure(taken_here.value * scale, decimals))
        table.add_row(MEASURES[measure].title, unit, *cells)
    console.print_wide(table)
