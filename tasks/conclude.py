"""Judge and report: what all stages left behind becomes verdicts, documents, and a page in Prefect's UI."""

import re
from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from modelmint import assemble
from modelmint.assemble import Shared, Trail
from modelmint.host import hardware_class, host
from modelmint.page import render_page
from modelmint.release import Links, ReleaseReport, StepCount, StepReport, VariantReport
from modelmint.report import MEASURES
from modelmint.step import Context
from tasks.shown import ONCE


@task(name="judge and report", task_run_name="judge and report", **ONCE)
def conclude(
    shared: Shared,
    made: Sequence[tuple[Trail, list[Trail]]],
    context: Context,
    *,
    release: str,
    created: str,
    seconds: float,
    links: Links,
    continues: str,
    version: str,
) -> ReleaseReport:
    """Judge every variant, and keep report, page and lock in the store."""
    store = context.store
    variants: list[VariantReport] = []
    for base, trails in made:
        variants.append(assemble.variant_report(base, shared, store))
        variants += [assemble.variant_report(trail, shared, store, base) for trail in trails]
    steps = tuple(StepReport.of(result.record, result.reused) for result in shared.steps)
    every = [*steps, *(step for variant in variants for step in variant.steps)]
    trails = [trail for base, rest in made for trail in (base, *rest)]
    text = shared.steps[-1].record.output
    measured = any("reference" in trail.results for trail in trails)
    benchmark = shared.recipe.benchmark
    report = ReleaseReport(
        release=release,
        recipe=shared.recipe,
        recipe_digest=shared.recipe.digest,
        source=assemble.source_report(shared),
        variants=tuple(variants),
        evaluation=assemble.evaluation_report(shared, text) if measured else None,
        host=host(),
        hardware=hardware_class(context.settings.tool_threads(benchmark.threads if benchmark else 0)),
        steps=steps,
        step_count=StepCount.of(every),
        created=created,
        seconds=seconds,
        continues=continues,
        links=links,
        modelmint=version,
    )
    lock = assemble.release_lock(trails, variants, shared, text, store)
    store.write_release(
        release,
        {"report.json": report.to_json(), "report.html": render_page(report).encode(), "lock.json": lock.to_json()},
    )
    return report


def show(report: ReleaseReport, context: Context) -> None:
    """Lay the result out in Prefect's UI: a table, the sentences behind it, and a link to the record."""
    key = re.sub(r"[^a-z0-9]+", "-", report.recipe.name)
    create_table_artifact(key=f"{key}-variants", table=[_row(v) for v in report.variants], description=report.release)
    create_markdown_artifact(key=f"{key}-verdicts", markdown=_verdicts(report), description=report.release)
    page = context.store.root / "releases" / report.release / "report.html"
    create_link_artifact(key=f"{key}-page", link=page.as_uri(), link_text="the report on the disk of its worker")
    if report.links.tracking_url.startswith("http"):
        create_link_artifact(key=f"{key}-record", link=report.links.tracking_url, link_text="the record in MLflow")


COLUMNS = (
    "size",
    "bits_per_weight",
    "kl_divergence",
    "top_1_agreement",
    "perplexity_ratio",
    "decode_rate",
    "prefill_rate",
)


def _row(variant: VariantReport) -> dict[str, Any]:
    figures = {name: variant.measurement(name) for name in COLUMNS}
    shown = {
        f"{MEASURES[name].title} ({MEASURES[name].unit})": f"{figure.value:.6g}" if figure else ""
        for name, figure in figures.items()
    }
    return {"variant": variant.variant, "verdict": variant.outcome, **shown}


def _verdicts(report: ReleaseReport) -> str:
    lines = [f"# {report.release}", ""]
    if report.source.notice:
        lines += [f"> {report.source.notice}", ""]
    for variant in report.judged:
        lines.append(f"- **{variant.variant}** {variant.outcome}" + "".join(f"\n  - {r}" for r in variant.reasons))
    count = report.step_count
    lines += ["", f"{count.executed} steps executed, {count.reused} reused, {report.seconds:.1f} s."]
    return "\n".join(lines)
