"""Runs a step once: looks its key up, locks it, does the work in a scratch folder, and records the result last."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from modelmint import locks
from modelmint.artifact import Invocation, Step, StepRecord
from modelmint.errors import ModelMintError, StageError, ToolError
from modelmint.files import disk_full, full_disk_named, is_full
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
    invocation: Invocation = field(default_factory=Invocation)
    on_progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class Workspace:
    """Scratch space of one step.

    Attributes:
        folder: for inputs and intermediate files; removed afterwards.
        out: the folder whose contents become the output.
        lock: descriptor of the step's lock, which child processes inherit so that an orphan never races the next owner.
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
    """Do a step unless it is done.

    Args:
        context: where results are kept, and who asks.
        step: what is asked; its key decides whether it is done.
        work: fills `Workspace.out`; called at most once, and by one process of all that ask for the same step.
        machine: what the work asks of this host.

    Raises:
        ToolError: if the work left its output folder empty.
        ResourceError: if the disk is full.
        NonDeterminismError: if the step was done before with another output.
        ModelMintError: what the work raised.
    """
    result = run_steps(
        context, {step.stage: step}, lambda places: {step.stage: work(places[step.stage])}, machine=machine
    )
    done = result[step.stage]
    if isinstance(done, ModelMintError):
        raise done
    return done


def run_steps(
    context: Context,
    steps: Mapping[str, Step],
    work: Callable[[Mapping[str, Workspace]], Mapping[str, Work | ModelMintError]],
    *,
    machine: Machine = "shared",
) -> dict[str, StepResult | ModelMintError]:
    """Do several steps in one piece of work, such as interleaved benchmarks: only those that are not done yet.

    Args:
        context: where results are kept, and who asks.
        steps: what is asked, by names of the caller's choice.
        work: given a workspace for each name that is not done, answers with what it did, or why it could not, for each.
            Two names of one and the same step are done once, under the first name.
        machine: what the work asks of this host.

    Returns:
        For each name its result, or the error that concerns it. An error of one name leaves the others alone; where
        `work` itself raises a `ModelMintError`, every name that was missing gets it.
    """
    names: dict[str, str] = {}
    for name, step in steps.items():
        names.setdefault(step.key, name)
    found = {key: record for key in names if (record := context.store.record(key))}
    results: dict[str, StepResult | ModelMintError] = {key: StepResult(record, True) for key, record in found.items()}
    missing = sorted(names.keys() - results.keys())
    if missing:
        results |= _do(context, {key: (names[key], steps[names[key]]) for key in missing}, work, machine)
    return {name: results[step.key] for name, step in steps.items()}


def _do(
    context: Context,
    missing: Mapping[str, tuple[str, Step]],
    work: Callable[[Mapping[str, Workspace]], Mapping[str, Work | ModelMintError]],
    machine: Machine,
) -> dict[str, StepResult | ModelMintError]:
    """Lock the keys, look again, and do what is still missing; in the order of keys, so that nobody waits in a ring."""
    store = context.store
    results: dict[str, StepResult | ModelMintError] = {}
    with ExitStack() as stack:
        try:
            stack.enter_context(store.in_use("a step"))
            places: dict[str, Workspace] = {}
            for key, (name, step) in missing.items():
                lock = stack.enter_context(store.lock(key, _purpose(name, step)))
                record = store.record(key)
                if record is not None:
                    results[key] = StepResult(record, True)
                else:
                    places[key] = Workspace(Path(), Path(), lock)
            if not places:
                return results
            if machine != "network":
                purpose = ", ".join(_purpose(*missing[key]) for key in places)
                stack.enter_context(locks.machine(context.settings.host_lock, machine, purpose))
            with full_disk_named(store.root):
                for key in places:
                    places[key] = _place(stack.enter_context(store.workspace(key)), places[key].lock)
            started = time.monotonic()
            answers = _call(context, {missing[key][0]: place for key, place in places.items()}, work)
        except ModelMintError as error:
            return {key: results.get(key, error) for key in missing}
        # Of work done together each step gets its equal share, so that the seconds of all records add up.
        seconds = (time.monotonic() - started) / len(places)
        for key, place in places.items():
            name, step = missing[key]
            results[key] = _finish(context, name, step, place, answers.get(name), seconds)
    return results


def _place(folder: Path, lock: int) -> Workspace:
    """The two folders of a workspace; their names are fixed because tools write them into what they make."""
    place = Workspace(folder / "work", folder / "out", lock)
    place.folder.mkdir()
    place.out.mkdir()
    return place


def _call(
    context: Context,
    places: Mapping[str, Workspace],
    work: Callable[[Mapping[str, Workspace]], Mapping[str, Work | ModelMintError]],
) -> Mapping[str, Work | ModelMintError]:
    """Do the work; where it fails on a full disk, say that instead of what the tool made of it."""
    root = context.store.root
    with full_disk_named(root):
        try:
            answers = work(places)
        except StageError as error:
            if is_full(root):
                raise disk_full(root, f"a stage failed on it: {error}") from error
            raise
    if is_full(root):
        return {
            name: disk_full(root, f"a stage failed on it: {answer}") if isinstance(answer, StageError) else answer
            for name, answer in answers.items()
        }
    return answers


def _finish(
    context: Context, name: str, step: Step, place: Workspace, answer: Work | ModelMintError | None, seconds: float
) -> StepResult | ModelMintError:
    """Take the output in and write the record."""
    if isinstance(answer, ModelMintError):
        return answer
    if answer is None:
        return StageError(f"{_purpose(name, step)}: the work ended without a word about it; report this as a defect")
    try:
        if not any(place.out.iterdir()):
            return ToolError(f"{_purpose(name, step)} reported success and wrote nothing; see the log of its tool")
        output = context.store.add_folder(place.out)
        record = StepRecord(
            key=step.key,
            step=step,
            output=output.digest,
            seconds=seconds,
            finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
            host=os.uname().nodename,
            invocation=context.invocation,
            measurements=answer.measurements,
            notes=answer.notes,
            network_isolated=answer.network_isolated,
        )
        return StepResult(context.store.commit(record), False)
    except ModelMintError as error:
        return error


def _purpose(name: str, step: Step) -> str:
    return step.stage if name == step.stage else f"{step.stage} {name}"
