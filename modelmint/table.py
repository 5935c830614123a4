"""What the terminal shows of a plan, a release and a comparison.

On a terminal the tables fit its width: columns that matter least are left out, and the line below says which. Elsewhere
they are plain text at full width, so that a log or a pipe loses nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelmint.columns import (
    COLUMNS,
    MISSING,
    Column,
    best,
    cell,
    count_of_weights,
    figure,
    heading,
    plain,
    summary,
    three_digits,
)
from modelmint.compare import Change, CompareRow
from modelmint.plan import Plan, PlannedVariant
from modelmint.release import ReleaseReport, VariantReport, exit_code, stage_order
from modelmint.report import MEASURES

WIDE = 10_000
"""Columns of a line that nothing limits."""

OUTCOME_STYLES = {"passed": "green", "failed": "bold red", "incomplete": "bold red", "base": "dim", "absent": "dim"}
JUDGEMENT_STYLES = {"better": "green", "worse": "red", "same": "", "incomparable": "dim", "missing": "dim"}
STEP_STYLES = {"reused": "dim", "runs": "cyan"}


def show_release(console: Console, report: ReleaseReport, *, report_path: Path | None = None) -> None:
    """Print the table of a release with its reasons, and beneath it host, source, steps and where the report lies."""
    _print(console, lambda width: _release(report, report_path, width))


def show_plan(console: Console, plan: Plan) -> None:
    """Print what would run, what is reused, and what it would take."""
    _print(console, lambda width: _plan(plan))


def show_comparison(console: Console, rows: Sequence[CompareRow]) -> None:
    """Print what `modelmint.compare.compare_rows` found, a table for each later release."""
    for release in dict.fromkeys(row.after for row in rows):
        of_release = [row for row in rows if row.after == release]
        _print(console, lambda width, shown=of_release: _comparison(shown))  # type: ignore[misc]


def _print(console: Console, view: Callable[[int], RenderableType]) -> None:
    """Print at the terminal's width, or as plain text of any width where there is no terminal."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDE, color_system=None, force_terminal=False, highlight=False)
    console.print(view(console.width), highlight=False)


# --- release ---------------------------------------------------------------------------------------------------------


def _release(report: ReleaseReport, report_path: Path | None, width: int) -> RenderableType:
    title = Text.assemble((plain(report.source.model), "bold"), "  ", (report.release, "dim"))
    table, left_out = _fitting(report, width)
    style = "green" if exit_code(report) == 0 else "bold red"
    parts: list[RenderableType] = [Text(), title, table]
    parts += [Text(plain(summary(report)), style=style), *_reasons(report), Text()]
    parts.append(_facts(_release_facts(report, report_path, left_out)))
    return Group(*parts)


def _fitting(report: ReleaseReport, width: int) -> tuple[Table, list[Column]]:
    """The table with as many columns as fit, and those that were left out."""
    ends = [max(map(cell_len, ("variant", *(v.variant for v in report.variants)))), len("incomplete")]
    widths = {
        column: max(map(cell_len, (column.title, column.unit, *(_shown(v, column) for v in report.variants))))
        for column in COLUMNS
    }
    left_out: list[Column] = []
    while True:
        for gap in (2, 1):
            if sum(ends) + sum(widths.values()) + gap * (len(widths) + 1) + len("  ") <= width or len(widths) == 1:
                return _release_table(report, list(widths), gap), left_out
        left_out.append(min(widths, key=lambda column: column.keep))
        del widths[left_out[-1]]


def _shown(variant: VariantReport, column: Column) -> str:
    return cell(variant, column, spread=column.measure == "kl_divergence")


