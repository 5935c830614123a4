"""Sessions: logits of any part of a context, greedy answers that stop, speeds, and what does not fit."""

import math

import numpy as np
import pytest
from gguf_calls import base, doctored, in_child, scratch, source

from modelmint.errors import ToolError
from modelmint.formats import Session
from modelmint.formats.gguf import format as gguf
from modelmint.formats.gguf import session as module

pytestmark = pytest.mark.tools

TOKENS = [1, *range(10, 110)]


@pytest.fixture(scope="module")
def session():
    opened: Session = gguf.open_session(base(), 1, 512)
    yield opened
    opened.close()
    opened.close()


class TestLogits:
    def test_one_row_for_each_position_from_the_first_asked_for(self, session):
        every = session.logits(TOKENS)
        assert every.shape == (101, session.vocabulary)
        assert every.dtype == np.float32
        assert np.isfinite(every).all()
        # Fewer rows are multiplied by another kernel.
        np.testing.assert_allclose(session.logits(TOKENS, 60), every[60:], atol=2e-2)
        np.testing.assert_allclose(session.logits(TOKENS, 100), every[100:], atol=2e-2)

    def test_a_context_is_fresh_each_time(self, session):
        before = session.logits(TOKENS[:20])
        session.logits(list(reversed(TOKENS)))
        session.generate(TOKENS, 5)
        np.testing.assert_array_equal(session.logits(TOKENS[:20]), before)

    def test_rows_are_the_callers_own(self, session):
        first = session.logits(TOKENS)
        kept = first.copy()
        session.logits(list(reversed(TOKENS)))
        np.testing.assert_array_equal(first, kept)

    def test_a_text_longer_than_a_batch_is_no_other_text(self, session, monkeypatch):
        monkeypatch.setattr(module, "BATCH", 16)
        stepwise = gguf.open_session(base(), 1, 512)
        np.testing.assert_allclose(stepwise.logits(TOKENS, 30), session.logits(TOKENS, 30), atol=2e-2)
        assert stepwise.generate(TOKENS, 6) == session.generate(TOKENS, 6)
        stepwise.close()

    def test_more_tokens_than_the_context_holds_are_refused(self, session):
        with pytest.raises(ToolError, match="513 tokens do not fit into the context of 512"):
            session.logits([5] * 513)
        with pytest.raises(ToolError, match="513 tokens do not fit into the context of 512"):
            session.generate([5] * 500, 50)
        assert session.logits(TOKENS).shape[0] == 101


class TestAnswers:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_are_those_of_the_source(self, session):
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source(), dtype=torch.float32)
        with torch.inference_mode():
            expected = model.generate(torch.tensor([TOKENS]), max_new_tokens=8, do_sample=False)[0, len(TOKENS) :]
        assert session.generate(TOKENS, 8) == expected.tolist()

    def test_follow_from_the_logits(self, session):
        answer = session.generate(TOKENS, 4)
        best = session.logits([*TOKENS, *answer], len(TOKENS) - 1).argmax(axis=-1)
        assert answer == best[:4].tolist()

    def test_stop_at_an_end_token_which_is_their_last(self, session):
        answer = session.generate(TOKENS, 8)
        third = answer[2]
        assert third not in answer[:2]
        ending = gguf.open_session(doctored(base(), "tokenizer.ggml.eos_token_id", "I", third), 1, 512)
        assert third in ending.special_tokens.end
        assert ending.generate(TOKENS, 8) == answer[:3]
        ending.close()

    def test_stop_at_the_limit(self, session):
        assert len(session.generate(TOKENS, 1)) == 1
        assert session.generate(TOKENS, 0) == []


class TestText:
    def test_special_tokens_are_read_where_asked_for_and_left_out_of_text(self, session):
        tokens = session.tokenize("<|user|>Hi</s>", special=True)
        assert (tokens[0], tokens[-1]) == (4, 2)
        assert session.detokenize(tokens).strip() == "Hi"
        assert 4 not in session.tokenize("<|user|>Hi</s>")

    def test_a_long_text_comes_back(self, session):
        text = "words and 数字 " * 3000
        assert session.detokenize(session.tokenize(text)) == text

    def test_nothing_is_nothing(self, session):
        assert session.tokenize("") == []
        assert session.detokenize([]) == ""


class TestSpeed:
    def test_every_figure_is_a_time_that_passed(self, session):
        speed = session.speed(TOKENS, 4)
        figures = (speed.load_seconds, speed.first_token_seconds, speed.prefill_rate, speed.decode_rate)
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)
        # The first token needs the whole prefill, and then a little.
        assert speed.first_token_seconds >= len(TOKENS) / speed.prefill_rate

    def test_measuring_changes_no_answer(self, session):
        before = session.generate(TOKENS, 4)
        session.speed(TOKENS, 4)
        assert session.generate(TOKENS, 4) == before


class TestFiles:
    def test_what_is_no_model_is_refused_with_llama_cpps_reason(self):
        (folder := scratch()).joinpath("model.gguf").write_bytes(b"no model")
        with pytest.raises(ToolError, match=r"llama\.cpp refuses model\.gguf: .*magic"):
            gguf.open_session(folder, 1, 64)

    def test_a_missing_file_is_refused(self):
        with pytest.raises(ToolError, match=r"llama\.cpp refuses model\.gguf: .*No such file"):
            gguf.open_session(scratch(), 1, 64)


def test_a_session_in_a_child_answers_as_one_here(session):
    outcome = in_child("decode", folder=str(base()), tokens=TOKENS[:40])
    assert outcome.value == session.logits(TOKENS[:40]).argmax(axis=-1).tolist()
    assert outcome.network_isolated
