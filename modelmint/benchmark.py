"""The benchmark stage: load time, time to first token, prefill and decode rate, and peak memory, side by side.

Trials are interleaved over the variants, each in a fresh child process, so that a machine that slows down hits all
alike; the unquantized base of the format is measured in the same session, so that a speed-up compares like with like.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmint import formats
from modelmint.artifact import Step, canonical_json
from modelmint.errors import ModelMintError
from modelmint.formats import Speed
from modelmint.host import hardware_class, host
from modelmint.isolate import Progress
from modelmint.recipe import Benchmark
from modelmint.report import HardwareClass, Measurement, Measurements
from modelmint.sandbox import Sandbox, sandbox
from modelmint.step import Context, StepResult, Work, Workspace, run_steps

STAGE_VERSION = 1


@dataclass(frozen=True)
class Subject:
    """What is benchmarked: a variant or a base, and the base it is held against.

    Attributes:
        format: a name in the table of formats.
        digest: of the variant's artifact.
        base: digest of the unquantized base of its format; equal to `digest` for the base itself.
    """

    format: str
    digest: str
    base: str


@dataclass(frozen=True)
class Trial:
    """One run of one subject: its speed, and the peak resident memory of the process that ran it.

    `peak_memory_bytes` is None for a format that runs inside this process, where it would be this process's own.
    """

    speed: Speed
    peak_memory_bytes: int | None


def benchmark(
    subjects: Mapping[str, Subject], wanted: Benchmark, context: Context
) -> dict[str, StepResult | ModelMintError]:
    """Benchmark several variants in one session; those already measured on this host are not run again.

    Args:
        subjects: what to measure by a name of the caller's. Where a variant is missing, its base is measured anew
            with it, whether or not the base has been measured before.
        wanted: threads, lengths and the number of trials.
        context: store, settings and who asks.

    Returns:
        For each name its step, or the error that kept it from being measured.
    """
    threads = context.settings.tool_threads(wanted.threads)
    hardware = hardware_class(threads)
    steps = {name: _step(subject, wanted, hardware) for name, subject in subjects.items()}

    def work(missing: Mapping[str, Workspace]) -> dict[str, Work | ModelMintError]:
        first = next(iter(missing.values()))
        box = sandbox(context, first, threads)
        session = _Session({name: subjects[name] for name in missing}, wanted, box, context)
        session.materialize(first.folder)
        session.run()
        return {name: session.result(name, workspace, hardware) for name, workspace in missing.items()}

    return run_steps(context, steps, work, machine="alone")


def _step(subject: Subject, wanted: Benchmark, hardware: HardwareClass) -> Step:
    return Step(
        stage="benchmark",
        stage_version=STAGE_VERSION,
        parameters={
            "format": subject.format,
            "format_version": formats.load(subject.format).STAGE_VERSION,
            "prompt_tokens": wanted.prompt_tokens,
            "generate_tokens": wanted.generate_tokens,
            "trials": wanted.trials,
            "hardware": hardware.model_dump(mode="json"),
            "host": host().name,
        },
        inputs={"variant": subject.digest, "base": subject.base},
        tools=formats.load(subject.format).tools("benchmark"),
        observation=True,
    )


class _Session:
    """Interleaved trials over several subjects and the bases that they are held against."""

    def __init__(self, subjects: Mapping[str, Subject], wanted: Benchmark, box: Sandbox, context: Context) -> None:
        self.subjects = dict(subjects)
        self.wanted = wanted
        self.box = box
        self.context = context
        self.folders: dict[str, Path] = {}
        self.trials: dict[str, list[Trial]] = {}
        self.errors: dict[str, ModelMintError] = {}
        self.formats = {subject.digest: subject.format for subject in subjects.values()}
        self.formats |= {subject.base: subject.format for subject in subjects.values()}

    def materialize(self, folder: Path) -> None:
        """Lay the files of every subject out, each artifact once."""
        for index, digest in enumerate(self.formats):
            try:
                self.folders[digest] = self.context.store.materialize(digest, folder / f"subject-{index}")
            except ModelMintError as error:
                self.errors[digest] = error

    def run(self) -> None:
        """Do all trials; one that fails takes its subject out of the later rounds and nothing else."""
        digests = list(self.formats)
        total, done, started = self.wanted.trials * len(digests), 0, time.monotonic()
        for round_number in range(self.wanted.trials):
            # Another one begins each round, so that nobody always follows the same neighbour.
            start = round_number % len(digests)
            for digest in digests[start:] + digests[:start]:
                if digest not in self.errors:
                    try:
                        self.trials.setdefault(digest, []).append(self._trial(digest))
                    except ModelMintError as error:
                        self.errors[digest] = error
                done += 1
                if self.context.on_progress is not None:
                    rate = done / (time.monotonic() - started)
                    self.context.on_progress(Progress(done, total, "trials", rate, (total - done) / rate))

    def _trial(self, digest: str) -> Trial:
        arguments: dict[str, Any] = {
            "format_name": self.formats[digest],
            "folder": str(self.folders[digest]),
            "threads": self.box.threads,
            "prompt_tokens": self.wanted.prompt_tokens,
            "generate_tokens": self.wanted.generate_tokens,
        }
        if not formats.load(self.formats[digest]).NATIVE:
            return Trial(speed=Speed(**run_trial(**arguments)), peak_memory_bytes=None)
        # The callback is for whole trials; a child's own progress would only be noise between them.
        quiet = Sandbox(self.box.threads, self.box.limits, self.box.lock, self.box.require_isolation)
        outcome = quiet.call("modelmint.benchmark:run_trial", arguments)
        return Trial(speed=Speed(**outcome.value), peak_memory_bytes=outcome.peak_memory_bytes)

    def result(self, name: str, workspace: Workspace, hardware: HardwareClass) -> Work | ModelMintError:
        """Write one subject's measurements, or hand back what kept it from being measured."""
        subject = self.subjects[name]
        for digest in (subject.digest, subject.base):
            if digest in self.errors:
                return self.errors[digest]
        figures = summarize(self.trials[subject.digest], self.trials[subject.base], hardware)
        document = Measurements(measurements=figures, host=host())
        (workspace.out / "measurements.json").write_bytes(canonical_json(document.model_dump(mode="json")))
        return Work()


