"""Predicts the size of a variant from the shapes in a checkpoint's header, before anything is downloaded or converted.

llama.cpp stores the tensors of one file in several types, chosen by a tensor's role, its layer and its row's width.
`_chosen` repeats those rules for the types that need no importance matrix and for models without experts; the roles
are read off the names that Hugging Face checkpoints use. What is not known, the vocabulary's text, is estimated. With
a base at hand `size_of_base` asks the library itself.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmint.formats.gguf import library
from modelmint.formats.gguf.header import read_header
from modelmint.formats.gguf.types import COPY, FILE_TYPES, TENSOR_TYPES, FileType, TensorType
from modelmint.formats.gguf.vocabulary import FILE

if TYPE_CHECKING:
    from modelmint.formats import TensorShape
    from modelmint.sandbox import Sandbox

VOCABULARY_BYTES = 40
"""Bytes of metadata for one token: text, length, score, type and its share of the merges."""

TENSOR_BYTES = 80
"""Bytes of the header for one tensor, alignment included."""

_ROLES = {
    "token_embd": r"(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$",
    "output": r"(lm_head|output|embed_out)\.weight$",
    "attn_q": r"(self_attn|attention|attn)\.(q_proj|wq)\.weight$",
    "attn_k": r"(self_attn|attention|attn)\.(k_proj|wk)\.weight$",
    "attn_v": r"(self_attn|attention|attn)\.(v_proj|wv)\.weight$",
    "attn_qkv": r"(qkv_proj|query_key_value|c_attn|Wqkv)\.weight$",
    "attn_output": r"(self_attn|attention|attn)\.(o_proj|dense|out_proj|wo|c_proj)\.weight$",
    "ffn_gate": r"(gate_proj|w1)(\.weight)?$",
    "ffn_up": r"(up_proj|gate_up_proj|fc1|w3|dense_h_to_4h)(\.weight)?$",
    "ffn_down": r"(down_proj|fc2|w2|dense_4h_to_h)(\.weight)?$",
}
_FALLBACKS = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_K", "q3_K", "tq1_0", "tq2_0"), "q4_0"),
    "q4_K": "q5_0",
    "q5_K": "q5_1",
    "q6_K": "q8_0",
}
_MIXTURES = {
    ("Q5_K_M", "attn_v"): ("ends", "q6_K", ""),
    ("Q5_K_M", "ffn_down"): ("ends", "q6_K", ""),
    ("Q4_K_M", "attn_v"): ("ends", "q6_K", ""),
    ("Q4_K_M", "ffn_down"): ("ends", "q6_K", ""),
    ("Q4_K_S", "attn_v"): ("first 4", "q5_K", ""),
    ("Q4_K_S", "ffn_down"): ("first 8th", "q5_K", ""),
    ("IQ4_NL", "attn_v"): ("grouped", "q5_K", ""),
    ("IQ4_NL", "ffn_down"): ("first 8th", "q5_K", ""),
    ("IQ4_XS", "attn_v"): ("grouped", "q5_K", ""),
    ("IQ4_XS", "ffn_down"): ("first 8th", "q5_K", ""),
    ("Q3_K_L", "attn_v"): ("always", "q5_K", ""),
    ("Q3_K_L", "ffn_down"): ("always", "q5_K", ""),
    ("Q3_K_L", "attn_output"): ("always", "q5_K", ""),
    ("Q3_K_M", "attn_v"): ("first 2", "q5_K", "q4_K"),
    ("Q3_K_M", "ffn_down"): ("first 16th", "q5_K", "q4_K"),
    ("Q3_K_M", "attn_output"): ("always", "q4_K", ""),
    ("IQ3_M", "attn_v"): ("always", "q4_K", ""),
    ("IQ3_M", "ffn_down"): ("first 8th", "q4_K", ""),
    ("IQ3_M", "attn_output"): ("always", "q4_K", ""),
    ("IQ3_S", "attn_v"): ("grouped", "q4_K", ""),
    ("Q2_K", "attn_v"): ("grouped", "q4_K", "q3_K"),
    ("Q2_K", "ffn_down"): ("always", "q3_K", ""),
    ("Q2_K", "attn_output"): ("always", "q3_K", ""),
}
"""By type and role: a condition, the tensor type where it holds, and where it does not; empty is the usual one."""


@dataclass(frozen=True)
class _Weight:
    """A tensor in llama.cpp's terms: its role, its layer (-1 outside of layers), its row's width and its elements."""

    role: str
    name: str
    layer: int
    width: int
    elements: int


@dataclass(frozen=True)
class _Model:
    """What the rules ask about the whole model."""

    layers: int
    queries_per_key: float
    tied: bool


def size_of_variant(tensors: Sequence["TensorShape"], type_name: str, options: Mapping[str, Any]) -> int:
    """Predicted bytes of a variant's file; within a few percent for decoder models of the usual kind.

    Args:
        tensors: the weights of the checkpoint.
        type_name: a name in `FILE_TYPES`.
        options: the variant's options in full.
    """
    kind = FILE_TYPES[type_name]
    weights = [_weight(tensor) for tensor in tensors if tensor.shape]
    model = _model(weights)
    size = 0
    for weight in weights:
        chosen = _stored(weight, kind, model, options)
        size += math.ceil(chosen.bytes_of(weight.width, weight.elements) / 32) * 32
    rows = max((w.elements // w.width for w in weights if w.role == "token_embd"), default=0)
    return size + rows * VOCABULARY_BYTES + len(weights) * TENSOR_BYTES


def size_of_base(base: Path, type_name: str, options: Mapping[str, Any], sandbox: "Sandbox") -> int:
    """Bytes of a variant's file, from the library's dry run over the base in the folder `base`; exact.

    Raises:
        ToolError: if the base is not sound.
    """
    arguments = {"base": str(base.absolute() / FILE), "type_name": type_name, "options": dict(options)}
    size: int = sandbox.call(f"{__name__}:run", arguments).value
    return size


def run(base: str, type_name: str, options: Mapping[str, Any]) -> int:
    """In the child: let the library choose every tensor's type without storing any."""
    from modelmint.formats.gguf import quantize

    source = Path(base)
    header = read_header(source)
    log = library.Log(library.INFO_LEVEL)
    if quantize.call(source, source, FILE_TYPES[type_name], options, 1, dry_run=True) != 0:
        raise quantize.failure(log, source)
    chosen = dict(re.findall(r"\[ *\d+/ *\d+\] (\S+) .* MiB -> .* MiB \((\S+)\)", log.text))
    size = header.data_start
    for tensor in header.tensors:
        kind = TENSOR_TYPES[chosen[tensor.name]] if tensor.name in chosen else tensor.type
        size += math.ceil(kind.bytes_of(tensor.width, tensor.elements) / 32) * 32
    return size