def _release_table(report: ReleaseReport, columns: Sequence[Column], gap: int) -> Table:
    table = _table(gap)
    for column in columns:
        table.add_column(f"{column.title}\n{column.unit}", justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    winners = best(report)
    for variant in report.variants:
        cells = [_release_cell(variant, column, winners.get(column.measure, frozenset())) for column in columns]
        verdict = Text(variant.outcome, style=OUTCOME_STYLES[variant.outcome])
        table.add_row(Text(variant.variant), *cells, verdict, style="dim" if variant.is_base else "")
    return table


def _table(gap: int = 2) -> Table:
    """An empty table with a column for the variant; whatever is too long is folded, never cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("variant", overflow="fold", vertical="middle")
    return table


def _release_cell(variant: VariantReport, column: Column, winners: frozenset[str]) -> Text:
    text = Text(style="bold" if variant.variant in winners else "")
    shown, _, spread = _shown(variant, column).partition(" ± ")
    text.append(shown)
    if spread:
        text.append(f" ± {spread}", style="dim")
    return text


def _reasons(report: ReleaseReport) -> list[Text]:
    """One line for each reason, the variant's name in front of the first."""
    lines = []
    longest = max((len(variant.variant) for variant in report.variants), default=0)
    for variant in report.judged:
        for number, reason in enumerate(variant.reasons):
            name = variant.variant if number == 0 else ""
            optional = "" if variant.required else " (not required)"
            sentence = plain(reason) + (optional if number == len(variant.reasons) - 1 else "")
            lines.append(Text.assemble("  ", (name.ljust(longest), OUTCOME_STYLES[variant.outcome]), "  ", sentence))
    return lines


def _release_facts(report: ReleaseReport, path: Path | None, left_out: Sequence[Column]) -> list[tuple[str, Text]]:
    source, facts = report.source, []
    about = [source.reference, source.architecture, source.license]
    if source.parameters:
        about.insert(1, f"{count_of_weights(source.parameters)} parameters ({source.size_class})")
    facts.append(("source", Text(plain(", ".join(part for part in about if part)))))
    if source.notice:
        facts.append(("", Text(plain(source.notice), style="yellow")))
    if evaluation := report.evaluation:
        against = "the source" if evaluation.reference == "source" else "the unquantized base"
        text = f"against {against} in {evaluation.dtype}, {evaluation.positions} positions of {evaluation.data}"
        facts.append(("quality", Text(plain(text))))
    if host := report.host:
        memory = f"{host.memory_bytes / 1e9:.0f} GB"
        facts.append(("host", Text(plain(f"{host.name}: {host.cpu}, {host.cores} cores, {memory}, {host.system}"))))
    if report.hardware:
        facts.append(("hardware", Text(str(report.hardware))))
    count = report.step_count
    steps = f"{count.executed} executed, {count.reused} reused, {duration(report.seconds)}"
    if report.continues:
        steps += f"; continues {report.continues}"
    facts.append(("steps", Text(steps)))
    for name, place in (("mlflow", report.links.tracking_url), ("prefect", report.links.flow_run_url)):
        # Without a tracking server there is a path only, which no browser can open.
        if place.startswith("http"):
            facts.append((name, Text(place, style="blue")))
    if path is not None:
        facts.append(("report", Text(str(path), style="bold")))
    if left_out:
        hidden = ", ".join(heading(column) for column in COLUMNS if column in left_out)
        facts.append(("left out", Text(f"{hidden}: the terminal is too narrow; the report has them", style="dim")))
    return facts


def _facts(facts: Sequence[tuple[str, Text]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts:
        grid.add_row(name, text)
    return grid


def duration(seconds: float) -> str:
    """A time as people say it: ``0.4 s``, ``2 min 24 s``, ``1 h 5 min``."""
    if seconds < 59.5:
        return f"{three_digits(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


# --- plan ------------------------------------------------------------------------------------------------------------


def _plan(plan: Plan) -> RenderableType:
    title = Text.assemble((plain(plan.model), "bold"), "  ", (f"plan of {plan.recipe}", "dim"))
    used = {step.stage for variant in plan.variants for step in variant.steps}
    stages = sorted(used, key=stage_order)
    table = _table()
    table.add_column("predicted size\nMB", justify="right")
    for stage in stages:
        table.add_column(stage)
    table.add_column("required")
    for variant in plan.variants:
        size = three_digits(variant.size_bytes / 1e6) if variant.size_bytes is not None else MISSING
        marks = [_planned_cell(variant, stage) for stage in stages]
        required = "" if variant.is_base else "yes" if variant.required else "no"
        dim = "dim" if variant.is_base else ""
        table.add_row(Text(variant.variant, style=dim), size, *marks, required, style=dim)
    refusals = [
        Text.assemble("  ", (variant.variant, "bold red"), "  ", plain(variant.refusal))
        for variant in plan.variants
        if variant.refusal
    ]
    return Group(Text(), title, table, *refusals, _facts(_plan_facts(plan)))


def _planned_cell(variant: PlannedVariant, stage: str) -> Text:
    for step in variant.steps:
        if step.stage == stage:
            return Text(step.state, style=STEP_STYLES[step.state])
    return Text(MISSING, style="dim")


def _plan_facts(plan: Plan) -> list[tuple[str, Text]]:
    facts = [("source", Text(plain(plan.source)))]
    if plan.steps:
        shared = ", ".join(
            f"{step.stage} {step.state}" for step in sorted(plan.steps, key=lambda s: stage_order(s.stage))
        )
        facts.append(("shared", Text(shared)))
    facts.append(("steps", Text(f"{plan.step_count.executed} to execute, {plan.step_count.reused} reused")))
    enough = plan.disk_bytes <= plan.disk_free_bytes
    disk = f"{_gigabytes(plan.disk_bytes)} needed, {_gigabytes(plan.disk_free_bytes)} free"
    facts.append(("disk", Text(disk, style="" if enough else "bold red")))
    if plan.memory_bytes is not None:
        memory = f"about {_gigabytes(plan.memory_bytes)} at the peak"
        facts.append(("memory", Text(memory)))
    if plan.seconds is not None:
        facts.append(("time", Text(f"about {duration(plan.seconds)}")))
    facts += [("", Text(plain(note), style="yellow")) for note in plan.notes]
    return facts


def _gigabytes(size: int) -> str:
    return f"{three_digits(size / 1e9)} GB"


# --- comparison ------------------------------------------------------------------------------------------------------


def _comparison(rows: Sequence[CompareRow]) -> RenderableType:
    title = Text.assemble((rows[0].after, "bold"), (f"  against {rows[0].before}", "dim"))
    taken = {change.measure for row in rows for change in row.changes}
    columns = [column for column in COLUMNS if column.measure in taken]
    table = _table()
    for column in columns:
        table.add_column(f"{column.title}\n{column.unit}", justify="right", overflow="fold")
    table.add_column("bytes")
    table.add_column("verdict")
    for row in rows:
        cells = [_changed_cell(row.change(column.measure), column) for column in columns]
        absent = "absent" in (row.outcome_before, row.outcome_after)
        verdict = Text(row.outcome_after, style=OUTCOME_STYLES[row.outcome_after])
        if row.outcome_before != row.outcome_after:
            verdict.append(f" (was {row.outcome_before})", style="dim")
        table.add_row(row.variant, *cells, MISSING if absent else "same" if row.same_bytes else "differ", verdict)
    reasons = dict.fromkeys(
        f"{MEASURES[change.measure].title}: {change.why}" for row in rows for change in row.changes if change.why
    )
    notes = [Text(f"  not comparable, {plain(reason)}", style="dim") for reason in reasons]
    better = Text("green is better, red is worse; changes within twice their uncertainty carry no colour", style="dim")
    return Group(Text(), title, table, *notes, better)


def _changed_cell(change: Change | None, column: Column) -> Text:
    """The later figure, and beneath it by how much it changed."""
    if change is None or change.after is None:
        return Text(MISSING, style="dim")
    text = Text(figure(change.after * column.scale, column.decimals))
    if change.judgement == "missing":
        return text.append("\nnew", style="dim")
    if change.judgement == "incomparable":
        return text.append("\nnot comparable", style="dim")
    shown = f"\n{change.relative:+.1%}" if change.relative else "\n="
    if change.judgement in ("better", "worse"):
        shown += f" {change.judgement}"
    return text.append(shown, style=JUDGEMENT_STYLES[change.judgement])
