"""The made-up format: a real quantization of a made-up model, and failures on request."""

import filecmp
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelmint import divergence, formats
from modelmint.errors import RecipeError, ToolError, UnsupportedError
from modelmint.formats import TensorShape, fake, fake_model
from modelmint.isolate import Limits
from modelmint.recipe import Variant
from modelmint.sandbox import Sandbox

pytestmark = pytest.mark.pure

SANDBOX = Sandbox(threads=1, limits=Limits(wall_seconds=60))
TEXT = "The assert statement checks what a program takes for granted. " * 12


@pytest.fixture
def base(tmp_path: Path) -> Path:
    fake_model.write_checkpoint("tiny", tmp_path / "source")
    folder = tmp_path / "base"
    folder.mkdir()
    fake.convert(tmp_path / "source", folder, {}, SANDBOX)
    return folder


def make(base: Path, variant: Variant) -> tuple[Path, dict[str, float]]:
    folder = base.parent / variant.name.replace(":", "-")
    folder.mkdir()
    work = fake.quantize(base, folder, variant, SANDBOX)
    return folder, {m.measure: m.value for m in work.measurements}


def test_format_offers_every_name() -> None:
    module = formats.load("fake")
    wanted = {name for name in vars(formats.Format) if not name.startswith("_")} | set(formats.Format.__annotations__)
    assert {name for name in wanted if not hasattr(module, name)} == set()
    assert module.NAME == "fake"


def test_same_name_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, name in (("a", "tiny"), ("b", "tiny"), ("c", "other")):
        fake_model.write_checkpoint(name, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "tokenizer_config.json"]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False) == (files, [], [])
    assert "model.safetensors" in filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1]


def test_divergence_grows_as_size_shrinks_and_two_bits_fail_the_default_gate(base: Path) -> None:
    reference = fake_model.FakeSession(base)
    tokens = [fake_model.BEGINNING, *reference.tokenize(TEXT)]
    logits = reference.logits(tokens)
    targets = np.array(tokens)
    compact = divergence.compress(logits, targets, top=300, sample=1, generator=np.random.default_rng(0))
    found = []
    for name in fake.types():
        folder, measured = make(base, Variant.parse(f"fake:{name}"))
        session = fake.open_session(folder, 1, 512)
        kl = divergence.compare(compact, session.logits(tokens), targets).divergence.mean()
        found.append((measured["bits_per_weight"], float(kl)))
    bits, kls = zip(*found, strict=True)
    assert list(bits) == sorted(bits, reverse=True)
    assert list(kls) == sorted(kls)
    assert kls[0] == pytest.approx(0, abs=1e-9)
    assert 1e-6 < kls[1] < 1e-3 < kls[2] < 0.05
    assert kls[-1] > 0.15


