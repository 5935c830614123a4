"""Writes the report of a release as one HTML page that needs nothing else: no network, no other file.

Laws, tested under the same words:

* equal reports give the same bytes;
* foreign text is text: nothing in a name, an answer or a licence becomes markup or script;
* the page loads nothing, and its content security policy says so to the browser.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from modelmint.columns import (
    COLUMNS,
    MISSING,
    Column,
    best,
    cell,
    count_of_weights,
    figure,
    measured,
    short_title,
    summary,
    three_digits,
)
from modelmint.plot import Aside, Point, scatter
from modelmint.release import ReleaseReport, VariantReport, exit_code
from modelmint.report import MEASURES, Bound, Check
from modelmint.table import duration

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Control characters that no text needs and HTML does not allow."""

OUTCOMES = {
    0: ("passed", "Release passed"),
    3: ("failed", "Release failed: a required variant fell short"),
    4: ("incomplete", "Release incomplete: a stage failed"),
}


class Tile(NamedTuple):
    """One figure worth a large type: what it is, the figure, its unit, and whose it is."""

    title: str
    figure: str
    unit: str
    detail: str


class Gate(NamedTuple):
    """One column of the gates: a measure, its title and the bound that most variants have."""

    measure: str
    title: str
    bound: str


def render_page(report: ReleaseReport) -> str:
    """The page of a release, to be written as UTF-8.

    Args:
        report: what the release learned.
    """
    outcome, headline = OUTCOMES[exit_code(report)]
    text = _template().render(
        report=report,
        source=report.source,
        outcome=outcome,
        headline=headline,
        summary=summary(report),
        tiles=_tiles(report),
        columns=COLUMNS,
        winners=best(report),
        plots=_plots(report),
        gates=_gates(report),
        answers=_answers(report),
        MISSING=MISSING,
    )
    return CONTROLS.sub("�", text)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("modelmint", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["measures"] = MEASURES
    environment.globals["hash"] = content_hash
    environment.filters.update(
        bound=_bound,
        cell=cell,
        check_of=_check_of,
        duration=duration,
        exact=_exact,
        moment=_moment,
        seen=_seen,
        sortable=_sortable,
        short=_short,
        value=_json_text,
        title_of=short_title,
        weights=count_of_weights,
    )
    environment.tests["deviating"] = _deviating
    return environment.get_template("page.html")


def content_hash(text: str) -> str:
    """A source of the content security policy that allows exactly this inline text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _exact(number: float) -> str:
    """A figure of the full table: whole numbers in groups of three digits, others with nine significant ones."""
    return f"{number:,.0f}" if number == int(number) else f"{number:.9g}"


def _sortable(variant: VariantReport, column: Column) -> str:
    measurement = measured(variant, column)
    return "" if measurement is None else repr(measurement.value)


def _json_text(value: Any) -> str:
    """A parameter's value: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _short(digest: str) -> str:
    """The first digits of a digest, enough to tell two apart by eye; the whole stands beside or in the title."""
    return digest.removeprefix("sha256:")[:12]


def _bound(bound: Bound) -> str:
    """A gate's range as an inequality."""
    if bound.min is not None and bound.max is not None:
        return f"{bound.min:g} … {bound.max:g}"
    return f"≥ {bound.min:g}" if bound.max is None else f"≤ {bound.max:g}"


def _deviating(check: Check, gate: Gate) -> bool:
    """Whether a variant's bound is not the one in the column's head."""
    return _bound(check.bound) != gate.bound


def _tiles(report: ReleaseReport) -> list[Tile]:
    """What a reader with ten seconds takes away."""
    passed = [variant for variant in report.judged if variant.outcome == "passed"]
    tiles = [Tile("variants passed", f"{len(passed)} of {len(report.judged)}", "", _required(report))]
    for title, measure, number, unit in (
        ("smallest that passed", "size", 1e-6, "MB"),
        ("fastest that passed", "decode_rate", 1.0, "tokens/s"),
        ("closest to the source", "kl_divergence", 1.0, "nats / token"),
    ):
        having = [(m.value, variant) for variant in passed if (m := variant.measurement(measure))]
        if not having:
            continue
        pick = max if MEASURES[measure].better == "higher" else min
        value, variant = pick(having, key=lambda pair: pair[0])
        # The base's own divergence is next to nothing: a ratio to it would say nothing.
        detail = variant.variant + ("" if measure == "kl_divergence" else _against_base(report, variant, measure))
        decimals = 4 if measure == "kl_divergence" else None
        tiles.append(Tile(title, figure(value * number, decimals), unit, detail))
    return tiles


def _required(report: ReleaseReport) -> str:
    required = [variant for variant in report.judged if variant.required]
    passed = sum(variant.outcome == "passed" for variant in required)
    return f"{passed} of {len(required)} required"


def _against_base(report: ReleaseReport, variant: VariantReport, measure: str) -> str:
    """How a figure stands to that of the unquantized base of the same format."""
    for base in report.variants:
        if base.is_base and base.format == variant.format:
            mine, theirs = variant.measurement(measure), base.measurement(measure)
            if mine and theirs and theirs.value:
                ratio = mine.value / theirs.value
                if measure == "size":
                    return f", {ratio:.0%} of {base.type}"
                return f", {ratio:.1f} × {base.type}"
    return ""


def _plots(report: ReleaseReport) -> list[Markup]:
    """Quality against size and against speed."""
    plots = []
    gate = _common_gate(report, "kl_divergence")
    formats = {variant.format for variant in report.judged}
    for measure, x_title, scale, unit in (
        ("size", "size, MB (smaller is better)", 1e-6, "MB"),
        ("decode_rate", "decode, tokens/s (faster is better)", 1.0, "tokens/s"),
    ):
        points = _points(report, measure, scale, unit, len(formats) > 1)
        if not points:
            continue
        asides = [
            Aside(m.value * scale, f"{base.type} base, {three_digits(m.value * scale)} {unit}")
            for base in report.variants
            if base.is_base and (m := base.measurement(measure))
        ]
        drawing = scatter(
            points,
            title=f"KL divergence against {MEASURES[measure].title}",
            x_title=x_title,
            y_title="KL divergence, nats / token (lower is better)",
            higher_x=MEASURES[measure].better == "higher",
            gate=gate,
            aside=asides[0] if len(asides) == 1 else None,
        )
        plots.append(Markup(drawing))
    return plots


def _points(report: ReleaseReport, measure: str, scale: float, unit: str, with_format: bool) -> list[Point]:
    points = []
    for variant in report.judged:
        x, y = variant.measurement(measure), variant.measurement("kl_divergence")
        if x is None or y is None:
            continue
        label = variant.variant if with_format else variant.variant.partition(":")[2]
        detail = f"{variant.variant} ({variant.outcome}): KL {y.value:.4g}, {three_digits(x.value * scale)} {unit}"
        passed = variant.outcome == "passed"
        points.append(Point(x.value * scale, y.value, y.spread, label, detail, passed))
    return points


def _common_gate(report: ReleaseReport, measure: str) -> float | None:
    """The upper bound of a measure where every variant has the same."""
    bounds = {
        next((check.bound.max for check in variant.verdict.checks if check.measure == measure), None)
        for variant in report.judged
        if variant.verdict
    }
    return bounds.pop() if len(bounds) == 1 else None


def _gates(report: ReleaseReport) -> list[Gate]:
    """Every gate that a variant has, in the order of the measures."""
    bounds: dict[str, list[str]] = {}
    for variant in report.judged:
        for check in variant.verdict.checks if variant.verdict else ():
            bounds.setdefault(check.measure, []).append(_bound(check.bound))
    return [
        Gate(measure, short_title(measure), max(bounds[measure], key=bounds[measure].count))
        for measure in MEASURES
        if measure in bounds
    ]


class GivenAnswer(NamedTuple):
    """One answer and who gave it."""

    text: str
    stopped: bool
    tokens: int
    names: str


def _check_of(variant: VariantReport, gate: Gate) -> Check | None:
    """The check behind one cell of the gates; None where that variant has no such gate."""
    checks = variant.verdict.checks if variant.verdict else ()
    return next((check for check in checks if check.measure == gate.measure), None)


def _answers(report: ReleaseReport) -> list[tuple[str, list[GivenAnswer]]]:
    """For each prompt every answer that differs, so that what quantization changed is seen at once."""
    prompts: dict[str, dict[tuple[str, bool, int], list[str]]] = {}
    for variant in report.variants:
        for answer in variant.answers:
            key = (answer.text, answer.stopped, answer.tokens)
            prompts.setdefault(answer.prompt, {}).setdefault(key, []).append(variant.variant)
    asked = sum(bool(variant.answers) for variant in report.variants)
    return [
        (prompt, [GivenAnswer(*key, _names(names, asked)) for key, names in answers.items()])
        for prompt, answers in prompts.items()
    ]


def _names(names: Sequence[str], asked: int) -> str:
    return f"all {asked} that were asked" if len(names) == asked > 2 else ", ".join(names)


def _seen(check: Check) -> str:
    """What a gate saw, as its cell says it."""
    if check.value is None:
        return "missing"
    if MEASURES[check.measure].unit == "bool":
        return "yes" if check.value else "no"
    return f"{check.value:.4g}"


def _moment(iso: str) -> str:
    """A time as people read it: date, hour and minute in UTC."""
    return f"{iso[:10]} {iso[11:16]} UTC" if iso.endswith("Z") else iso
