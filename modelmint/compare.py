"""Holds releases against each other: what became better, what worse, and what cannot be compared.

Laws, tested under the same words:

* a difference within twice its standard error is no difference;
* figures taken on other hardware, or quality on another text, are not compared but named as incomparable.
"""

import math
from collections.abc import Sequence
from typing import Literal

from modelmint.release import ReleaseReport, VariantReport
from modelmint.report import Measurement, Value

COMPARED = (
    "kl_divergence",
    "top_1_agreement",
    "perplexity_ratio",
    "size",
    "bits_per_weight",
    "prefill_rate",
    "decode_rate",
    "time_to_first_token",
    "peak_memory",
)
"""The measures compared, in the order shown."""

OF_THE_TEXT = frozenset({"kl_divergence", "top_1_agreement", "perplexity_ratio"})
OF_THE_MACHINE = frozenset({"prefill_rate", "decode_rate", "time_to_first_token", "peak_memory"})


class Change(Value):
    """One measure of a variant in two releases.

    Attributes:
        measure: the measure's name.
        before: its value in the first release; None where it was not taken.
        after: its value in the other release; None where it was not taken.
        relative: (after - before) / before; None where that has no meaning.
        judgement: whether `after` is better; ``same`` within the uncertainty.
        why: the reason where the two are incomparable.
    """

    measure: str
    before: float | None
    after: float | None
    relative: float | None = None
    judgement: Literal["better", "worse", "same", "incomparable", "missing"]
    why: str = ""


class CompareRow(Value):
    """One variant of a later release, held against the same variant of the first.

    Attributes:
        variant: its name.
        before: the first release's name.
        after: the later release's name.
        outcome_before: how the variant ended there; ``absent`` where it was not in the recipe.
        outcome_after: the same in the later release.
        same_bytes: whether both made the same artifact.
        changes: one for each measure that either release took.
    """

    variant: str
    before: str
    after: str
    outcome_before: str
    outcome_after: str
    same_bytes: bool
    changes: tuple[Change, ...]

    def change(self, measure: str) -> Change | None:
        """The change of that measure; None where neither release took it."""
        return next((change for change in self.changes if change.measure == measure), None)


def compare_rows(reports: Sequence[ReleaseReport]) -> tuple[CompareRow, ...]:
    """Every variant of every later release against the first release.

    Args:
        reports: two or more releases; the first is what the others are held against.

    Returns:
        Rows in the order of the releases and of the variants in them; variants that only the first has come last.

    Raises:
        ValueError: if fewer than two releases are given.
    """
    if len(reports) < 2:
        raise ValueError(f"a comparison needs two releases or more, not {len(reports)}")
    first = reports[0]
    rows = []
    for later in reports[1:]:
        names = dict.fromkeys([v.variant for v in later.variants] + [v.variant for v in first.variants])
        rows += [_row(name, first, later) for name in names]
    return tuple(rows)


def _row(name: str, first: ReleaseReport, later: ReleaseReport) -> CompareRow:
    before, after = _find(first, name), _find(later, name)
    changes = [_change(measure, before, after, _why_not(measure, first, later)) for measure in COMPARED]
    return CompareRow(
        variant=name,
        before=first.release,
        after=later.release,
        outcome_before=before.outcome if before else "absent",
        outcome_after=after.outcome if after else "absent",
        same_bytes=bool(before and after and before.digest and before.digest == after.digest),
        changes=tuple(change for change in changes if change is not None),
    )


def _find(report: ReleaseReport, name: str) -> VariantReport | None:
    return next((variant for variant in report.variants if variant.variant == name), None)


def _why_not(measure: str, first: ReleaseReport, later: ReleaseReport) -> str:
    """Why a measure of the two releases cannot be compared; empty if it can."""
    if measure in OF_THE_TEXT and first.evaluation != later.evaluation:
        return "measured on another text or against another reference"
    if measure in OF_THE_MACHINE and first.host and later.host:
        machines = {(host.cpu, host.cores, host.memory_bytes) for host in (first.host, later.host)}
        if len(machines) > 1:
            return "taken on another machine"
    return ""


def _change(measure: str, before: VariantReport | None, after: VariantReport | None, why: str) -> Change | None:
    old = before.measurement(measure) if before else None
    new = after.measurement(measure) if after else None
    if old is None or new is None:
        if old is new:
            return None
        known = {"before": old.value if old else None, "after": new.value if new else None}
        return Change.model_validate({"measure": measure, "judgement": "missing", **known})
    if not why and old.hardware != new.hardware:
        why = f"taken on another hardware class: {old.hardware} and {new.hardware}"
    relative = None if why or not old.value else (new.value - old.value) / abs(old.value)
    judgement = "incomparable" if why else _judgement(old, new)
    return Change(measure=measure, before=old.value, after=new.value, relative=relative, judgement=judgement, why=why)


def _judgement(old: Measurement, new: Measurement) -> Literal["better", "worse", "same"]:
    difference = new.value - old.value
    if abs(difference) <= 2 * math.hypot(old.spread, new.spread):
        return "same"
    return "better" if (difference < 0) is (new.better == "lower") else "worse"
