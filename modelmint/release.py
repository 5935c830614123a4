"""What a release says of itself: the report that people read.

Laws, tested under the same words:

* a report read back from its text is equal to what was written;
* a stage that failed beats a gate that failed, and a variant that is not required fails for itself only.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from modelmint.artifact import Digest, StepRecord, Tool, canonical_json
from modelmint.recipe import Recipe
from modelmint.report import MEASURES, Answer, HardwareClass, Host, Measurement, Value, Verdict

STAGES = ("acquire", "inspect", "text", "convert", "quantize", "reference", "evaluate", "benchmark")
"""The stages in the order in which a report and a lock list them; a stage unknown here comes last."""

DOCUMENT = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)


def stage_order(stage: str) -> tuple[int, str]:
    """Where a stage stands among the others."""
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


class StepReport(Value):
    """One step of a release: what was asked, with what, and what came of it.

    Attributes:
        key: the step's key.
        stage: the stage's name.
        reused: whether its result was found in the store.
        seconds: wall-clock time of the work when it was done, in this release or an earlier one.
        parameters: the parameters in full.
        inputs: digests of artifacts by their role.
        tools: the tools used, with versions and flags.
        output: digest of the artifact it made.
        finished: when it was recorded, ISO 8601 in UTC.
        host: name of the machine that did it.
        notes: sentences that fell out of the work.
        network_isolated: whether it was done without network; None where that does not apply.
    """

    key: Digest
    stage: str
    reused: bool
    seconds: float = Field(ge=0)
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    inputs: dict[str, Digest] = Field(default_factory=dict)
    tools: tuple[Tool, ...] = ()
    output: Digest
    finished: str
    host: str
    notes: tuple[str, ...] = ()
    network_isolated: bool | None = None

    @classmethod
    def of(cls, record: StepRecord, reused: bool) -> Self:
        """The step of that record."""
        return cls(
            key=record.key,
            stage=record.step.stage,
            reused=reused,
            seconds=record.seconds,
            parameters=record.step.parameters,
            inputs=record.step.inputs,
            tools=record.step.tools,
            output=record.output,
            finished=record.finished,
            host=record.host,
            notes=record.notes,
            network_isolated=record.network_isolated,
        )


class StepCount(Value):
    """How many steps a release did itself and how many it found done."""

    executed: int = Field(default=0, ge=0)
    reused: int = Field(default=0, ge=0)

    @classmethod
    def of(cls, steps: Iterable[StepReport]) -> Self:
        """Count each key once; a step that one variant executed and another found done was executed."""
        executed: dict[str, bool] = {}
        for step in steps:
            executed[step.key] = executed.get(step.key, False) or not step.reused
        return cls(executed=sum(executed.values()), reused=len(executed) - sum(executed.values()))

    @property
    def total(self) -> int:
        """All steps."""
        return self.executed + self.reused


class VariantReport(Value):
    """One variant, or the unquantized base of a format, as it was made, measured and judged.

    Attributes:
        variant: ``format:type[@label]``.
        format: the format's name.
        type: the quantization type.
        label: names its options; empty for the plain type.
        required: whether its failed verdict fails the release.
        is_base: True for an unquantized base, which is measured for comparison and not judged.
        digest: of the artifact; empty if it was not made.
        size_bytes: of all files together; 0 if it was not made.
        files: user-facing names.
        options: the format's options in full.
        base: digest of the unquantized base it was made from; empty for a base and where there is none.
        measurements: every figure, each measure once.
        answers: what it said to the recipe's prompts.
        notes: sentences for the reader.
        verdict: None for a base.
        steps: how it was made, in order.
    """

    variant: str
    format: str
    type: str
    label: str = ""
    required: bool = True
    is_base: bool = False
    digest: Digest | Literal[""] = ""
    size_bytes: int = Field(default=0, ge=0)
    files: tuple[str, ...] = ()
    options: dict[str, JsonValue] = Field(default_factory=dict)
    base: Digest | Literal[""] = ""
    measurements: tuple[Measurement, ...] = ()
    answers: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = ()
    verdict: Verdict | None = None
    steps: tuple[StepReport, ...] = ()

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if self.is_base is not (self.verdict is None):
            raise ValueError(f"{self.variant}: a variant has a verdict and a base has none")
        names = [m.measure for m in self.measurements]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"{self.variant}: measured twice: {', '.join(doubled)}")
        return self

    @property
    def outcome(self) -> Literal["base", "passed", "failed", "incomplete"]:
        """How it ended: ``incomplete`` where a stage could not finish."""
        if self.verdict is None:
            return "base"
        if self.verdict.failure:
            return "incomplete"
        return "passed" if self.verdict.passed else "failed"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, one sentence each."""
        return () if self.verdict is None else self.verdict.reasons

    def measurement(self, measure: str) -> Measurement | None:
        """The figure of that measure; None where it was not taken."""
        return next((m for m in self.measurements if m.measure == measure), None)


class SourceReport(Value):
    """The checkpoint everything was made from.

    Attributes:
        reference: the pinned text form, such as ``hf:organization/name@commit``.
        model: the model's name.
        revision: commit, tree digest or version; empty where the source has none.
        digest: of the snapshot; empty if it was not acquired.
        license: as the card names it; empty if it names none.
        architecture: as its configuration names it.
        parameters: number of weights.
        size_class: micro, small, medium or large.
        context_length: tokens; 0 where unknown.
        notice: a sentence to repeat wherever figures are shown, such as that the source was itself quantized.
    """

    reference: str
    model: str
    revision: str = ""
    digest: Digest | Literal[""] = ""
    license: str = ""
    architecture: str = ""
    parameters: int = Field(default=0, ge=0)
    size_class: str = ""
    context_length: int = Field(default=0, ge=0)
    notice: str = ""