@given(st.integers(2, 8), st.integers(4, 70), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_packing_loses_at_most_half_a_step(bits: int, group: int, seed: int) -> None:
    shape = (fake_model.VOCABULARY, fake_model.VOCABULARY)
    table = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    tensors = fake_model.pack(table, bits, group)
    step = np.repeat(tensors["scales"].astype(np.float32), group)[: table.size].reshape(shape)
    # The scale is kept in 16 bits, so the largest code of a group may be cut by a thousandth.
    assert (np.abs(fake_model.unpack(tensors, bits, group) - table) <= step * 0.5 + np.abs(table) * 2e-3).all()
    assert tensors["codes"].nbytes == pytest.approx(table.size * bits / 8, rel=0.01)


def test_predicted_size_is_that_of_the_tensors(base: Path) -> None:
    shape = TensorShape("table", (fake_model.VOCABULARY, fake_model.VOCABULARY), "F32")
    for name in fake.types():
        variant = Variant(format="fake", type=name)
        folder, _ = make(base, variant)
        size = (folder / fake_model.WEIGHTS).stat().st_size
        assert 0 <= size - fake.predict_size([shape], variant) < 300


def test_smaller_groups_cost_bits_and_lower_the_error(base: Path) -> None:
    coarse, fine = (
        make(base, Variant(format="fake", type="Q4", label=label, options={"group": group}))
        for label, group in (("coarse", 256), ("fine", 8))
    )
    assert fine[1]["bits_per_weight"] > coarse[1]["bits_per_weight"] + 1
    source = fake_model.FakeSession(base)
    ids = list(range(200))
    errors = [np.abs(fake_model.FakeSession(f).logits(ids) - source.logits(ids)).mean() for f, _ in (coarse, fine)]
    assert errors[1] < errors[0] / 2


def test_logits_do_not_depend_on_where_they_are_asked_from(base: Path) -> None:
    session = fake_model.FakeSession(base)
    tokens = session.tokenize("a window of text")
    whole = session.logits(tokens)
    for first in (1, 2, 5, len(tokens) - 1):
        np.testing.assert_allclose(session.logits(tokens, first), whole[first:], rtol=1e-6)
    assert whole.shape == (len(tokens), fake_model.VOCABULARY)


def test_model_answers_and_stops(base: Path) -> None:
    session = fake_model.FakeSession(base)
    prompt = session.tokenize("<s><|user|>What are you?<|assistant|>", special=True)
    assert prompt[0] == session.special_tokens.beginning
    answer = session.generate(prompt, 64)
    assert session.detokenize(answer) == "Minted."
    assert answer[-1] in session.special_tokens.end
    assert session.generate(prompt, 3) == answer[:3]


@given(st.text())
def test_tokens_give_the_text_back(text: str) -> None:
    session = fake_model.FakeSession.__new__(fake_model.FakeSession)
    assert session.detokenize(session.tokenize(text)) == text


def test_special_tokens_are_read_only_where_asked(base: Path) -> None:
    session = fake_model.FakeSession(base)
    assert session.tokenize("a</s>") == list(b"a</s>")
    assert session.tokenize("a</s>b", special=True) == [97, fake_model.END, 98]


def test_speed_is_measured(base: Path) -> None:
    speed = fake_model.FakeSession(base).speed(list(range(64)), 8)
    assert min(vars(speed).values()) > 0


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"type": "Q5_K"}, r"fake:Q5_K: unknown type 'Q5_K'; known are F32, Q2, Q3, Q4, Q8"),
        ({"type": "q4"}, r"unknown type 'q4'; did you mean 'Q4'\?"),
        ({"type": "Q4", "options": {"groups": 8}}, r"fake:Q4: option groups: .*; did you mean 'group'\?"),
        ({"type": "Q4", "options": {"group": 1}}, r"option group: Input should be greater than or equal to 4"),
        ({"type": "Q4", "options": {"fail": "never"}}, r"option fail: Input should be '', 'quantize', 'crash'"),
    ],
)
def test_variant_that_cannot_be_made_is_refused(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fake.check(Variant(format="fake", **variant))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnsupportedError, match="takes fake checkpoints, not 'llama'"):
        fake.refuse_unsupported(tmp_path)


def test_failures_happen_where_they_are_asked_for(base: Path) -> None:
    with pytest.raises(ToolError, match="the conversion failed"):
        fake.convert(base, base, {"fail": True}, SANDBOX)
    with pytest.raises(ToolError, match="the quantization failed"):
        make(base, Variant(format="fake", type="Q4", label="a", options={"fail": "quantize"}))
    with pytest.raises(ToolError, match="killed by SIGABRT") as crash:
        make(base, Variant(format="fake", type="Q4", label="b", options={"fail": "crash"}))
    assert crash.value.signal == "SIGABRT"
    folder, _ = make(base, Variant(format="fake", type="Q4", label="c", options={"fail": "evaluate"}))
    with pytest.raises(ToolError, match="the file does not load"):
        fake.open_session(folder, 1, 8)


def test_file_names_tell_model_type_and_label() -> None:
    assert fake.file_name("tiny", "Q4", "fine", "model.safetensors") == "tiny-Q4-fine-model.safetensors"
    assert fake.file_name("tiny", "Q4", "", "config.json") == "tiny-Q4-config.json"
