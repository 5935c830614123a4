"""The format GGUF behind the protocol `Format`: options, checks, names; the work is in the modules beside."""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from modelmint.artifact import Tool
from modelmint.errors import RecipeError
from modelmint.formats import QuantizationType, Session, TensorShape
from modelmint.formats.gguf import converter
from modelmint.formats.gguf.types import ALIASES, COPY, FILE_TYPES, INTEGER_TYPES, TENSOR_TYPES
from modelmint.recipe import Variant
from modelmint.report import Value
from modelmint.sandbox import Sandbox
from modelmint.spelling import did_you_mean
from modelmint.step import Work

NAME = "gguf"
TITLE = "GGUF"
STAGE_VERSION = 1
NATIVE = True

CONVERTER_PACKAGES = ("transformers", "tokenizers", "torch", "numpy", "sentencepiece", "safetensors", "protobuf")
"""Packages that the converter reads checkpoints and tokenizers with."""


class BaseOptions(Value):
    """Options of the unquantized base.

    Attributes:
        type: how its weights are stored.
        name: the model's name in the file's metadata (``general.name``); empty for the source's. It is more than a
            label: by ``phi-3`` or ``phi3`` in it llama.cpp knows that spaces after special tokens are dropped.
    """

    type: Literal["f16", "bf16", "f32"] = "f16"
    name: str = Field(default="", max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")


class VariantOptions(Value):
    """Options of a variant, called as llama-quantize calls them.

    Attributes:
        pure: store every tensor in the one type, without the usual mixture.
        leave_output_tensor: leave output.weight as it is in the base.
        output_tensor_type: the type of output.weight, such as ``q8_0``; empty for the mixture's.
        token_embedding_type: the type of the token embedding; empty for the mixture's.
        tensor_types: ``pattern=type`` for tensors in whose name the regular expression is found, such as
            ``attn_v=q8_0``; the first that matches wins. A mapping from pattern to type is taken too.
    """

    pure: bool = False
    leave_output_tensor: bool = False
    output_tensor_type: str = ""
    token_embedding_type: str = ""
    tensor_types: tuple[str, ...] = ()

    @field_validator("output_tensor_type", "token_embedding_type")
    @classmethod
    def _known_type(cls, name: str) -> str:
        return _tensor_type(name) if name else name

    @field_validator("tensor_types", mode="before")
    @classmethod
    def _from_mapping(cls, given: object) -> object:
        return [f"{pattern}={name}" for pattern, name in given.items()] if isinstance(given, Mapping) else given

    @field_validator("tensor_types")
    @classmethod
    def _known_overrides(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_override(text) for text in overrides)


def _override(text: str) -> str:
    """``pattern=type`` as llama-quantize takes it: the pattern in lower case, the type in llama.cpp's spelling."""
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals):
        raise ValueError(f"not a tensor and a type: {text!r}; write pattern=type, such as attn_v=q8_0")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {pattern!r} ({error})") from None
    return f"{pattern.lower()}={_tensor_type(name)}"


def _tensor_type(name: str) -> str:
    usable = {known.casefold(): known for known in TENSOR_TYPES if known not in INTEGER_TYPES and known != "f64"}
    if name.casefold() not in usable:
        raise ValueError(f"unknown tensor type {name!r}{did_you_mean(name, usable.values())}")
    kind = TENSOR_TYPES[usable[name.casefold()]]
    if kind.needs_imatrix:
        raise ValueError(f"tensor type {kind.name} needs an importance matrix, which cannot be given yet")
    return kind.name


@cache
def types() -> Mapping[str, QuantizationType]:
    """Every quantization type that llama-quantize offers, by its name there."""
    return {
        kind.name: QuantizationType(kind.name, kind.bits, kind.summary, needs_calibration=kind.needs_imatrix)
        for kind in FILE_TYPES.values()
    }


def tools(stage: str = "convert") -> tuple[Tool, ...]:
    """llama.cpp by its source distribution and compile flags; to convert, the packages that read checkpoints too.

    Raises:
        UnsupportedError: if llama.cpp or its converter is not installed, or not as recorded.
    """
    source = converter.source()
    library = Tool(name=source.package, version=source.version, source=source.digest, flags=source.flags)
    if stage != "convert":
        return (library,)
    return (library, *(Tool(name=name, version=importlib.metadata.version(name)) for name in CONVERTER_PACKAGES))


