"""Reference and evaluation on the made-up format: the whole ruler in milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelmint import divergence, formats, reference
from modelmint.convert import convert
from modelmint.errors import SourceError, ToolError, UnsafeSourceError
from modelmint.evaluate import evaluate, read
from modelmint.formats import fake_model
from modelmint.quantize import quantize
from modelmint.recipe import Evaluation, Variant
from modelmint.report import DEFAULT_GATES, Measurements, judge
from modelmint.step import Context, StepResult

pytestmark = pytest.mark.pure

TEXT = "The assert statement is a convenient way to insert debugging assertions into a program.\r\n" * 40
SMALL = Evaluation(window=64, windows=6)


@pytest.fixture
def keep(context: Context, tmp_path: Path) -> Callable[..., str]:
    """Put a folder into the store that `write` fills; gives its digest."""
    made = iter(range(100))

    def _keep(write: Callable[[Path], Any]) -> str:
        folder = tmp_path / f"made-{next(made)}"
        folder.mkdir()
        write(folder)
        return context.store.add_folder(folder).digest

    return _keep


@pytest.fixture
def source(keep: Callable[..., str]) -> str:
    return keep(lambda folder: fake_model.write_checkpoint("tiny", folder))


@pytest.fixture
def text(keep: Callable[..., str]) -> str:
    return keep(lambda folder: (folder / "text.txt").write_bytes(TEXT.encode()))


@pytest.fixture
def base(source: str, context: Context) -> str:
    return convert(source, "fake", {}, context).record.output


def measure(context: Context, base: str, held_against: str, name: str = "fake:Q4", **options: Any) -> Measurements:
    variant = Variant(format="fake", type=name.partition(":")[2], options=options)
    made = quantize(base, variant, context).record.output
    return read(context.store, evaluate("fake", made, held_against, SMALL, 1, context).record.output)


def values(found: Measurements) -> dict[str, float]:
    return {m.measure: m.value for m in found.measurements}


def changed(context: Context, digest: str, folder: Path, change: Callable[[Path], None]) -> str:
    """A stored artifact with something changed in its files."""
    context.store.materialize(digest, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    change(folder)
    return context.store.add_folder(folder).digest


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | fields))

    return change


def test_reference_holds_what_the_source_predicts(source: str, text: str, context: Context, tmp_path: Path) -> None:
    result = reference.reference(source, text, SMALL, context)
    folder = context.store.materialize(result.record.output, tmp_path / "read")
    found = reference.read(folder)
    session = fake_model.FakeSession(context.store.materialize(source, tmp_path / "source"))
    tokens = [fake_model.BEGINNING, *session.tokenize(TEXT)]
    assert (found.header.kind, found.header.dtype, found.header.vocabulary) == ("source", "float32", 261)
    assert found.tokens.dtype == np.int32
    # As llama.cpp's perplexity tool: the text is one run, and the beginning replaces each window's first token.
    for index, window in enumerate(found.tokens):
        assert window.tolist() == [fake_model.BEGINNING, *tokens[index * 64 + 1 : index * 64 + 64]]
        logits = session.logits(window.tolist())
        log_p = logits - divergence.log_normalizer(logits)[0][:, None]
        compact = found.windows[index]
        # The predictions after tokens 32 to 62 are scored: 31 of them.
        assert found.targets(index).tolist() == window[33:].tolist()
        assert compact.top_ids.shape == (31, 261)
        best = np.take_along_axis(log_p[32:63], compact.top_ids.astype(int), axis=1)
        np.testing.assert_allclose(compact.top_log_probs, best, atol=1e-5)
        np.testing.assert_allclose(compact.target_log_probs, log_p[range(32, 63), window[33:]], atol=1e-5)
    [perplexity] = result.record.measurements
    assert perplexity.value == found.header.perplexity
    assert perplexity.trials == 6 * 31


def test_compact_reference_keeps_top_sample_and_rest(source: str, text: str, context: Context, tmp_path: Path) -> None:
    compact = SMALL.model_copy(update={"top": 16, "sample": 8})
    result = reference.reference(source, text, compact, context)
    arrays = load_file(context.store.materialize(result.record.output, tmp_path / "read") / reference.NUMBERS)
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == {
        "tokens": ((6, 64), "int32"),
        "top_ids": ((186, 16), "uint16"),
        "top_log_probs": ((186, 16), "float32"),
        "sample_ids": ((186, 8), "uint16"),
        "sample_log_probs": ((186, 8), "float32"),
        "rest_mass": ((186,), "float32"),
        "target_log_probs": ((186,), "float32"),
    }
    np.testing.assert_allclose(np.exp(arrays["top_log_probs"]).sum(axis=1) + arrays["rest_mass"], 1, atol=1e-5)


def test_estimate_agrees_with_the_exact_figure(source: str, text: str, base: str, context: Context) -> None:
    exact = measure(context, base, reference.reference(source, text, SMALL, context).record.output, "fake:Q3")
    compact = SMALL.model_copy(update={"top": 32, "sample": 32})
    estimate = measure(context, base, reference.reference(source, text, compact, context).record.output, "fake:Q3")
    ours, theirs = values(estimate), values(exact)
    assert ours["kl_divergence"] == pytest.approx(theirs["kl_divergence"], rel=0.03)
    assert ours["kl_divergence"] != theirs["kl_divergence"]
    # Here all positions are so alike that the draw alone could have made the tail of the estimates.
    assert "kl_divergence_p99" in theirs
    assert "kl_divergence_p99" not in ours
    assert any("the 99th percentile is left out" in note for note in estimate.notes)
    for same in ("top_1_agreement", "perplexity", "perplexity_ratio"):
        assert ours[same] == pytest.approx(theirs[same], rel=1e-6)


def test_sound_variant_passes_the_default_gates_and_two_bits_do_not(
    source: str, text: str, base: str, context: Context
) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    gates = {name: bound for name, bound in DEFAULT_GATES.items() if name != "conversion_kl"}
    sound = measure(context, base, held_against, "fake:Q8")
    assert judge(sound.measurements, gates).passed
    verdict = judge(measure(context, base, held_against, "fake:Q2").measurements, gates)
    assert not verdict.passed
    assert "mean KL divergence" in verdict.reasons[0]
    assert sound.notes == ()
    assert [answer.text for answer in sound.answers] == ["Minted."] * 3
    assert all(answer.stopped and answer.tokens == 8 for answer in sound.answers)
    by_name = {m.measure: m for m in sound.measurements}
    kl = by_name["kl_divergence"]
    assert (kl.trials, kl.statistic) == (186, "mean")
    assert 0 < kl.spread < kl.value
    assert all(m.hardware is not None and m.hardware.threads == 1 for m in sound.measurements)


def test_base_has_no_divergence_from_its_source(source: str, text: str, base: str, context: Context) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    found = values(read(context.store, evaluate("fake", base, held_against, SMALL, 1, context).record.output))
    assert found["kl_divergence"] < 1e-9
    assert found["top_1_agreement"] == 1
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-6)


def test_base_can_be_the_reference(source: str, text: str, base: str, context: Context, tmp_path: Path) -> None:
    result = reference.reference(source, text, SMALL, context, base=("fake", base))
    assert result.record.step.inputs == {"source": source, "text": text, "base": base}
    found = reference.read(context.store.materialize(result.record.output, tmp_path / "read"))
    assert (found.header.kind, found.header.format) == ("base", "fake")
    from_source = reference.reference(source, text, SMALL, context)
    assert from_source.record.key != result.record.key
    same = reference.read(context.store.materialize(from_source.record.output, tmp_path / "source"))
    np.testing.assert_array_equal(found.windows[0].top_log_probs, same.windows[0].top_log_probs)


def test_second_time_nothing_is_measured(source: str, text: str, base: str, context: Context) -> None:
    def steps() -> list[StepResult]:
        first = reference.reference(source, text, SMALL, context)
        return [first, evaluate("fake", base, first.record.output, SMALL, 1, context)]

    assert [step.reused for step in steps()] == [False, False]
    assert [step.reused for step in steps()] == [True, True]


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ({"answer_tokens": 5}, (True, False)),
        ({"seed": 1}, (False, True)),
        ({"windows": 5}, (False, False)),
        ({"prompts": ("Who?",)}, (False, False)),
        # Where the text came from is not what it says: its digest counts.
        ({"data": {"source": "file:other.txt"}}, (True, True)),
    ],
)
def test_what_changes_a_figure_changes_the_key(
    source: str, text: str, base: str, context: Context, change: dict[str, Any], reused: tuple[bool, bool]
) -> None:
    def steps(wanted: Evaluation) -> tuple[bool, bool]:
        first = reference.reference(source, text, wanted, context)
        return first.reused, evaluate("fake", base, first.record.output, wanted, 1, context).reused

    steps(SMALL)
    # With every token kept, another seed gives the same bytes, so the evaluation is one already made.
    assert steps(Evaluation.model_validate(SMALL.model_dump() | change)) == reused


def test_short_text_is_refused_with_the_number_of_windows_it_gives(
    source: str, context: Context, keep: Callable[..., str]
) -> None:
    short = keep(lambda folder: (folder / "short.txt").write_text("x" * 200))
    with pytest.raises(SourceError, match=r"gives 3 windows of 64 tokens \(201 tokens\), and 6 are asked for"):
        reference.reference(source, short, SMALL, context)


def test_text_in_another_encoding_is_refused(source: str, context: Context, keep: Callable[..., str]) -> None:
    latin = keep(lambda folder: (folder / "latin.txt").write_bytes(b"caf\xe9" * 500))
    with pytest.raises(SourceError, match=r"the evaluation text is not UTF-8 \(byte 3\)"):
        reference.reference(source, latin, SMALL, context)


def test_source_template_without_end_is_refused(source: str, text: str, context: Context, tmp_path: Path) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    hostile = changed(context, source, tmp_path / "x", edit_json(fake_model.TOKENIZER, chat_template=loop))
    with pytest.raises(UnsafeSourceError, match="could not be rendered within 2 s and 256 MB"):
        reference.reference(hostile, text, SMALL, context)


def damage(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = load_file(folder / fake_model.WEIGHTS)["table"]
        table[ord("s"), 7] = value
        save_file({"table": table}, folder / fake_model.WEIGHTS)

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_leave_the_divergence_out(
    source: str, text: str, base: str, context: Context, tmp_path: Path, value: float
) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    damaged = changed(context, base, tmp_path / "x", damage(value))
    found = read(context.store, evaluate("fake", damaged, held_against, SMALL, 1, context).record.output)
    assert values(found)["finite_logits"] == 0
    assert not {"kl_divergence", "perplexity", "top_1_agreement"} & set(values(found))
    assert any("of the logits of window 1 are not finite" in note for note in found.notes)
    reasons = judge(found.measurements, DEFAULT_GATES).reasons
    assert "mean KL divergence was not measured, and a gate asks for it" in reasons


def test_source_whose_logits_are_not_finite_is_refused(
    source: str, text: str, context: Context, tmp_path: Path
) -> None:
    damaged = changed(context, source, tmp_path / "x", damage(np.nan))
    with pytest.raises(ToolError, match="logits that are not finite in window 1 of 6"):
        reference.reference(damaged, text, SMALL, context)


def test_other_template_is_seen_and_used(source: str, text: str, base: str, context: Context, tmp_path: Path) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    # Equal for chats without a system message: 6 of the 7.
    other = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + fake_model.TEMPLATE
    variant = changed(context, base, tmp_path / "x", edit_json(fake_model.TOKENIZER, chat_template=other))
    found = read(context.store, evaluate("fake", variant, held_against, SMALL, 1, context).record.output)
    assert values(found)["template_parity"] == pytest.approx(6 / 7)
    assert "the chat template renders 'TemplateError: no system'" in found.notes[0]
    assert values(found)["generates"] == 1


def test_template_without_end_of_a_variant_fails_its_parity(
    source: str, text: str, base: str, context: Context, tmp_path: Path
) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    variant = changed(
        context, base, tmp_path / "x", edit_json(fake_model.TOKENIZER, chat_template="{{ 'A' * 10**10 }}")
    )
    found = read(context.store, evaluate("fake", variant, held_against, SMALL, 1, context).record.output)
    assert values(found)["template_parity"] == 0
    assert "could not be rendered within 2 s and 256 MB" in found.notes[0]
    assert values(found)["kl_divergence"] < 1e-9


def test_model_without_template_continues_plain_prompts(
    source: str, text: str, base: str, context: Context, tmp_path: Path
) -> None:
    plain = edit_json(fake_model.TOKENIZER, chat_template="")
    without = changed(context, source, tmp_path / "x", plain)
    variant = changed(context, base, tmp_path / "y", plain)
    wanted = SMALL.model_copy(update={"prompts": ("Minte",)})
    held_against = reference.reference(without, text, wanted, context).record.output
    found = read(context.store, evaluate("fake", variant, held_against, wanted, 1, context).record.output)
    assert values(found)["template_parity"] == 1
    assert values(found)["generates"] == 1
    assert found.answers[0].text == "d."
    assert "stops" not in values(found)
    assert any("no chat template" in note for note in found.notes)
    with_template = reference.reference(source, text, SMALL, context).record.output
    lost = read(context.store, evaluate("fake", variant, with_template, SMALL, 1, context).record.output)
    assert values(lost)["template_parity"] == 0
    assert "the source has a chat template, this has none" in lost.notes


def test_without_prompts_the_text_itself_is_continued(source: str, text: str, base: str, context: Context) -> None:
    silent = SMALL.model_copy(update={"prompts": ()})
    held_against = reference.reference(source, text, silent, context).record.output
    found = read(context.store, evaluate("fake", base, held_against, silent, 1, context).record.output)
    assert values(found)["generates"] == 1
    assert found.answers[0].prompt == TEXT[:31]


def test_other_prompts_than_the_reference_knows_can_be_asked(
    source: str, text: str, base: str, context: Context
) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    other = SMALL.model_copy(update={"prompts": (SMALL.prompts[1], "Who are you? " * 50)})
    found = read(context.store, evaluate("fake", base, held_against, other, 1, context).record.output)
    assert [answer.prompt for answer in found.answers] == list(other.prompts)
    assert [answer.text for answer in found.answers] == ["Minted."] * 2


def test_answer_that_does_not_end_names_the_limit(source: str, text: str, base: str, context: Context) -> None:
    hasty = SMALL.model_copy(update={"answer_tokens": 3})
    held_against = reference.reference(source, text, hasty, context).record.output
    found = read(context.store, evaluate("fake", base, held_against, hasty, 1, context).record.output)
    assert values(found)["stops"] == 0
    assert [answer.text for answer in found.answers] == ["Min"] * 3
    assert "the answer to 'What is the capital of France?' was cut at the limit of 3 tokens" in found.notes


def test_tokenizer_that_adds_no_beginning_is_seen(
    source: str, text: str, base: str, context: Context, tmp_path: Path
) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    variant = changed(context, base, tmp_path / "x", edit_json(fake_model.TOKENIZER, add_bos_token=False))
    found = read(context.store, evaluate("fake", variant, held_against, SMALL, 1, context).record.output)
    assert values(found)["special_tokens_parity"] == pytest.approx(2 / 3)
    assert "does not put the beginning-of-sequence token first" in found.notes[0]


def test_other_tokens_are_seen_and_their_predictions_not_compared(
    source: str, text: str, base: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    plain = fake_model.FakeSession.tokenize

    def reversed_digits(self: Any, content: str, *, special: bool = False) -> list[int]:
        return plain(self, content.replace("1", "l"), special=special)

    monkeypatch.setattr(fake_model.FakeSession, "tokenize", reversed_digits)
    step = evaluate("fake", base, held_against, SMALL, 1, context)
    found = read(context.store, step.record.output)
    assert 0.8 < values(found)["tokenizer_parity"] < 1
    assert found.notes[0].startswith("tokenizes differently: 'Prices rose 3.14% to $1,234,567.89")

    class Larger(fake_model.FakeSession):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.vocabulary = 300

    monkeypatch.setattr(formats.load("fake"), "FakeSession", Larger)
    variant = quantize(base, Variant.parse("fake:Q8"), context).record.output
    larger = read(context.store, evaluate("fake", variant, held_against, SMALL, 1, context).record.output)
    assert values(larger)["tokenizer_parity"] == 0
    assert "kl_divergence" not in values(larger)
    assert "the vocabulary has 300 tokens, the source's 261" in larger.notes[0]


def test_variant_that_does_not_load_is_an_error(source: str, text: str, base: str, context: Context) -> None:
    held_against = reference.reference(source, text, SMALL, context).record.output
    with pytest.raises(ToolError, match="the file does not load"):
        measure(context, base, held_against, fail="evaluate")