def _weight(tensor: "TensorShape") -> _Weight:
    role = next((role for role, pattern in _ROLES.items() if re.search(pattern, tensor.name)), "other")
    if len(tensor.shape) < 2 or re.search(r"norm\.weight$|mlp\.gate\.weight$|\.bias$", tensor.name):
        role = "kept"
    layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", tensor.name)
    number = int(layer[1]) if layer else -1
    name = f"blk.{number}.{role}.weight" if layer else f"{role}.weight"
    return _Weight(role, name, number, tensor.shape[-1], tensor.elements)


def _model(weights: Sequence[_Weight]) -> _Model:
    queries = next((weight.elements for weight in weights if weight.role == "attn_q"), 1)
    keys = next((weight.elements for weight in weights if weight.role == "attn_k"), queries)
    return _Model(
        layers=max((weight.layer for weight in weights), default=-1) + 1,
        queries_per_key=queries / keys,
        tied=not any(weight.role == "output" for weight in weights),
    )


def _stored(weight: _Weight, kind: FileType, model: _Model, options: Mapping[str, Any]) -> TensorType:
    """The type that a tensor is stored in, fallbacks included."""
    default = TENSOR_TYPES[kind.tensors]
    if weight.role == "kept":
        return TENSOR_TYPES["f32"]
    if kind.name == COPY or (weight.role == "output" and options["leave_output_tensor"]):
        return TENSOR_TYPES["f16"]
    if weight.role == "token_embd" and options["token_embedding_type"]:
        return TENSOR_TYPES[options["token_embedding_type"]]
    if weight.role == "output" and options["output_tensor_type"]:
        return TENSOR_TYPES[options["output_tensor_type"]]
    if not default.quantized:
        return default
    named = next(
        (t for p, _, t in (o.rpartition("=") for o in options["tensor_types"]) if re.search(p, weight.name)), ""
    )
    if named or options["pure"]:
        chosen = TENSOR_TYPES[named or kind.tensors]
    elif weight.role == "token_embd" and model.tied and options["output_tensor_type"]:
        chosen = TENSOR_TYPES[options["output_tensor_type"]]
    else:
        chosen = TENSOR_TYPES[_chosen(weight, kind, model)]
    return _fitting(chosen, weight.width)


def _fitting(kind: TensorType, width: int) -> TensorType:
    """The type itself where its blocks fill the rows, else the one that llama.cpp falls back to."""
    if width % kind.block == 0:
        return kind
    lower = TENSOR_TYPES[_FALLBACKS.get(kind.name, kind.name)]
    return lower if width % lower.block == 0 else TENSOR_TYPES["f16"]


def _chosen(weight: _Weight, kind: FileType, model: _Model) -> str:
    """The mixture's choice for a tensor."""
    default = kind.tensors
    if weight.role == "output" or (weight.role == "token_embd" and model.tied):
        fits = weight.width % TENSOR_TYPES[default].block == 0
        return "q8_0" if kind.name in ("MXFP4_MOE", "Q8_0") or not fits else "q6_K"
    if kind.name == "MXFP4_MOE":
        return "q8_0"
    if weight.role == "token_embd":
        return "q4_K" if kind.name in ("TQ1_0", "TQ2_0", "Q2_0") else default
    role = "attn_v" if weight.role == "attn_qkv" else weight.role
    when, then, otherwise = _MIXTURES.get((kind.name, role), ("never", "", ""))
    return (then if _holds(when, weight.layer, model) else otherwise) or default


def _holds(when: str, layer: int, model: _Model) -> bool:
    """Whether a rule's condition holds for a layer."""
    eighth = model.layers // 8
    return {
        "never": False,
        "always": True,
        "grouped": model.queries_per_key >= 4,
        "first 2": layer < 2,
        "first 4": layer < 4,
        "first 16th": layer < model.layers // 16,
        "first 8th": layer < eighth,
        "ends": layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2,
    }[when]