class EvaluationReport(Value):
    """What quality was measured against, and on which text.

    Attributes:
        reference: ``source`` or ``base``.
        dtype: the arithmetic of the reference.
        data: where the text came from.
        text_digest: of the text itself.
        window: tokens in a window.
        windows: how many were taken.
        positions: how many predictions were scored.
        exact: whether the reference holds every token's probability rather than the compact estimate.
        top: tokens kept for each position.
        sample: tokens drawn from the rest.
    """

    reference: Literal["source", "base"]
    dtype: str
    data: str
    text_digest: Digest
    window: int = Field(ge=1)
    windows: int = Field(ge=1)
    positions: int = Field(ge=1)
    exact: bool = False
    top: int = Field(default=0, ge=0)
    sample: int = Field(default=0, ge=0)


class Links(Value):
    """Where the release is recorded elsewhere; empty where there is no such record."""

    flow_run: str = ""
    flow_run_url: str = ""
    tracking_run: str = ""
    tracking_url: str = ""


class ReleaseReport(Value):
    """Everything that one release learned.

    Attributes:
        schema_version: version of this document's layout.
        release: the release's name.
        recipe: what was wanted.
        recipe_digest: of the recipe as this version read it.
        source: the checkpoint.
        variants: bases first, then the variants in the recipe's order.
        evaluation: what quality was measured against; None if it came to no evaluation.
        host: the machine the figures were taken on; None if there are none.
        hardware: its class, as the tools used it.
        steps: the steps that belong to no single variant: acquire, inspect, reference.
        step_count: all steps of the release, each once.
        created: when it ended, ISO 8601 in UTC.
        seconds: wall-clock time of the whole release.
        continues: the earlier release that did not finish and that this one went on with; empty for none.
        failure: why the release stopped as a whole; empty if it did not.
        links: its records elsewhere.
        modelmint: the version that made it.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    release: str = Field(min_length=1)
    recipe: Recipe
    recipe_digest: Digest
    source: SourceReport
    variants: tuple[VariantReport, ...]
    evaluation: EvaluationReport | None = None
    host: Host | None = None
    hardware: HardwareClass | None = None
    steps: tuple[StepReport, ...] = ()
    step_count: StepCount = StepCount()
    created: str
    seconds: float = Field(ge=0)
    continues: str = ""
    failure: str = ""
    links: Links = Links()
    modelmint: str = ""

    model_config = DOCUMENT

    @property
    def judged(self) -> tuple[VariantReport, ...]:
        """The variants, without the bases."""
        return tuple(variant for variant in self.variants if not variant.is_base)

    def variant(self, name: str) -> VariantReport:
        """The variant or base of that name.

        Raises:
            KeyError: if the release has none.
        """
        for variant in self.variants:
            if variant.variant == name:
                return variant
        raise KeyError(name)

    def to_json(self) -> bytes:
        """The text that is stored."""
        return canonical_json(self.model_dump(mode="json"))


def merged(*groups: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """The figures of several steps as one list in the order of `MEASURES`.

    Raises:
        ValueError: if a measure comes twice with different figures.
    """
    by_name: dict[str, Measurement] = {}
    for measurement in (m for group in groups for m in group):
        known = by_name.setdefault(measurement.measure, measurement)
        if known != measurement:
            raise ValueError(f"{measurement.measure} was measured twice: {known.value} and {measurement.value}")
    return tuple(by_name[name] for name in MEASURES if name in by_name)


def exit_code(report: ReleaseReport) -> Literal[0, 3, 4]:
    """What the command line returns for a release.

    Returns:
        0 where every required variant passed, 3 where a gate of one failed, 4 where a stage of one, or the release
        as a whole, could not finish; 4 beats 3.
    """
    outcomes = {variant.outcome for variant in report.judged if variant.required}
    if report.failure or "incomplete" in outcomes:
        return 4
    return 3 if "failed" in outcomes else 0


def release_json(report: ReleaseReport, lock_path: Path, report_path: Path) -> dict[str, Any]:
    """The one object that ``release --json`` prints.

    Args:
        report: what the release learned.
        lock_path: where its lock lies.
        report_path: where its report lies.

    Returns:
        Plain JSON values; `measurements` by their measure, each with value, unit, direction, trials and spread.
    """
    return {
        "release": report.release,
        "lock": str(lock_path),
        "report": str(report_path),
        "steps": report.step_count.model_dump(mode="json"),
        "variants": [
            {
                "variant": variant.variant,
                "digest": variant.digest,
                "size_bytes": variant.size_bytes,
                "verdict": "passed" if variant.outcome == "passed" else "failed",
                "reasons": list(variant.reasons),
                "measurements": {m.measure: _measurement_json(m) for m in variant.measurements},
            }
            for variant in report.judged
        ],
    }


def _measurement_json(measurement: Measurement) -> dict[str, Any]:
    plain = measurement.model_dump(mode="json", exclude={"measure"})
    hardware = None if measurement.hardware is None else str(measurement.hardware)
    return {**plain, "unit": measurement.unit, "better": measurement.better, "hardware": hardware}
