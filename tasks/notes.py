"""What people read on MLflow's pages: descriptions in Markdown, facts for tags, settings as flat parameters.

MLflow keeps a metric as a bare number. Its unit, direction, trials, spread and hardware stand in the descriptions.
"""

import json
from collections.abc import Mapping, Sequence

from modelmint.columns import figure, rows, summary
from modelmint.recipe import Recipe
from modelmint.release import ReleaseReport, SourceReport, StepReport, VariantReport, exit_code
from modelmint.report import MEASURES, Measurement

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a description."""

ROW_LIMIT = 40
"""Variants shown in a release's description, which is bounded; the whole table lies in an artifact."""


def experiment_note(recipe: Recipe) -> str:
    """What a recipe is about, and what its metrics mean."""
    how = (
        f"Source: `{recipe.source}`. A run is a release; its child runs are the variants that it made or measured. "
        "Each variant is one model, found again by the digest of its files."
    )
    glossary = [(f"`{name}`", it.title, it.unit, it.better) for name, it in MEASURES.items()]
    return _page(
        f"**{recipe.name}** {recipe.description}", how, _table(("metric", "what it is", "unit", "better is"), glossary)
    )


def release_note(report: ReleaseReport) -> str:
    """How a release ended: one sentence, the table of its variants, and what it cost."""
    shown = rows(report)[:ROW_LIMIT]
    hidden = len(report.variants) - len(shown)
    steps = report.step_count
    facts = [
        f"source `{report.source.reference}`",
        f"{steps.executed} steps executed, {steps.reused} reused, {report.seconds:.0f} s",
    ]
    if report.host:
        facts.append(f"{report.host.cpu}, {report.hardware}")
    if report.continues:
        facts.append(f"continues {report.continues}, which did not finish")
    return _page(
        f"**{summary(report)}**",
        f"> {report.source.notice}" if report.source.notice else "",
        _table(tuple(shown[0]), [tuple(row.values()) for row in shown]) if shown else "",
        f"{hidden} more stand in `variants.json`." if hidden else "",
        _list(facts),
    )


def variant_note(variant: VariantReport) -> str:
    """How a variant was made, measured and judged; every figure with what is needed to read it."""
    outcome = "unquantized base" if variant.is_base else variant.outcome
    optional = "" if variant.required or variant.is_base else " (optional)"
    return _page(
        f"**{variant.variant}: {outcome}{optional}**",
        _list(variant.reasons),
        _measurements(variant.measurements),
        _list(variant.notes),
        _steps(variant.steps),
        _list([f"{answer.prompt} → {answer.text}" for answer in variant.answers]),
    )


def release_facts(report: ReleaseReport) -> dict[str, str]:
    """What a release's run says when it ends."""
    return {
        NOTE: release_note(report),
        "modelmint.verdict": {0: "passed", 3: "failed", 4: "incomplete"}[exit_code(report)],
        "modelmint.failure": report.failure,
        "modelmint.hardware": str(report.hardware or ""),
    }


def release_figures(report: ReleaseReport) -> dict[str, float]:
    """The counts of a release."""
    outcomes = [variant.outcome for variant in report.judged]
    return {
        "variants": len(outcomes),
        "variants_passed": outcomes.count("passed"),
        "variants_failed": outcomes.count("failed"),
        "variants_incomplete": outcomes.count("incomplete"),
        "steps_executed": report.step_count.executed,
        "steps_reused": report.step_count.reused,
        "seconds": report.seconds,
    }


def release_table(report: ReleaseReport) -> bytes:
    """The variants as JSON, in the form that MLflow's pages draw as a table."""
    table = rows(report)
    return json.dumps(
        {"columns": list(table[0]) if table else [], "data": [list(row.values()) for row in table]}
    ).encode()


def source_facts(source: SourceReport) -> dict[str, str]:
    """The checkpoint that a release is made from."""
    return {
        "modelmint.source": source.reference,
        "modelmint.source_revision": source.revision,
        "modelmint.source_digest": source.digest,
        "modelmint.license": source.license,
        "modelmint.architecture": source.architecture,
        "modelmint.parameters": f"{source.parameters}" if source.parameters else "",
        "modelmint.size_class": source.size_class,
    }


def variant_facts(variant: VariantReport) -> dict[str, str]:
    """What a variant's run and model say of it: what it is, how it was judged and why."""
    return {
        NOTE: variant_note(variant),
        "modelmint.variant": variant.variant,
        "modelmint.digest": variant.digest,
        "modelmint.base": variant.base,
        "modelmint.verdict": variant.outcome,
        "modelmint.reasons": "\n".join(variant.reasons),
    }


def recipe_settings(recipe: Recipe) -> dict[str, str]:
    """A recipe as parameters of a run."""
    plain = recipe.model_dump(mode="json", exclude={"schema_version", "name", "description", "source", "variants"})
    names = [variant.name + ("" if variant.required else " (optional)") for variant in recipe.variants]
    return {"source": str(recipe.source), "variants": ", ".join(names), **_flat(plain)}


def variant_settings(variant: VariantReport) -> dict[str, str]:
    """How a variant was made, as parameters of its run and its model."""
    made = [step for step in variant.steps if step.output == variant.digest]
    given = made[-1].parameters.get("options") if made else None
    options = given if isinstance(given, Mapping) else variant.options
    named = {"format": variant.format, "type": variant.type, "label": variant.label}
    tools = {f"tool.{tool.name}": tool.version for step in made for tool in step.tools}
    return {**named, **_flat(options, "option"), **tools}


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one, with dotted names; other values as text."""
    flat: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(inner, Mapping):
            flat |= _flat(inner, name)
        elif inner is not None:
            flat[name] = inner if isinstance(inner, str) else json.dumps(inner)
    return flat


def _measurements(measurements: Sequence[Measurement]) -> str:
    """The figures; the hardware beneath them where it is one, beside each where there are several."""
    classes = sorted({str(m.hardware) for m in measurements if m.hardware})
    heads, cells = ["measure", "value", "±", "unit", "statistic"], [_measurement(m) for m in measurements]
    if len(classes) > 1:
        heads.append("hardware")
        cells = [[*cell, str(m.hardware or "")] for cell, m in zip(cells, measurements, strict=True)]
    return _page(_table(heads, cells) if cells else "", f"Measured on {classes[0]}." if len(classes) == 1 else "")


def _measurement(m: Measurement) -> list[str]:
    scale, unit = (1e-6, "MB") if m.unit == "bytes" else (1.0, "" if m.unit == "1" else m.unit)
    value = f"{m.value:.0f}" if unit != "MB" and m.value.is_integer() else figure(m.value * scale, None)
    spread = figure(m.spread * scale, None) if m.spread else ""
    statistic = "" if m.statistic == "exact" else f"{m.statistic} of {m.trials}"
    return [MEASURES[m.measure].title, value, spread, unit, statistic]


def _steps(steps: Sequence[StepReport]) -> str:
    cells = [
        (
            step.stage,
            f"{step.seconds:.1f}",
            ", ".join(f"{tool.name} {tool.version}" for tool in step.tools),
            f"`{step.key}`",
        )
        for step in steps
    ]
    return _table(("step", "seconds", "tools", "key"), cells) if cells else ""


def _page(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