def check(variant: Variant) -> None:
    """Refuse an unknown type, an unknown option, one without effect, and what needs an importance matrix.

    Raises:
        RecipeError: says which and, for a name, what was meant.
    """
    if variant.type in ALIASES:
        raise RecipeError(f"{variant.name}: {variant.type} is another name of {ALIASES[variant.type]}; write that")
    if variant.type not in FILE_TYPES:
        raise RecipeError(f"{variant.name}: unknown type {variant.type!r}{did_you_mean(variant.type, FILE_TYPES)}")
    kind = FILE_TYPES[variant.type]
    if kind.needs_imatrix:
        others = ", ".join(other.name for other in FILE_TYPES.values() if not other.needs_imatrix and other.bits < 4)
        raise RecipeError(
            f"{variant.name}: {kind.name} cannot be made without an importance matrix, which cannot be given yet; "
            f"small types that need none: {others}"
        )
    options = _options(variant)
    given = sorted(name for name, value in options.model_dump().items() if value)
    if given and (kind.name == COPY or not TENSOR_TYPES[kind.tensors].quantized):
        raise RecipeError(f"{variant.name}: {', '.join(given)} has no effect on {kind.name}, which quantizes nothing")
    if options.pure and kind.name == "MXFP4_MOE":
        raise RecipeError(f"{variant.name}: pure would store MXFP4_MOE's 8-bit tensors in 4 bits; leave it out")


def _options(variant: Variant) -> VariantOptions:
    try:
        return VariantOptions.model_validate(variant.options)
    except ValidationError as error:
        mistake = error.errors()[0]
        option = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            reason = f"unknown option {option!r}{did_you_mean(option, VariantOptions.model_fields)}"
        else:
            reason = f"option {option}: {mistake['msg'].removeprefix('Value error, ')}"
        raise RecipeError(f"{variant.name}: {reason}") from None


def base_type(options: Mapping[str, Any]) -> str:
    """The type of the unquantized base that these base options ask for."""
    return BaseOptions.model_validate(dict(options)).type


def parameters(variant: Variant) -> dict[str, Any]:
    """The options of a variant in full.

    Raises:
        RecipeError: for an unknown option or value.
    """
    return _options(variant).model_dump(mode="json")


def refuse_unsupported(snapshot: Path) -> None:
    """Refuse an architecture or a pre-tokenizer that the converter does not know; see `support`."""
    from modelmint.formats.gguf import support

    support.refuse_unsupported(snapshot)


def predict_size(tensors: Sequence[TensorShape], variant: Variant) -> int:
    """Predicted bytes of a variant's file; see `predict`."""
    from modelmint.formats.gguf import predict

    return predict.size_of_variant(tensors, variant.type, parameters(variant))


def convert(source: Path, out: Path, options: Mapping[str, Any], sandbox: Sandbox) -> Work:
    """Write the unquantized base; see `convert.convert`."""
    from modelmint.formats.gguf import convert as stage

    base = BaseOptions.model_validate(dict(options))
    return stage.convert(source, out, base.type, base.name, sandbox)


def quantize(base: Path, out: Path, variant: Variant, sandbox: Sandbox) -> Work:
    """Write a variant of the base; see `quantize.quantize`."""
    from modelmint.formats.gguf import quantize as stage

    check(variant)
    return stage.quantize(base, out, variant.type, parameters(variant), sandbox)


def open_session(folder: Path, threads: int, context: int) -> Session:
    """Load a base or variant for measuring; see `session`."""
    from modelmint.formats.gguf.session import GgufSession

    return GgufSession(folder, threads, context)


def file_name(model: str, type_name: str, label: str, path: str) -> str:
    """``<Model>-<TYPE>[-<label>].gguf``, as llama.cpp's users name files; a base's type is written in capitals too."""
    suffix = Path(path).suffix or ".gguf"
    return f"{model}-{type_name.upper()}" + (f"-{label}" if label else "") + suffix
