"""Runs stages from a command by themselves, without the orchestrator: shown as in a release, and stopped like one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from flows import console
from flows.signals import stopped_by_signals
from flows.stages import Stages
from modelmint.artifact import StepRecord
from modelmint.errors import ModelMintError
from modelmint.progress import BEGUN
from modelmint.settings import Settings
from modelmint.step import Context, StepResult
from modelmint.store import Store


@dataclass
class Work:
    """What stages run with.

    Attributes:
        store: where results are kept.
        settings: limits and addresses.
        stages: shows what runs.
    """

    store: Store
    settings: Settings
    stages: Stages

    def context(self, label: str) -> Context:
        """The context of a stage that shows itself under a label."""
        self.stages.heard(label, BEGUN)
        return Context(self.store, self.settings, on_progress=partial(self.stages.heard, label))

    def do(self, label: str, stage: Callable[[Context], StepResult]) -> StepResult:
        """Run one stage and say how it ended.

        Raises:
            ModelMintError: as the stage.
        """
        try:
            result = stage(self.context(label))
        except ModelMintError as error:
            self.stages.finished(label, "Failed", str(error))
            raise
        self.stages.finished(label, "Cached" if result.reused else "Completed")
        return result

    def caught(self, do: Callable[[], StepResult]) -> StepResult | ModelMintError:
        """The result of some stages, or the error that one of them ended with."""
        try:
            return do()
        except ModelMintError as error:
            return error


class _Anew(Store):
    """A store that finds no result of one stage, which is an observation, and keeps none."""

    def __init__(self, root: "Store", stage: str) -> None:
        super().__init__(root.root)
        self._stage = stage

    def record(self, key: str) -> StepRecord | None:
        """The record of a step, unless it is of that stage."""
        found = super().record(key)
        return None if found is not None and found.step.stage == self._stage else found

    def commit(self, record: StepRecord) -> StepRecord:
        """Write a record, unless it is of that stage."""
        return record if record.step.stage == self._stage else super().commit(record)


@contextmanager
def working(settings: Settings, *, anew: str = "") -> Iterator[Work]:
    """Have stages shown, and stopped by Ctrl-C and SIGTERM.

    Args:
        settings: where things lie.
        anew: a stage whose results are made again and not kept.
    """
    store = Store(settings.store)
    with Stages(console.err()) as stages, stopped_by_signals(stages.stop):
        yield Work(_Anew(store, anew) if anew else store, settings, stages)
