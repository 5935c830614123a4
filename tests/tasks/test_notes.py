"""What people read on MLflow's pages."""

import pytest
from sample_release import sample

from modelmint.report import HardwareClass
from tasks.notes import ROW_LIMIT, experiment_note, recipe_settings, release_note, variant_note, variant_settings

pytestmark = pytest.mark.pure


def test_a_figure_is_told_with_unit_spread_and_statistic() -> None:
    note = variant_note(sample().variant("gguf:Q4_0"))
    assert "| mean KL divergence | 0.255 | 0.0102 | nats/token | mean of 3072 |" in note
    assert "| size of the files | 92.0 |  | MB |  |" in note
    assert "| perplexity | 21.4 |  |  | mean of 3072 |" in note
    assert note.startswith("**gguf:Q4_0: failed (optional)**\n\n- mean KL divergence 0.2551 nats/token is above")


def test_one_hardware_class_is_told_once_and_several_beside_their_figures() -> None:
    variant = sample().variant("gguf:Q8_0")
    note = variant_note(variant)
    assert note.count("2 threads") == 1
    assert "Measured on x86_64 sse4_2 avx avx2 fma f16c bmi2, cpu, 2 threads." in note
    other = HardwareClass(instructions="x86_64 sse4_2", threads=8)
    first, *rest = variant.measurements
    mixed = variant.model_copy(update={"measurements": (first.model_copy(update={"hardware": other}), *rest)})
    note = variant_note(mixed)
    assert "nats/token | mean of 3072 | x86_64 sse4_2, cpu, 8 threads |" in note
    assert "Measured on" not in note


def test_a_note_keeps_the_form_of_its_table() -> None:
    variant = sample().variant("gguf:Q8_0")
    (step, *rest) = variant.steps
    odd = variant.model_copy(update={"steps": (step.model_copy(update={"stage": "a|b\nc"}), *rest)})
    assert "| a\\|b c | 9.0 |" in variant_note(odd)


def test_a_release_of_many_variants_shows_the_first_and_says_how_many_more() -> None:
    report = sample()
    many = report.model_copy(update={"variants": report.variants[1:2] * (ROW_LIMIT + 3)})
    note = release_note(many)
    assert note.count("| gguf:Q8_0 |") == ROW_LIMIT
    assert "3 more stand in `variants.json`." in note


def test_a_release_says_what_it_continues() -> None:
    assert "- continues smollm2-135m-20260901-095512, which did not finish" in release_note(sample())


def test_an_experiment_explains_its_metrics() -> None:
    note = experiment_note(sample().recipe)
    assert note.startswith("**smollm2-135m** SmolLM2-135M-Instruct for the edge, as GGUF.")
    assert "| `decode_rate` | decode | tokens/s | higher |" in note


def test_settings_are_flat_and_each_is_told_once() -> None:
    settings = recipe_settings(sample().recipe)
    assert settings["evaluation.data.source"] == "pydoc"
    assert settings["benchmark.trials"] == "3"
    assert variant_settings(sample().variant("gguf:Q8_0")) == {
        "format": "gguf",
        "type": "Q8_0",
        "label": "",
        "option.pure": "false",
        "tool.llama-cpp-python": "0.3.36",
    }