def run_trial(
    format_name: str, folder: str, threads: int, prompt_tokens: int, generate_tokens: int
) -> dict[str, float]:
    """Load a variant and time one trial; called in a child process where the format is native.

    The prompt is random token ids with a fixed seed, as llama-bench does it: speed does not depend on what they mean.

    Returns:
        The fields of `Speed`.
    """
    module = formats.load(format_name)
    session = module.open_session(Path(folder), threads, prompt_tokens + generate_tokens)
    try:
        draw = random.Random(0)
        prompt = [draw.randrange(session.vocabulary) for _ in range(prompt_tokens)]
        speed = session.speed(prompt, generate_tokens)
    finally:
        session.close()
    return {
        "load_seconds": speed.load_seconds,
        "first_token_seconds": speed.first_token_seconds,
        "prefill_rate": speed.prefill_rate,
        "decode_rate": speed.decode_rate,
    }


def summarize(trials: Sequence[Trial], base: Sequence[Trial], hardware: HardwareClass) -> tuple[Measurement, ...]:
    """Medians over the trials of a variant, and its speed over that of its base in the same session.

    Args:
        trials: of the variant, at least one.
        base: of the base, as many.
        hardware: the class they were taken on.
    """
    columns = {
        "load_time": [trial.speed.load_seconds for trial in trials],
        "time_to_first_token": [trial.speed.first_token_seconds for trial in trials],
        "prefill_rate": [trial.speed.prefill_rate for trial in trials],
        "decode_rate": [trial.speed.decode_rate for trial in trials],
    }
    figures = [_median(name, values, hardware) for name, values in columns.items()]
    peaks = [trial.peak_memory_bytes for trial in trials if trial.peak_memory_bytes is not None]
    if peaks:
        figures.append(
            Measurement(measure="peak_memory", value=max(peaks), trials=len(peaks), statistic="max", hardware=hardware)
        )
    for name, rate in (("prefill_speedup", "prefill_rate"), ("decode_speedup", "decode_rate")):
        over = statistics.median(getattr(trial.speed, rate) for trial in base)
        ratio = statistics.median(columns[rate]) / over
        figures.append(Measurement(measure=name, value=ratio, trials=len(trials), statistic="ratio", hardware=hardware))
    return tuple(figures)


def _median(name: str, values: Sequence[float], hardware: HardwareClass) -> Measurement:
    spread = 0.0
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
        spread = (quartiles[2] - quartiles[0]) / 2
    return Measurement(
        measure=name,
        value=statistics.median(values),
        trials=len(values),
        spread=spread,
        statistic="median",
        hardware=hardware,
    )
