"""What a release would do, before it does it: the values that ``modelmint plan`` prints."""

from typing import Literal

from pydantic import Field

from modelmint.release import StepCount
from modelmint.report import Value


class PlannedStep(Value):
    """One step ahead.

    Attributes:
        stage: the stage's name.
        state: ``reused`` if its result is in the store, else ``runs``.
    """

    stage: str
    state: Literal["runs", "reused"]


class PlannedVariant(Value):
    """One variant or base ahead.

    Attributes:
        variant: its name.
        required: whether its failure would fail the release.
        is_base: True for an unquantized base.
        size_bytes: predicted or known size of its files; None where nothing is known yet.
        steps: those of its own, in order.
        refusal: why it cannot be made; empty if it can.
    """

    variant: str
    required: bool = True
    is_base: bool = False
    size_bytes: int | None = Field(default=None, ge=0)
    steps: tuple[PlannedStep, ...] = ()
    refusal: str = ""


class Plan(Value):
    """A release ahead.

    Attributes:
        recipe: the recipe's name.
        source: the pinned text form of the checkpoint.
        model: the model's name.
        variants: bases first, then the variants in the recipe's order.
        steps: the steps that belong to no single variant.
        step_count: what would be executed and what is reused, each step once.
        disk_bytes: disk it would take.
        disk_free_bytes: disk that is free where the store lies.
        memory_bytes: estimated peak of memory; None where nothing is known.
        seconds: estimated time; None where no earlier step of the kind is on record.
        notes: sentences to repeat, such as that the source was itself quantized.
    """

    recipe: str
    source: str
    model: str
    variants: tuple[PlannedVariant, ...]
    steps: tuple[PlannedStep, ...] = ()
    step_count: StepCount = StepCount()
    disk_bytes: int = Field(default=0, ge=0)
    disk_free_bytes: int = Field(default=0, ge=0)
    memory_bytes: int | None = Field(default=None, ge=0)
    seconds: float | None = Field(default=None, ge=0)
    notes: tuple[str, ...] = ()
