"""Recognizes a checkpoint that was quantized before: by its configuration, its card, or its tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from modelmint.safetensors_header import TensorEntry

FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_TAG = re.compile(
    r"gptq|awq|gguf|ggml|exl[23]|bnb|bitsandbytes|hqq|aqlm|quip|nvfp4|mxfp4|fp8|int[48]|w[48]a(8|16)"
    r"|[2-8]-?bits?|mlx-[2-8]bit|quantized|compressed-tensors|(de)?quantized-from-.+",
    re.IGNORECASE,
)
_PACKED = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|quant_state\.[\w.]+|absmax)$")


def signs(
    config: Mapping[str, Any], card: Mapping[str, Any], files: Iterable[str], tensors: Iterable[TensorEntry]
) -> str:
    """A sentence that names every sign of an earlier quantization; empty if there is none.

    Args:
        config: the content of config.json.
        card: the front matter of the card.
        files: the paths of the checkpoint.
        tensors: its tensors.
    """
    found = []
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method") or quantization.get("quant_algo") or "unnamed"
        found.append(f"config.json has a quantization_config (method {method})")
    found += [f"it has a {path}" for path in files if path in FILES]
    if card.get("base_model_relation") == "quantized":
        found.append(f"its card says base_model_relation: quantized{_base(card)}")
    tags = card.get("tags")
    marked = [tag for tag in tags if isinstance(tag, str) and _TAG.fullmatch(tag)] if isinstance(tags, list) else []
    if marked:
        found.append(f"its card is tagged {', '.join(marked[:5])}")
    packed = [tensor for tensor in tensors if _PACKED.search(tensor.name) or _is_narrow_weight(tensor)]
    if packed:
        found.append(f"it has {len(packed)} packed tensors such as {packed[0].name} ({packed[0].dtype})")
    return f"The source was quantized before: {', '.join(found)}." if found else ""


def _base(card: Mapping[str, Any]) -> str:
    base = card.get("base_model")
    names = [str(name) for name in base] if isinstance(base, list) else [str(base)] if base else []
    return f" (of {', '.join(names)})" if names else ""


def _is_narrow_weight(tensor: TensorEntry) -> bool:
    """Whether a matrix of weights has numbers of eight bits or less; counters and masks are vectors."""
    narrow = tensor.dtype.startswith(("F8", "F6", "F4")) or tensor.dtype in ("I8", "U8")
    return narrow and len(tensor.shape) > 1 and tensor.name.endswith(".weight")
