"""What `overhead.py` measures inside of a process of its own, which has a home folder and a Prefect server.

The answer is one JSON object on the last line of standard output.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

STARTED = time.monotonic()
SAMPLE_SECONDS = 0.005
PACKAGES = ("modelmint", "flows", "tasks")
COUNT = 50
"""Steps of each kind that are timed together."""


def split(recipe: str) -> dict[str, float]:
    """The seconds of a release by what they go to; one after the other here, where the command overlaps them."""
    import flows.cli
    from flows.environment import load_settings, prepare
    from flows.local_server import local_server

    settings = load_settings()
    prepare(settings)
    import flows.release  # noqa: F401

    imported = time.monotonic()
    with local_server(settings.home):
        answered = time.monotonic()
        _release(recipe)
        done = time.monotonic()
    return {"imports": imported - STARTED, "server start": answered - imported, "flow": done - answered}


def profile(recipe: str) -> dict[str, Any]:
    """Where a release spends its time, sampled: of each thread the deepest line of ours and the deepest of all."""
    sampler = _Sampler()
    sampler.start()
    started = time.monotonic()
    _release(recipe)
    seconds = time.monotonic() - started
    sampler.stop()
    return {"seconds": seconds, "threads": sampler.table(seconds)}


def steps(rounds: str) -> dict[str, list[float]]:
    """Milliseconds of one task or stage, for each of so many rounds, by what it is."""
    from flows.environment import load_settings, prepare

    settings = load_settings()
    prepare(settings)
    from flows.local_server import local_server

    with local_server(settings.home) as address:
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        with temporary_settings({PREFECT_API_URL: address, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            return _steps(int(rounds))


def _release(recipe: str) -> None:
    from flows.console import err
    from flows.environment import load_settings
    from flows.launch import launch
    from flows.order import release_name
    from flows.stages import Stages

    launch(load_settings(), recipe, [], release_name("overhead"), Stages(err()))


def _steps(rounds: int) -> dict[str, list[float]]:
    from prefect import task

    from flows.environment import load_settings
    from modelmint.acquire import acquire, resolve
    from modelmint.convert import convert
    from modelmint.quantize import quantize as stage
    from modelmint.recipe import ModelRef
    from modelmint.step import Context
    from modelmint.store import Store
    from tasks.quantize import quantize
    from tasks.shown import ONCE

    settings = load_settings()
    context = Context(Store(settings.store), settings)
    source = acquire(resolve(ModelRef.parse("fake:tiny"), settings), context)
    base = convert(source.record.output, "fake", {}, context)
    digest = base.record.output

    @task(name="nothing", task_run_name="nothing {variant.name}", **ONCE)
    def nothing(base: Any, variant: Any, context: Any) -> None:
        """A task without a stage: what it takes is Prefect's."""

    def directly(variants: Sequence[Any]) -> float:
        return _timed(lambda: [stage(digest, variant, context) for variant in variants])

    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(1000 * seconds / COUNT)

    _tasks(nothing, _variants(0), base, context)
    for number in range(rounds):
        some, others = _variants(2 * number), _variants(2 * number + 1)
        note("task without a stage", _tasks(nothing, some, base, context))
        note("executed step through Prefect", _tasks(quantize, some, base, context))
        note("reused step through Prefect", _tasks(quantize, some, base, context))
        with _disk() as waits:
            note("executed step without Prefect", directly(others))
        note("of that, waiting for the disk", sum(waits))
        note("reused step without Prefect", directly(others))
        note("the fake tool itself", _tool(context.store, digest, others))
    return found


@contextmanager
def _disk() -> Iterator[list[float]]:
    """The seconds of each wait for the disk inside of the block."""
    waits: list[float] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        waits.append(_timed(lambda: real(descriptor)))

    with mock.patch.object(os, "fsync", fsync):
        yield waits


def _tasks(what: Any, variants: Sequence[Any], base: Any, context: Any) -> float:
    """Seconds of a task for each variant, run as the release flow runs its tasks."""
    from prefect import flow
    from prefect.futures import wait
    from prefect.task_runners import ThreadPoolTaskRunner

    from tasks.shown import of

    @flow(name="overhead", task_runner=ThreadPoolTaskRunner(max_workers=1), persist_result=False)
    def overhead() -> float:
        started = time.monotonic()
        futures = [of(variant.name, what).submit(base, variant, context) for variant in variants]
        wait(futures)
        seconds = time.monotonic() - started
        for future in futures:
            future.result()
        return seconds

    return float(overhead())


def _variants(block: int) -> list[Any]:
    """Variants that no other block has: each block has its own sizes of groups."""
    from modelmint.recipe import Variant

    groups = range(4 + 13 * block, 17 + 13 * block)
    pairs = [(kind, group) for group in groups for kind in ("Q8", "Q4", "Q3", "Q2")][:COUNT]
    return [Variant(format="fake", type=kind, label=f"g{it}", options={"group": it}) for kind, it in pairs]


def _tool(store: Any, base: str, variants: Sequence[Any]) -> float:
    """Seconds of the fake quantizer alone: its output is written and thrown away."""
    import tempfile

    from modelmint.formats import fake

    with tempfile.TemporaryDirectory() as name:
        folder = store.materialize(base, Path(name) / "base")
        outputs = [Path(name) / variant.label / variant.type for variant in variants]
        for output in outputs:
            output.mkdir(parents=True)
        return _timed(
            lambda: [fake.quantize(folder, out, it, mock.Mock()) for out, it in zip(outputs, variants, strict=True)]
        )


def _timed(do: Callable[[], object]) -> float:
    started = time.monotonic()
    do()
    return time.monotonic() - started


class _Sampler(threading.Thread):
    """Looks at the stack of every thread some hundred times a second."""

    def __init__(self) -> None:
        super().__init__(name="sampler", daemon=True)
        self._ended = threading.Event()
        self._samples = 0
        self._counts: dict[str, Counter[str]] = {}

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            self._samples += 1
            for ident, frame in sys._current_frames().items():
                name = names.get(ident, "unnamed").partition("_")[0]
                if name != self.name:
                    self._counts.setdefault(name, Counter())[_place(frame)] += 1

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def table(self, seconds: float, longest: int = 14) -> dict[str, list[tuple[float, str]]]:
        """Of each thread that ever ran our code, seconds and places."""
        each = seconds / max(1, self._samples)
        return {
            name: [(each * count, place) for place, count in counts.most_common(longest)]
            for name, counts in self._counts.items()
            if any(not place.startswith("-") for place in counts)
        }


def _place(frame: FrameType) -> str:
    """The deepest function of ours on a stack, and the deepest of all."""
    leaf, ours = _named(frame), "-"
    at: FrameType | None = frame
    while at is not None:
        if str(at.f_globals.get("__name__", "")).partition(".")[0] in PACKAGES:
            ours = _named(at)
            break
        at = at.f_back
    return ours if ours == leaf else f"{ours} > {leaf}"


def _named(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}"


if __name__ == "__main__":
    measure: Callable[[str], Any] = {"split": split, "profile": profile, "steps": steps}[sys.argv[1]]
    print(json.dumps(measure(sys.argv[2])))
