"""A made-up format for dry runs, for tests, and as the example of what a format is.

A variant keeps the table of `fake_model` in fewer bits, so that its divergence really grows as its size shrinks, and Q2
fails the default gates. Nothing here is native: a session runs in the caller's process, and a step takes milliseconds.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from modelmint.artifact import Tool
from modelmint.errors import RecipeError, ToolError, UnsupportedError
from modelmint.formats import QuantizationType, TensorShape
from modelmint.formats.fake_model import CONFIG, TOKENIZER, WEIGHTS, FakeSession, pack
from modelmint.recipe import Variant
from modelmint.report import Measurement, Value
from modelmint.spelling import did_you_mean
from modelmint.step import Work

if TYPE_CHECKING:
    from modelmint.sandbox import Sandbox

NAME = "fake"
TITLE = "Fake"
STAGE_VERSION = 1
NATIVE = False

_TYPES = {
    "F32": QuantizationType("F32", 32, "the unquantized base"),
    "Q8": QuantizationType("Q8", 8, "8 bits: nearly lossless"),
    "Q4": QuantizationType("Q4", 4, "4 bits: passes the default gates"),
    "Q3": QuantizationType("Q3", 3, "3 bits"),
    "Q2": QuantizationType("Q2", 2, "2 bits: fails the default gates"),
}


class VariantOptions(Value):
    """Options of a variant.

    Attributes:
        group: how many weights share a scale.
        fail: the stage that shall fail, to see that other variants do not: ``crash`` is a crash in native code.
    """

    group: int = Field(default=32, ge=4, le=1024)
    fail: Literal["", "quantize", "crash", "evaluate"] = ""


class BaseOptions(Value):
    """Options of the base.

    Attributes:
        fail: whether the conversion shall fail.
    """

    fail: bool = False


def types() -> Mapping[str, QuantizationType]:
    """Every quantization type by its name."""
    return _TYPES


def tools(stage: str = "convert") -> tuple[Tool, ...]:
    """The arithmetic and the file format: all that can change a byte besides this module."""
    return tuple(Tool(name=name, version=version(name)) for name in ("numpy", "safetensors"))


def check(variant: Variant) -> None:
    """Refuse an unknown type or option, and an option's value that cannot be."""
    if variant.type not in _TYPES:
        raise RecipeError(f"{variant.name}: unknown type {variant.type!r}{did_you_mean(variant.type, _TYPES)}")
    _options(variant)


def base_type(options: Mapping[str, Any]) -> str:
    """There is one."""
    return "F32"


def parameters(variant: Variant) -> dict[str, Any]:
    """The options in full."""
    return _options(variant).model_dump(mode="json")


def refuse_unsupported(snapshot: Path) -> None:
    """Refuse a checkpoint that is not one of ours."""
    kind = json.loads((snapshot / CONFIG).read_text()).get("model_type")
    if kind != "fake":
        raise UnsupportedError(f"the fake format takes fake checkpoints, not {kind!r}; name a source such as fake:tiny")


def predict_size(tensors: Sequence[TensorShape], variant: Variant) -> int:
    """Codes and scales; what the header and the configuration take is left out."""
    elements = sum(tensor.elements for tensor in tensors)
    bits = _TYPES[variant.type].bits
    scales = 0 if bits == 32 else 2 * -(-elements // _options(variant).group)
    return int(elements * bits / 8) + scales


def convert(source: Path, out: Path, options: Mapping[str, Any], sandbox: "Sandbox") -> Work:
    """Take what a session needs."""
    if BaseOptions.model_validate(dict(options)).fail:
        raise ToolError("the conversion failed, as the option fail=true asks")
    for name in (WEIGHTS, CONFIG, TOKENIZER):
        shutil.copyfile(source / name, out / name)
    return Work()


def quantize(base: Path, out: Path, variant: Variant, sandbox: "Sandbox") -> Work:
    """Round the weights to the type's bits."""
    from safetensors.numpy import load_file, save_file

    options = _options(variant)
    if options.fail == "quantize":
        raise ToolError("the quantization failed, as the option fail=quantize asks")
    if options.fail == "crash":
        sandbox.call("modelmint.formats.fake:crash", {})
    table, bits = load_file(base / WEIGHTS)["table"], int(_TYPES[variant.type].bits)
    tensors = {"table": table} if bits == 32 else pack(table, bits, options.group)
    save_file(tensors, out / WEIGHTS)
    config = json.loads((base / CONFIG).read_text())
    config |= {"bits": bits, "group": options.group, "fail": options.fail}
    (out / CONFIG).write_text(json.dumps(config, indent=1))
    shutil.copyfile(base / TOKENIZER, out / TOKENIZER)
    effective = 8 * sum(tensor.nbytes for tensor in tensors.values()) / table.size
    return Work(
        measurements=(
            Measurement(measure="bits_per_weight", value=effective),
            Measurement(measure="fallback_tensors", value=0),
        )
    )


def open_session(folder: Path, threads: int, context: int) -> FakeSession:
    """Load a variant or base."""
    return FakeSession(folder)


def file_name(model: str, type_name: str, label: str, path: str) -> str:
    """Such as ``tiny-Q4-config.json``."""
    return "-".join(part for part in (model, type_name, label, path) if part)


def crash() -> None:
    """End this process as a native library does that finds a fault in itself."""
    os.abort()


def _options(variant: Variant) -> VariantOptions:
    try:
        return VariantOptions.model_validate(dict(variant.options))
    except ValidationError as error:
        mistake = error.errors()[0]
        option = ".".join(map(str, mistake["loc"]))
        meant = did_you_mean(option, VariantOptions.model_fields) if mistake["type"] == "extra_forbidden" else ""
        raise RecipeError(f"{variant.name}: option {option}: {mistake['msg']}{meant}") from None
