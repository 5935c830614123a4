"""Benchmarks: interleaved trials, medians over them, and speed-ups over a base of the same session."""

from pathlib import Path

import pytest

from modelmint import benchmark as stage
from modelmint.acquire import acquire, resolve
from modelmint.benchmark import Subject, Trial, benchmark, summarize
from modelmint.convert import convert
from modelmint.errors import ModelMintError, RecipeError, ToolError
from modelmint.evaluate import read
from modelmint.formats import Speed
from modelmint.quantize import quantize
from modelmint.recipe import Benchmark, ModelRef, Variant
from modelmint.report import HardwareClass
from modelmint.step import Context, StepResult

pytestmark = pytest.mark.pure

HERE = HardwareClass(instructions="x86_64 avx2", threads=1)
SHORT = Benchmark(threads=1, prompt_tokens=8, generate_tokens=4, trials=3)


def trial(decode: float, prefill: float = 100.0, peak: int | None = None) -> Trial:
    return Trial(Speed(load_seconds=0.1, first_token_seconds=0.2, prefill_rate=prefill, decode_rate=decode), peak)


def test_a_figure_is_the_median_with_the_half_width_of_the_interquartile_range() -> None:
    figures = {m.measure: m for m in summarize([trial(10), trial(30), trial(20)], [trial(10)] * 3, HERE)}
    decode = figures["decode_rate"]
    assert (decode.value, decode.spread, decode.trials, decode.statistic) == (20, 5, 3, "median")
    assert decode.hardware == HERE


def test_a_speed_up_is_over_the_base_of_the_same_session() -> None:
    figures = {m.measure: m for m in summarize([trial(30, 50)], [trial(20, 100)], HERE)}
    assert (figures["decode_speedup"].value, figures["prefill_speedup"].value) == (1.5, 0.5)


def test_peak_memory_is_the_largest_and_left_out_where_it_was_not_measured() -> None:
    figures = {m.measure: m for m in summarize([trial(1, peak=5), trial(1, peak=9)], [trial(1)], HERE)}
    assert (figures["peak_memory"].value, figures["peak_memory"].statistic) == (9, "max")
    assert "peak_memory" not in {m.measure for m in summarize([trial(1)], [trial(1)], HERE)}


@pytest.fixture
def subjects(context: Context) -> dict[str, Subject]:
    source = acquire(resolve(ModelRef.parse("fake:tiny"), context.settings), context).record.output
    base = convert(source, "fake", {}, context).record.output
    made = {name: quantize(base, Variant.parse(name), context).record.output for name in ("fake:Q8", "fake:Q4")}
    return {"fake:F32": Subject("fake", base, base)} | {n: Subject("fake", digest, base) for n, digest in made.items()}


def test_variants_are_measured_once_and_found_again(subjects: dict[str, Subject], context: Context) -> None:
    first = benchmark(subjects, SHORT, context)
    assert [type(result) for result in first.values()] == [StepResult] * 3
    for result in first.values():
        assert isinstance(result, StepResult)
        figures = {m.measure: m for m in read(context.store, result.record.output).measurements}
        assert {"load_time", "time_to_first_token", "prefill_rate", "decode_rate", "decode_speedup"} <= figures.keys()
        assert figures["decode_rate"].trials == 3
    again = benchmark(subjects, SHORT, context)
    assert all(isinstance(result, StepResult) and result.reused for result in again.values())


def test_one_more_variant_is_measured_beside_its_base_and_the_others_are_left_alone(
    subjects: dict[str, Subject], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark({name: subject for name, subject in subjects.items() if name != "fake:Q4"}, SHORT, context)
    ran: list[str] = []
    real = stage.run_trial
    monkeypatch.setattr(stage, "run_trial", lambda **given: (ran.append(given["folder"]), real(**given))[1])
    benchmark(subjects, SHORT, context)
    assert len(ran) == 2 * SHORT.trials, "three trials of the new variant and three of the base"
    assert ran[0] != ran[1], "interleaved"
    assert ran[2] != ran[3], "interleaved"


def test_one_that_fails_leaves_the_others_alone(
    subjects: dict[str, Subject], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = stage.run_trial, []
    size = context.store.artifact(subjects["fake:Q4"].digest).size

    def run_trial(**given: object) -> dict[str, float]:
        if sum(file.stat().st_size for file in Path(str(given["folder"])).iterdir()) == size:
            broken.append(given)
            raise ToolError("llama.cpp aborted", signal="SIGABRT")
        return real(**given)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "run_trial", run_trial)
    results = benchmark(subjects, SHORT, context)
    failed = [name for name, result in results.items() if isinstance(result, ModelMintError)]
    assert failed == ["fake:Q4"]
    assert len(broken) == 1, "it is not tried again in later rounds"


def test_an_option_that_the_base_does_not_have_is_answered_with_what_was_meant(context: Context) -> None:
    source = acquire(resolve(ModelRef.parse("fake:tiny"), context.settings), context).record.output
    with pytest.raises(RecipeError, match=r"base.fake.fial: .*did you mean 'fail'"):
        convert(source, "fake", {"fial": True}, context)
    with pytest.raises(ToolError, match="fail"):
        convert(source, "fake", {"fail": True}, context)
