"""Runs a step once: looks its key up, locks it, does the work in a scratch folder, and records the result last."""
# Contract: to be filled in. Keep these signatures.

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from modelmint.artifact import Invocation, Step, StepRecord
from modelmint.errors import ModelMintError
from modelmint.isolate import Progress
from modelmint.report import Measurement
from modelmint.settings import Settings
from modelmint.store import Store


@dataclass(frozen=True)
class Context:
    """What every stage is given: where to keep results, what the machine may spend, and who asks.

    Attributes:
        store: where results are kept and looked up.
        settings: limits and addresses.
        invocation: the runs that this work belongs to.
        on_progress: told how far a long stage is; None for nobody.
    """

    store: Store
    settings: Settings
    invocation: Invocation = Invocation()
    on_progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class Workspace:
    """Scratch space of one step.

    Attributes:
        folder: for inputs and intermediate files; removed afterwards.
        out: the folder whose contents become the output.
        lock: descriptor of the step's lock, which a child process inherits so that an orphan never races the next owner.
    """

    folder: Path
    out: Path
    lock: int


@dataclass(frozen=True)
class Work:
    """What a step's work says besides the files it wrote to `Workspace.out`."""

    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    network_isolated: bool | None = None


@dataclass(frozen=True)
class StepResult:
    """A step that is done.

    Attributes:
        record: its record.
        reused: whether it was found in the store rather than executed.
    """

    record: StepRecord
    reused: bool


Machine = Literal["network", "shared", "alone"]
"""What a step asks of the machine: nothing but the network, a share of the cores, or all of them for itself."""


def run_step(
    context: Context, step: Step, work: Callable[[Workspace], Work], *, machine: Machine = "shared"
) -> StepResult:
    """Do a step unless it is done."""
    raise NotImplementedError


def run_steps(
    context: Context,
    steps: Mapping[str, Step],
    work: Callable[[Mapping[str, Workspace]], Mapping[str, Work | ModelMintError]],
    *,
    machine: Machine = "shared",
) -> dict[str, StepResult | ModelMintError]:
    """Do several steps in one piece of work, such as interleaved benchmarks: only those that are not done yet."""
    raise NotImplementedError
