"""The report and the lock of a release: what they say, what they leave out, and the exit code."""

import json
import random
from pathlib import Path

import pytest
from pydantic import ValidationError
from sample_release import FIGURES, RECIPE, SNAPSHOT, lock, measurements, records, sample

from modelmint.release import (
    ReleaseReport,
    StepCount,
    VariantReport,
    exit_code,
    merged,
    release_json,
)
from modelmint.release_lock import ReleaseLock, build_lock
from modelmint.report import Bound, Measurement, judge

pytestmark = pytest.mark.pure


def ending(outcome: str, required: bool) -> VariantReport:
    """A variant that passed, failed a gate, or could not be finished."""
    bound = {"kl_divergence": Bound(max=1.0 if outcome == "passed" else 0.0001)}
    verdict = judge(measurements("Q8_0"), bound, failure="quantize failed" if outcome == "incomplete" else "")
    return VariantReport(variant="gguf:Q8_0", format="gguf", type="Q8_0", required=required, verdict=verdict)


def release_of(*variants: VariantReport, failure: str = "") -> ReleaseReport:
    return sample().model_copy(update={"variants": variants, "failure": failure})


def test_a_report_and_a_lock_read_back_from_their_text_are_equal_to_what_was_written():
    assert ReleaseReport.model_validate_json(sample().to_json()) == sample()
    assert ReleaseLock.model_validate_json(lock().to_json()) == lock()


def test_the_lock_of_equal_work_is_the_same_text_in_whatever_order_the_records_come():
    shuffled = records() * 2
    random.Random(7).shuffle(shuffled)
    assert lock(shuffled).to_json() == lock().to_json()


def test_no_name_and_no_time_is_in_a_lock():
    text = lock().to_json().decode()
    for absent in (sample().release, sample().created, "2026-", sample().links.tracking_run, '"seconds"'):
        assert absent not in text


def test_a_lock_lists_steps_in_the_order_of_their_stages_and_each_tool_once():
    made = lock()
    stages = [locked.step.stage for locked in made.steps]
    kinds = list(dict.fromkeys(stages))
    assert kinds == ["acquire", "inspect", "convert", "quantize", "reference", "evaluate", "benchmark"]
    assert stages == sorted(stages, key=kinds.index)
    assert [tool.name for tool in made.tools] == ["llama-cpp-python", "torch", "transformers"]


def test_a_lock_names_what_was_made_and_only_that():
    made = lock()
    assert list(made.variants) == [f"gguf:{name}" for name in FIGURES]
    assert list(made.bases) == ["gguf:f16"]
    unmade = [variant.model_copy(update={"digest": ""}) for variant in sample().variants]
    empty = build_lock(recipe=RECIPE, source="", snapshot=SNAPSHOT, records=records(), variants=unmade)
    assert (empty.variants, empty.bases) == ({}, {})


def test_a_lock_whose_step_was_changed_is_refused():
    body = json.loads(lock().to_json())
    body["steps"][3]["step"]["parameters"]["type"] = "Q2_K"
    with pytest.raises(ValidationError, match="is not the key of its step"):
        ReleaseLock.model_validate(body)


@pytest.mark.parametrize(
    ("variants", "code"),
    [
        ([("passed", True), ("passed", True)], 0),
        ([("passed", True), ("failed", False)], 0),
        ([("passed", True), ("incomplete", False)], 0),
        ([("passed", True), ("failed", True)], 3),
        ([("failed", True), ("incomplete", False)], 3),
        ([("failed", True), ("incomplete", True)], 4),
        ([("incomplete", True), ("passed", True)], 4),
    ],
)
def test_a_stage_beats_a_gate_and_a_variant_that_is_not_required_fails_for_itself_only(variants, code):
    assert exit_code(release_of(*(ending(*variant) for variant in variants))) == code


def test_a_release_that_stopped_as_a_whole_failed_even_if_nothing_was_required():
    assert exit_code(release_of(ending("passed", False), failure="the disk is full")) == 4


def test_steps_are_counted_once_and_one_that_any_variant_executed_was_executed():
    step = sample().steps[0]
    done = step.model_copy(update={"reused": False})
    other = sample().steps[1]
    assert StepCount.of([step, done, step, other]) == StepCount(executed=1, reused=1)
    # One convert, one reference, acquire and inspect; two measuring steps for the base, three for each variant.
    assert sample().step_count.total == 4 + 2 + 3 * len(FIGURES)


def test_figures_of_several_steps_become_one_list_and_contradictions_are_refused():
    size = Measurement(measure="size", value=3)
    kl = Measurement(measure="kl_divergence", value=0.1)
    assert merged([size], [kl, size]) == (kl, size)
    with pytest.raises(ValueError, match=r"size was measured twice: 3\.0 and 4\.0"):
        merged([size], [Measurement(measure="size", value=4)])


def test_a_variant_needs_a_verdict_and_a_base_has_none():
    with pytest.raises(ValidationError, match="a variant has a verdict and a base has none"):
        VariantReport(variant="gguf:Q8_0", format="gguf", type="Q8_0")
    with pytest.raises(ValidationError, match="a variant has a verdict and a base has none"):
        VariantReport(variant="gguf:f16", format="gguf", type="f16", is_base=True, verdict=judge((), {}))


def test_the_printed_object_names_every_variant_with_its_figures():
    printed = release_json(sample(), Path("a/lock.json"), Path("a/report.html"))
    assert json.loads(json.dumps(printed, allow_nan=False)) == printed
    assert list(printed) == ["release", "lock", "report", "steps", "variants"]
    assert (printed["lock"], printed["report"]) == ("a/lock.json", "a/report.html")
    assert printed["steps"] == {"executed": 21, "reused": 6}
    assert [variant["variant"] for variant in printed["variants"]] == [f"gguf:{name}" for name in FIGURES]
    q4 = printed["variants"][4]
    assert (q4["variant"], q4["verdict"], q4["size_bytes"]) == ("gguf:Q4_0", "failed", 92_000_000)
    assert q4["reasons"][0] == "mean KL divergence 0.2551 nats/token is above the gate's 0.15"
    kl = q4["measurements"]["kl_divergence"]
    assert {key: kl[key] for key in ("value", "unit", "better", "trials", "statistic")} == {
        "value": 0.2551,
        "unit": "nats/token",
        "better": "lower",
        "trials": 3072,
        "statistic": "mean",
    }
    assert kl["hardware"] == "x86_64 sse4_2 avx avx2 fma f16c bmi2, cpu, 2 threads"
