"""How a stage shows itself in Prefect: `Cached` for a reused step, and progress while it runs."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from prefect import Task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import MissingContextError
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Completed

from modelmint.errors import ModelMintError, NetworkError, StageError
from modelmint.isolate import Progress
from modelmint.progress import BEGUN, in_words
from modelmint.step import Context, StepResult

P = ParamSpec("P")
R = TypeVar("R")

ONCE: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
"""The store is the one cache: Prefect's own is off for every stage."""

NETWORK: dict[str, Any] = {**ONCE, "retries": 3, "retry_delay_seconds": [2, 10, 30], "retry_jitter_factor": 0.5}
"""Only what talks to a remote end is tried again by itself."""

LOG_SECONDS = 5.0
ARTIFACT_SECONDS = 2.0

LISTENERS: list[Callable[[str, Progress], None]] = []
"""Told of every step forward, with the stage's label: a command line shows its own bar."""


def network_failed(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task is worth another try: only where a remote end failed for now."""
    return isinstance(state.result(raise_on_failure=False), NetworkError)


def of(variant: str, stage: Task[P, R]) -> Task[P, R]:
    """The task of a stage for one variant: it bears the variant's name even if it never begins."""
    return stage.with_options(name=f"{stage.name} {variant}")


def shown(result: StepResult) -> State[StepResult]:
    """The final state of a stage: `Cached` where the step was found in the store."""
    record = result.record
    if result.reused:
        return Completed(name="Cached", data=result, message=f"reused {record.key}, made {record.finished}")
    return Completed(data=result, message=f"made {record.output} in {record.seconds:.1f} s")


def watched(context: Context, label: str) -> Context:
    """The context with progress shown: in log lines, as a progress artifact in the UI, and to the listeners."""
    for listener in LISTENERS:
        listener(label, BEGUN)
    return replace(context, on_progress=_Reporter(label))


@dataclass
class _Reporter:
    """Tells how far one stage is, no more often than a person can read."""

    label: str
    started: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)
    drawn: float = field(default_factory=time.monotonic)
    artifact: UUID | None = None

    def __call__(self, progress: Progress) -> None:
        for listener in LISTENERS:
            listener(self.label, progress)
        now = time.monotonic()
        finished = bool(progress.total) and progress.done >= progress.total
        # Outside of a run there is nobody to log for.
        with suppress(MissingContextError):
            if now - self.logged >= LOG_SECONDS:
                self.logged = now
                get_run_logger().info("%s: %s", self.label, in_words(progress))
            if progress.total and (now - self.drawn >= ARTIFACT_SECONDS or (finished and self.artifact)):
                self.drawn = now
                self._draw(100.0 * progress.done / progress.total, in_words(progress))

    def _draw(self, percent: float, words: str) -> None:
        if self.artifact is None:
            self.artifact = create_progress_artifact(progress=percent, description=f"{self.label}: {words}")
        else:
            update_progress_artifact(self.artifact, progress=percent, description=f"{self.label}: {words}")


def outcome(future: PrefectFuture[StepResult]) -> StepResult | ModelMintError | None:
    """Wait for a stage and say how it ended: done, failed, or never begun because an earlier stage failed.

    Raises:
        BaseException: what cancelled or crashed the run; that is no outcome of a stage.
    """
    future.wait()
    state = future.state
    if state.is_completed():
        return state.result()
    if state.is_crashed() or state.is_cancelled():
        state.result()
    if not state.is_failed():
        return None
    error = state.result(raise_on_failure=False)
    return error if isinstance(error, ModelMintError) else StageError(f"{type(error).__name__}: {error}")
