"""Checkpoints become bases: every architecture of the shipped recipes, proved against PyTorch; bad ones are refused."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from gguf_calls import SANDBOX, TEXTS, base, scratch, source

from modelmint.errors import ModelMintError, ToolError, UnsupportedError
from modelmint.formats.gguf import format as gguf
from modelmint.formats.gguf.header import read_header
from modelmint.isolate import Progress
from modelmint.sandbox import Sandbox

pytestmark = pytest.mark.tools

NAMES = {"llama": "llama", "qwen3": "qwen3", "phi3": "phi3", "gemma3": "gemma3"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
class TestArchitectures:
    def test_predicts_as_the_source_does(self, architecture):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        tokens = AutoTokenizer.from_pretrained(source(architecture)).encode(TEXTS[0] * 4)
        model = AutoModelForCausalLM.from_pretrained(source(architecture), dtype=torch.float32)
        with torch.inference_mode():
            expected = log_softmax(model(torch.tensor([tokens])).logits[0].numpy())
        session = gguf.open_session(base(architecture), 1, 256)
        found = log_softmax(session.logits(tokens))
        session.close()
        divergence = float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())
        assert 0 <= divergence < 1e-5

    def test_tokenizes_as_the_source_does(self, architecture):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source(architecture))
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi there"}], add_generation_prompt=True, tokenize=False
        )
        session = gguf.open_session(base(architecture), 1, 64)
        for text in TEXTS:
            tokens = session.tokenize(text)
            assert tokens == tokenizer.encode(text, add_special_tokens=False)
            assert session.detokenize(tokens) == text
        assert session.tokenize(chat, special=True) == tokenizer.encode(chat, add_special_tokens=False)
        assert session.special_tokens.beginning == tokenizer.bos_token_id
        assert session.special_tokens.end == (tokenizer.eos_token_id,)
        assert session.special_tokens.adds_beginning
        assert session.chat_template == tiny.CHAT_TEMPLATE
        assert session.vocabulary == tiny.VOCABULARY
        session.close()

    def test_is_known_before_any_work(self, architecture):
        gguf.refuse_unsupported(source(architecture))
        assert read_header(base(architecture) / "model.gguf").architecture == NAMES[architecture]


class TestBase:
    @pytest.mark.parametrize(("type_name", "stored"), [("f16", "f16"), ("bf16", "bf16"), ("f32", "f32")])
    def test_stores_its_matrices_in_the_type_asked_for(self, type_name, stored):
        out = scratch()
        gguf.convert(source(), out, {"type": type_name}, SANDBOX)
        tensors = read_header(out / "model.gguf").tensors
        assert {tensor.type.name for tensor in tensors if len(tensor.shape) == 2} == {stored}
        assert {tensor.type.name for tensor in tensors if len(tensor.shape) == 1} == {"f32"}

    def test_depends_on_the_checkpoint_and_options_alone(self, tmp_path):
        moved = shutil.copytree(source(), tmp_path / "a folder by another name")
        gguf.convert(moved, out := scratch(), {}, SANDBOX)
        content = (out / "model.gguf").read_bytes()
        assert content == (base() / "model.gguf").read_bytes()
        for part in (b"another name", b"modelmint", str(source()).encode(), b"/tmp"):
            assert part not in content

    def test_bears_the_name_it_is_given(self):
        gguf.convert(source(), out := scratch(), {"name": "Tiny Llama 1M"}, SANDBOX)
        assert read_header(out / "model.gguf").text("general.name") == "Tiny Llama 1M"
        assert read_header(base() / "model.gguf").text("general.name") == "model"

    def test_is_made_without_network_and_says_how_far_it_is(self):
        heard: list[Progress] = []
        sandbox = Sandbox(threads=1, limits=SANDBOX.limits, on_progress=heard.append)
        work = gguf.convert(source(), scratch(), {}, sandbox)
        assert work.network_isolated
        assert heard[-1].done == heard[-1].total > 2_000_000
        assert heard[-1].unit == "bytes"

    def test_code_of_the_checkpoint_is_not_shown_to_the_converter(self, tmp_path):
        folder = shutil.copytree(source(), tmp_path / "source")
        (folder / "sentencepiece.py").write_text("raise SystemExit('code of the checkpoint ran')")
        (folder / "conversion.py").write_text("raise SystemExit('code of the checkpoint ran')")
        gguf.convert(folder, out := scratch(), {}, SANDBOX)
        assert (out / "model.gguf").read_bytes() == (base() / "model.gguf").read_bytes()


def change(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unknown_architecture(folder: Path) -> None:
    change(folder, "config.json", architectures=["LlamaForCausalLMM"])


def unmapped_tensor(folder: Path) -> None:
    rename_tensor(folder, b"mlp.gate_proj", b"mlp.gate_prok")


def missing_tensor(folder: Path) -> None:
    change(folder, "config.json", num_hidden_layers=3)


def larger_vocabulary(folder: Path) -> None:
    change(folder, "config.json", vocab_size=tiny.VOCABULARY + 64)


def no_byte_tokens(folder: Path) -> None:
    import sentencepiece

    lines = iter(["the quick brown fox jumps over the lazy dog", "while 12 zebras look on"] * 20)
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(prefix), model_type="bpe", vocab_size=60, minloglevel=2
    )
    (folder / "tokenizer.vocab").unlink()


def not_a_number(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        place = json.loads(file.read(length))["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
        file.seek(8 + length + place + 2 * 1000)
        file.write(b"\xc0\x7f")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_tensor(folder: Path, before: bytes, after: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(before, after))


@pytest.mark.parametrize(
    ("damage", "kind", "reason"),
    [
        (unknown_architecture, UnsupportedError, "LlamaForCausalLMM is not supported"),
        (unmapped_tensor, UnsupportedError, "Can not map tensor.*gate_prok"),
        (missing_tensor, ToolError, "block_count is 3, but tensors are there for 2 layers"),
        (larger_vocabulary, ToolError, "vocabulary has 704 tokens, its embedding 640 rows.*vocab_size"),
        (no_byte_tokens, ToolError, "lacks 228 of the 256 byte tokens.*tokenizer_class"),
        (not_a_number, ToolError, r"tensor blk\.1\.ffn_up\.weight holds NaN"),
        (cut, ToolError, "converter failed"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_its_reason(
    damage: Callable[[Path], None], kind: type[ModelMintError], reason: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(source(), tmp_path / "source")
    damage(folder)
    with pytest.raises(kind, match=reason):
        gguf.convert(folder, scratch(), {}, SANDBOX)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
