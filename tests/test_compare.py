"""Releases held against each other."""

import pytest
from sample_release import HARDWARE, sample

from modelmint.compare import compare_rows
from modelmint.release import ReleaseReport, VariantReport
from modelmint.report import HardwareClass

pytestmark = pytest.mark.pure


def changed(measure: str, **update) -> ReleaseReport:
    """The sample with one measure of Q8_0 replaced."""
    q8 = sample().variant("gguf:Q8_0")
    figures = tuple(m.model_copy(update=update) if m.measure == measure else m for m in q8.measurements)
    return replaced(q8.model_copy(update={"measurements": figures}))


def replaced(q8: VariantReport, **update) -> ReleaseReport:
    variants = tuple(q8 if variant.variant == q8.variant else variant for variant in sample().variants)
    return sample().model_copy(update={"release": "later", "variants": variants, **update})


def judgement(measure: str, later: ReleaseReport) -> str:
    row = next(row for row in compare_rows([sample(), later]) if row.variant == "gguf:Q8_0")
    return row.change(measure).judgement


def test_a_release_against_itself_is_the_same_in_everything():
    rows = compare_rows([sample(), sample()])
    assert [row.variant for row in rows] == [variant.variant for variant in sample().variants]
    assert all(row.same_bytes for row in rows)
    assert {change.judgement for row in rows for change in row.changes} == {"same"}


@pytest.mark.parametrize(
    ("measure", "value", "expected"),
    [
        ("size", 144e6, "better"),
        ("size", 146e6, "worse"),
        ("kl_divergence", 0.0030, "better"),
        ("kl_divergence", 0.0050, "worse"),
        ("decode_rate", 160.0, "better"),
        ("decode_rate", 120.0, "worse"),
        ("top_1_agreement", 0.99, "better"),
    ],
)
def test_better_and_worse_follow_the_measure(measure, value, expected):
    assert judgement(measure, changed(measure, value=value)) == expected


def test_a_difference_within_twice_its_standard_error_is_no_difference():
    # The spread of decode is 2.5 tokens/s in both, so the difference has one of 3.5.
    assert judgement("decode_rate", changed("decode_rate", value=146.9)) == "same"
    assert judgement("decode_rate", changed("decode_rate", value=147.2)) == "better"


def test_figures_of_another_hardware_class_are_not_compared():
    other = HardwareClass(instructions="x86_64 avx512f avx512_vnni", threads=HARDWARE.threads)
    assert judgement("decode_rate", changed("decode_rate", hardware=other)) == "incomparable"
    assert judgement("kl_divergence", changed("kl_divergence", hardware=other)) == "incomparable"


def test_speed_on_another_machine_and_quality_on_another_text_are_not_compared_but_size_is():
    q8 = sample().variant("gguf:Q8_0")
    machine = replaced(q8, host=sample().host.model_copy(update={"cpu": "another"}))
    assert [judgement(m, machine) for m in ("decode_rate", "kl_divergence", "size")] == ["incomparable", "same", "same"]
    text = replaced(q8, evaluation=sample().evaluation.model_copy(update={"windows": 6}))
    assert [judgement(m, text) for m in ("decode_rate", "kl_divergence", "size")] == ["same", "incomparable", "same"]


def test_variants_that_one_release_lacks_are_named_absent():
    fewer = sample().model_copy(update={"release": "later", "variants": sample().variants[:-1]})
    gone = compare_rows([sample(), fewer])[-1]
    assert (gone.variant, gone.outcome_before, gone.outcome_after) == ("gguf:Q3_K_M", "passed", "absent")
    assert {change.judgement for change in gone.changes} == {"missing"}
    new = next(row for row in compare_rows([fewer, sample()]) if row.variant == "gguf:Q3_K_M")
    assert (new.outcome_before, new.outcome_after) == ("absent", "passed")


def test_every_later_release_is_held_against_the_first():
    rows = compare_rows([sample(), changed("size", value=1.0), changed("size", value=2.0)])
    assert len(rows) == 2 * len(sample().variants)
    sizes = [row.change("size") for row in rows if row.variant == "gguf:Q8_0"]
    assert [(change.before, change.after) for change in sizes] == [(145e6, 1.0), (145e6, 2.0)]


def test_one_release_is_no_comparison():
    with pytest.raises(ValueError, match="two releases or more, not 1"):
        compare_rows([sample()])
