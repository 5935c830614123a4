"""The other side of the comparison: the same work done by ModelMint's stages."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hand import Rates

from modelmint import isolate, reference
from modelmint import sandbox as sandboxes
from modelmint.acquire import acquire, resolve
from modelmint.convert import convert
from modelmint.evaluate import evaluate, read
from modelmint.isolate import Limits, Outcome
from modelmint.quantize import quantize
from modelmint.recipe import DatasetRef, Evaluation, ModelRef, Variant
from modelmint.reference import Reference
from modelmint.sandbox import Sandbox
from modelmint.settings import Settings
from modelmint.step import Context, StepResult
from modelmint.store import Store
from modelmint.text import acquire_text

TRIAL_SECONDS = 600.0


@dataclass(frozen=True)
class Stage:
    """One stage: seconds in all, those of its child processes, the most memory of one, and digest of its output."""

    seconds: float
    child_seconds: float
    peak_bytes: int
    output: str

    @property
    def store_seconds(self) -> float:
        """What is not the child's: copies and digests of inputs and outputs, and waiting for the disk."""
        return self.seconds - self.child_seconds


class Ours:
    """A store of its own, and the stages in it.

    Args:
        folder: for store and locks.
        threads: given to each tool.
        evaluation: how quality is measured.
    """

    def __init__(self, folder: Path, threads: int, evaluation: Evaluation) -> None:
        # The caller holds this machine for the whole run, and that lock cannot be nested.
        settings = Settings(home=folder, store_folder=folder / "store", host_lock=folder / "host", threads=threads)
        self.store = Store(folder / "store")
        self.context = Context(self.store, settings)
        self.evaluation = evaluation
        self.threads = threads

    def acquire(self, source: Path) -> Stage:
        """Bring the checkpoint into the store."""
        settings = self.context.settings
        return _timed(lambda: acquire(resolve(ModelRef.parse(f"file:{source}"), settings), self.context))

    def text(self, file: Path) -> Stage:
        """Bring the evaluation text into the store."""
        return _timed(lambda: acquire_text(DatasetRef(source=f"file:{file}"), self.context))

    def convert(self, source: str) -> Stage:
        """Convert the checkpoint to f16."""
        return _timed(lambda: convert(source, "gguf", {"type": "f16"}, self.context))

    def reference(self, source: str, text: str, base: str) -> Stage:
        """Record what the base predicts."""
        return _timed(lambda: reference.reference(source, text, self.evaluation, self.context, base=("gguf", base)))

    def quantize(self, base: str, kind: str) -> Stage:
        """Quantize the base to a type."""
        return _timed(lambda: quantize(base, Variant.parse(f"gguf:{kind}"), self.context))

    def evaluate(self, variant: str, reference: str, evaluation: Evaluation | None = None) -> Stage:
        """Hold a variant against the reference."""
        wanted = evaluation or self.evaluation
        return _timed(lambda: evaluate("gguf", variant, reference, wanted, self.threads, self.context))

    def figure(self, evaluated: str, measure: str) -> float:
        """A figure of an evaluated variant."""
        return next(it.value for it in read(self.store, evaluated).measurements if it.measure == measure)

    def read_reference(self, digest: str, folder: Path) -> Reference:
        """The reference, read from the store."""
        return reference.read(self.store.materialize(digest, folder))

    def speed(self, folder: Path, prompt: int, generate: int) -> Rates:
        """One trial of the benchmark stage, in a child process as that stage starts it."""
        box = Sandbox(self.threads, Limits(wall_seconds=TRIAL_SECONDS))
        arguments: dict[str, Any] = {
            "format_name": "gguf",
            "folder": str(folder),
            "threads": self.threads,
            "prompt_tokens": prompt,
            "generate_tokens": generate,
        }
        started = time.monotonic()
        speed = box.call("modelmint.benchmark:run_trial", arguments).value
        return Rates(time.monotonic() - started, speed["prefill_rate"], speed["decode_rate"])


def _timed(do: Callable[[], StepResult]) -> Stage:
    started = time.monotonic()
    with _children() as children:
        result = do()
    seconds = time.monotonic() - started
    if result.reused:
        raise AssertionError(f"{result.record.step.stage} was done before: there is nothing to measure")
    return Stage(
        seconds,
        sum(child.seconds for child in children),
        max((child.peak_memory_bytes for child in children), default=0),
        result.record.output,
    )


@contextmanager
def _children() -> Iterator[list[Outcome]]:
    """What the child processes of a stage took; stages keep their measurements only."""
    found: list[Outcome] = []

    def call(*arguments: Any, **options: Any) -> Outcome:
        outcome = isolate.call(*arguments, **options)
        found.append(outcome)
        return outcome

    with mock.patch.object(sandboxes, "call", call):
        yield found
