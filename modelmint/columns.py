"""The figures by which people compare variants, and how each is written: shared by terminal, page and Prefect's UI."""

from typing import NamedTuple

from modelmint.release import ReleaseReport, VariantReport
from modelmint.report import MEASURES, Measurement

MISSING = "–"


class Column(NamedTuple):
    """One figure of a variant as a column.

    Attributes:
        measure: the measure shown.
        title: short title.
        unit: as it is shown, after `scale`.
        scale: factor from the measurement's unit to the unit shown.
        decimals: fixed number of decimals; None for three significant digits.
        keep: columns with a smaller number are left out first where the terminal is narrow.
        for_base: the measure that a base shows in this column instead; empty for the same.
    """

    measure: str
    title: str
    unit: str
    scale: float = 1.0
    decimals: int | None = None
    keep: int = 0
    for_base: str = ""


COLUMNS = (
    Column("size", "size", "MB", 1e-6, keep=9),
    Column("bits_per_weight", "bits", "/weight", 1.0, 2, keep=5),
    Column("kl_divergence", "KL divergence", "nats / token", 1.0, 4, keep=10, for_base="conversion_kl"),
    Column("top_1_agreement", "top-1", "%", 100.0, 1, keep=8),
    Column("perplexity_ratio", "PPL", "ratio", 1.0, 3, keep=3),
    Column("prefill_rate", "prefill", "tok/s", 1.0, keep=4),
    Column("decode_rate", "decode", "tok/s", 1.0, keep=7),
    Column("time_to_first_token", "TTFT", "ms", 1e3, keep=2),
    Column("peak_memory", "memory", "MB", 1e-6, keep=6),
)
"""In the order shown."""


def three_digits(number: float) -> str:
    """A figure with three significant digits, never in powers of ten where it is between 0.001 and a million."""
    size = abs(number)
    if size == 0 or size >= 99.95:
        return f"{number:.0f}"
    if size < 0.000_95:
        return f"{number:.1e}"
    decimals = 1 if size >= 9.995 else 2 if size >= 0.995 else 3 if size >= 0.0995 else 4
    return f"{number:.{decimals}f}"


def figure(number: float, decimals: int | None) -> str:
    """A figure with so many decimals, or with three significant digits where those would show nothing but zeros."""
    if decimals is None or (number and abs(number) < 10**-decimals):
        return three_digits(number)
    return f"{number:.{decimals}f}"


def measured(variant: VariantReport, column: Column) -> Measurement | None:
    """The measurement that a column shows of a variant."""
    found = variant.measurement(column.measure)
    if found is None and variant.is_base and column.for_base:
        return variant.measurement(column.for_base)
    return found


def cell(variant: VariantReport, column: Column, *, spread: bool = False) -> str:
    """What stands in a column: the figure, with its uncertainty where asked for and where there is one."""
    measurement = measured(variant, column)
    if measurement is None:
        return MISSING
    text = figure(measurement.value * column.scale, column.decimals)
    if spread and measurement.spread:
        text += f" ± {figure(measurement.spread * column.scale, column.decimals)}"
    return text


def best(report: ReleaseReport) -> dict[str, frozenset[str]]:
    """The names of the passed variants that show the best figure, by measure; none where all show the same."""
    found = {}
    for column in COLUMNS:
        values = {
            variant.variant: measurement.value
            for variant in report.judged
            if variant.outcome == "passed" and (measurement := variant.measurement(column.measure))
        }
        pick = max if MEASURES[column.measure].better == "higher" else min
        winner = pick(values.values(), default=None)
        if len(set(values.values())) > 1:
            found[column.measure] = frozenset(name for name, value in values.items() if value == winner)
    return found


def verdict_word(variant: VariantReport) -> str:
    """How a variant ended, in one or two words."""
    if variant.outcome in ("base", "passed") or variant.required:
        return variant.outcome
    return f"{variant.outcome}, optional"


def summary(report: ReleaseReport) -> str:
    """How a release ended, in one sentence."""
    total = len(report.judged)
    passed = sum(variant.outcome == "passed" for variant in report.judged)
    if report.failure:
        return f"The release stopped: {report.failure}"
    if passed == total:
        return "The variant passed its gates." if total == 1 else f"All {total} variants passed their gates."
    counts = []
    for outcome, said in (("failed", "failed a gate"), ("incomplete", "could not be finished")):
        for required, kind in ((True, "required"), (False, "optional")):
            count = sum(v.outcome == outcome and v.required is required for v in report.judged)
            if count:
                counts.append(f"{count} {kind} {said}")
    return f"{passed} of {total} variants passed; {', '.join(counts)}."


def rows(report: ReleaseReport) -> list[dict[str, str]]:
    """The release as plain rows with titles, for tables that others draw."""
    return [
        {
            "variant": variant.variant,
            **{heading(column): cell(variant, column, spread=column.measure == "kl_divergence") for column in COLUMNS},
            "verdict": verdict_word(variant),
            "reasons": "; ".join(variant.reasons),
        }
        for variant in report.variants
    ]


def heading(column: Column) -> str:
    """A column's title with its unit."""
    return f"{column.title} {column.unit}".rstrip()


def short_title(measure: str) -> str:
    """A measure's name for a narrow head, such as ``KL divergence`` or ``top-1 agreement``."""
    words = measure.replace("top_1", "top-1").split("_")
    return " ".join("KL" if word == "kl" else word for word in words)


def count_of_weights(parameters: int) -> str:
    """The number of weights as people say it: ``135 M``, ``3.84 B``."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= factor:
            return f"{three_digits(parameters / factor)} {letter}"
    return str(parameters)


def plain(text: str) -> str:
    """A foreign text that can do nothing to a terminal: control and formatting characters become U+FFFD."""
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)
