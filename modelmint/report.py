"""What was learned: measurements, the gates they are held against, and the verdict.

Laws, tested under the same words:

* a measurement is a finite number; NaN is refused, not averaged;
* judging is pure: the same measurements and gates give the same verdict;
* a gate whose measure is missing fails, and a gate without a bound cannot be written.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modelmint.spelling import did_you_mean


class Value(BaseModel):
    """A frozen value: unknown keys are refused, equality is by content."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(NamedTuple):
    """What a measure is called for a person, its unit, and which way is better."""

    title: str
    unit: str
    better: Literal["lower", "higher", "none"]


MEASURES: dict[str, Measure] = {
    # quality, against the reference
    "kl_divergence": Measure("mean KL divergence", "nats/token", "lower"),
    "kl_divergence_p99": Measure("99th percentile of KL divergence", "nats/token", "lower"),
    "top_1_agreement": Measure("top-1 agreement", "fraction", "higher"),
    "perplexity": Measure("perplexity", "1", "lower"),
    "perplexity_ratio": Measure("perplexity / reference", "ratio", "lower"),
    "conversion_kl": Measure("mean KL divergence of the unquantized base to the source", "nats/token", "lower"),
    # soundness: 1 is yes, 0 is no
    "loads": Measure("loads", "bool", "higher"),
    "finite_logits": Measure("every logit is finite", "bool", "higher"),
    "tokenizer_parity": Measure("texts that tokenize as the source does", "fraction", "higher"),
    "template_parity": Measure("chats that render as the source does", "fraction", "higher"),
    "special_tokens_parity": Measure("special tokens equal to the source's", "fraction", "higher"),
    "generates": Measure("prompts answered with text", "fraction", "higher"),
    "stops": Measure("answers that reached end-of-sequence", "fraction", "higher"),
    # what the files are
    "size": Measure("size of the files", "bytes", "lower"),
    "bits_per_weight": Measure("effective bits per weight", "bits", "lower"),
    "fallback_tensors": Measure("tensors that fell back to another type", "count", "lower"),
    # speed and memory
    "load_time": Measure("load time", "s", "lower"),
    "time_to_first_token": Measure("time to first token", "s", "lower"),
    "prefill_rate": Measure("prefill", "tokens/s", "higher"),
    "decode_rate": Measure("decode", "tokens/s", "higher"),
    "peak_memory": Measure("peak resident memory", "bytes", "lower"),
    "prefill_speedup": Measure("prefill / base", "ratio", "higher"),
    "decode_speedup": Measure("decode / base", "ratio", "higher"),
}
"""Every measure by the name that recipes, records and MLflow use."""


class HardwareClass(Value):
    """The kind of machine a figure holds for: the same file can be sound on one and noise on another.

    Attributes:
        instructions: the widest instruction set the tools may use here, such as ``x86-64 avx2 fma f16c``.
        provider: what computes: ``cpu`` or the name of an execution provider.
        threads: the number of threads the tool was given.
    """

    instructions: str = Field(min_length=1)
    provider: str = Field(default="cpu", min_length=1)
    threads: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.instructions}, {self.provider}, {self.threads} threads"


class Host(Value):
    """The machine a figure was taken on.

    Attributes:
        cpu: the processor's model name.
        cores: logical cores this process may use.
        flags: instruction-set flags as the kernel names them, sorted.
        memory_bytes: physical memory.
        system: operating system, kernel release and machine type.
        name: the host's name.
    """

    cpu: str
    cores: int = Field(ge=1)
    flags: tuple[str, ...]
    memory_bytes: int = Field(ge=0)
    system: str
    name: str


class Measurement(Value):
    """One figure with all that is needed to read it.

    Attributes:
        measure: a name in `MEASURES`; unit and direction follow from it.
        value: the figure itself, always finite.
        trials: how many observations it was made from (positions, windows or runs).
        spread: its uncertainty in the same unit; 0 where it is exact.
        statistic: what `value` is of the trials; the spread of a mean is its standard error, that of a median the
            half-width of the interquartile range.
        hardware: the class it was taken on; None for a property of the files alone.
    """

    measure: str
    value: float
    trials: int = Field(default=1, ge=1)
    spread: float = Field(default=0.0, ge=0)
    statistic: Literal["exact", "mean", "median", "p99", "max", "ratio"] = "exact"
    hardware: HardwareClass | None = None

    @field_validator("measure")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}{did_you_mean(name, MEASURES)}")
        return name

    @field_validator("value", "spread")
    @classmethod
    def _finite(cls, number: float) -> float:
        if not math.isfinite(number):
            raise ValueError(f"a measurement must be finite, not {number}")
        return number

    @property
    def unit(self) -> str:
        """The unit of `value` and `spread`."""
        return MEASURES[self.measure].unit

    @property
    def better(self) -> Literal["lower", "higher", "none"]:
        """Which way is better."""
        return MEASURES[self.measure].better


