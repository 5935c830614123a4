"""Tiny checkpoints for tests of sources and inspection, written without any library that could correct their faults."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
CARD = "---\nlicense: apache-2.0\n---\n\n# Tiny\n"
VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(ord("a") + i): 3 + i for i in range(13)}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def weights(dtype: str = "float16") -> dict[str, "np.ndarray[Any, Any]"]:
    """The tensors of a llama of one layer, seeded."""
    draw = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "model.norm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.0.self_attn.v_proj.weight": (4, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
    }
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def safetensors_of(tensors: Mapping[str, "np.ndarray[Any, Any]"], dtypes: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of arrays; `dtypes` renames the type of one, such as BF16 stored as uint16."""
    names = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "u2": "U16", "i1": "I8", "u1": "U8"}
    header: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        dtype = (dtypes or {}).get(name) or names[array.dtype.str[1:]]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    return raw_safetensors(json.dumps(header), b"".join(array.tobytes() for array in tensors.values()))


def raw_safetensors(header: str, data: bytes) -> bytes:
    """A safetensors file of any header text and data."""
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: tuple[int, ...], start: int, end: int | None = None) -> dict[str, Any]:
    """One tensor in a header; the end follows from the shape unless it is to lie."""
    size = math.prod(shape) * BYTES.get(dtype, 1)
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size if end is None else end]}


def tokenizer_json() -> dict[str, Any]:
    """A tokenizer of single letters."""
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for token, i in list(VOCABULARY.items())[:3]
    ]
    return {
        "version": "1.0",
        "added_tokens": special,
        "model": {"type": "BPE", "vocab": dict(VOCABULARY), "merges": [], "unk_token": "<unk>"},
    }


def write_checkpoint(folder: Path, *, config: Mapping[str, Any] | None = None, card: str = CARD) -> Path:
    """Write a whole tiny checkpoint into a new folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    (folder / "README.md").write_text(card)
    (folder / "model.safetensors").write_bytes(safetensors_of(weights()))
    return folder
