"""The laws of measurements, gates and verdicts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modelmint.report import (
    DEFAULT_GATES,
    MEASURES,
    Bound,
    HardwareClass,
    Measurement,
    Measurements,
    judge,
)

pytestmark = pytest.mark.pure

HERE = HardwareClass(instructions="x86_64 avx2", threads=2)


def figure(measure: str, value: float) -> Measurement:
    return Measurement(measure=measure, value=value, hardware=HERE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_measurement_is_a_finite_number(value: float) -> None:
    with pytest.raises(ValidationError, match="must be finite"):
        figure("kl_divergence", value)
    with pytest.raises(ValidationError, match="must be finite"):
        Measurement(measure="kl_divergence", value=0, spread=math.inf)


def test_an_unknown_measure_is_answered_with_what_was_meant() -> None:
    with pytest.raises(ValidationError, match="did you mean 'decode_rate'"):
        figure("decode_rat", 1)


def test_unit_and_direction_follow_from_the_measure() -> None:
    assert (figure("decode_rate", 1).unit, figure("decode_rate", 1).better) == ("tokens/s", "higher")
    assert all(measure.better in ("lower", "higher", "none") and measure.unit for measure in MEASURES.values())
    assert set(DEFAULT_GATES) <= set(MEASURES)


def test_a_document_holds_each_measure_once() -> None:
    with pytest.raises(ValidationError, match="measured twice: loads"):
        Measurements(measurements=(figure("loads", 1), figure("loads", 0)))


@given(st.floats(0, 1), st.floats(0, 1))
def test_judging_is_pure_and_bounds_are_inclusive(value: float, limit: float) -> None:
    gates = {"kl_divergence": Bound(max=limit)}
    verdict = judge([figure("kl_divergence", value)], gates)
    assert verdict == judge([figure("kl_divergence", value)], gates)
    assert verdict.passed is (value <= limit)
    assert judge([figure("top_1_agreement", value)], {"top_1_agreement": Bound(min=limit)}).passed is (value >= limit)


def test_a_gate_whose_measure_is_missing_fails() -> None:
    verdict = judge([], {"kl_divergence": Bound(max=1)})
    assert not verdict.passed
    assert verdict.reasons == ("mean KL divergence was not measured, and a gate asks for it",)


def test_a_reason_says_value_and_bound() -> None:
    verdict = judge([figure("kl_divergence", 0.2551)], {"kl_divergence": Bound(max=0.15)})
    assert verdict.reasons == ("mean KL divergence 0.2551 nats/token is above the gate's 0.15",)
    verdict = judge([figure("top_1_agreement", 0.745)], {"top_1_agreement": Bound(min=0.8)})
    assert verdict.reasons == ("top-1 agreement 0.745 is below the gate's 0.8",)


def test_a_stage_that_could_not_finish_fails_the_verdict_whatever_the_figures_say() -> None:
    verdict = judge([figure("loads", 1)], {"loads": Bound(min=1)}, failure="evaluate failed: SIGABRT")
    assert not verdict.passed
    assert verdict.reasons == ("evaluate failed: SIGABRT",)


def test_a_verdict_names_the_hardware_classes_it_rests_on() -> None:
    verdict = judge([figure("loads", 1), Measurement(measure="size", value=3)], {"loads": Bound(min=1)})
    assert verdict.hardware == ("x86_64 avx2, cpu, 2 threads",)


def test_without_gates_everything_passes() -> None:
    assert judge([], {}).passed