class Answer(Value):
    """What a variant said to one prompt, greedily.

    Attributes:
        prompt: the user's message.
        text: the answer as text, without special tokens.
        tokens: how many tokens it took.
        stopped: whether end-of-sequence was reached; otherwise the limit of tokens ended it.
    """

    prompt: str
    text: str
    tokens: int = Field(ge=0)
    stopped: bool


class Measurements(Value):
    """The document that an evaluate or benchmark step stores.

    Attributes:
        schema_version: version of this document's layout.
        measurements: the figures, each measure once.
        answers: what the variant said to the recipe's prompts.
        notes: sentences for the report, such as which texts tokenized differently.
        host: the machine the figures were taken on, where they depend on it.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    measurements: tuple[Measurement, ...]
    answers: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = ()
    host: Host | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [m.measure for m in self.measurements]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"measured twice: {', '.join(doubled)}")
        return self


class Bound(Value):
    """The range a gate allows, inclusive at both ends; at least one end is given."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both; to take a default gate away write null")
        for end in (self.min, self.max):
            if end is not None and not math.isfinite(end):
                raise ValueError(f"a gate's bound must be finite, not {end}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


Gates = Mapping[str, Bound]
"""Gates by the measure that each one bounds."""

DEFAULT_GATES: dict[str, Bound] = {
    "kl_divergence": Bound(max=0.15),
    "top_1_agreement": Bound(min=0.80),
    "conversion_kl": Bound(max=0.001),
    "loads": Bound(min=1),
    "finite_logits": Bound(min=1),
    "tokenizer_parity": Bound(min=1),
    "template_parity": Bound(min=1),
    "special_tokens_parity": Bound(min=1),
    "generates": Bound(min=1),
}
"""What a variant must show unless its recipe says otherwise."""


class Check(Value):
    """One gate held against one measurement.

    Attributes:
        measure: what was bounded.
        bound: the range allowed.
        value: what was measured; None where it is missing, and then the check has failed.
        passed: whether the value lies in the range.
        reason: a sentence that says so, with value, bound and, on failure, the way out.
    """

    measure: str
    bound: Bound
    value: float | None
    passed: bool
    reason: str


class Verdict(Value):
    """Whether a variant may be published, and why.

    Attributes:
        passed: every check passed.
        checks: one for each gate, in the order of their names.
        hardware: the classes that the measurements were taken on, as text.
        failure: what went wrong where a stage could not finish; then the verdict has failed.
    """

    passed: bool
    checks: tuple[Check, ...]
    hardware: tuple[str, ...] = ()
    failure: str = ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, one sentence each; empty for a passed verdict."""
        failed = tuple(check.reason for check in self.checks if not check.passed)
        return (self.failure, *failed) if self.failure else failed


def judge(measurements: Sequence[Measurement], gates: Gates, failure: str = "") -> Verdict:
    """Hold measurements against gates.

    Args:
        measurements: the figures of one variant; each measure at most once.
        gates: the bounds by measure.
        failure: why a stage of the variant could not finish; it fails the verdict whatever the figures say.

    Returns:
        The verdict, with a check for every gate. A measure that is missing fails its gate.
    """
    by_name = {m.measure: m for m in measurements}
    checks = tuple(_check(name, gates[name], by_name.get(name)) for name in sorted(gates))
    classes = sorted({str(m.hardware) for m in measurements if m.hardware is not None})
    return Verdict(
        passed=not failure and all(check.passed for check in checks),
        checks=checks,
        hardware=tuple(classes),
        failure=failure,
    )


def _check(name: str, bound: Bound, measurement: Measurement | None) -> Check:
    title = MEASURES[name].title
    if measurement is None:
        reason = f"{title} was not measured, and a gate asks for it"
        return Check(measure=name, bound=bound, value=None, passed=False, reason=reason)
    value, unit = measurement.value, "" if measurement.unit in ("bool", "1", "fraction") else f" {measurement.unit}"
    if bound.max is not None and value > bound.max:
        reason = f"{title} {value:.4g}{unit} is above the gate's {bound.max:g}"
    elif bound.min is not None and value < bound.min:
        reason = f"{title} {value:.4g}{unit} is below the gate's {bound.min:g}"
    else:
        reason = f"{title} {value:.4g}{unit} is within the gate"
        return Check(measure=name, bound=bound, value=value, passed=True, reason=reason)
    return Check(measure=name, bound=bound, value=value, passed=False, reason=reason)
