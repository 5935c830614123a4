"""One variant: llama.cpp's own quantizer, called as llama-quantize calls it, so that the bytes are the same.

It runs in a child process that imports nothing but ctypes and the declarations: what it needs besides the library
itself counts as the quantizer's memory.
"""

import ctypes
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmint.errors import ModelMintError, ToolError, UnsupportedError
from modelmint.formats.gguf import library
from modelmint.formats.gguf.check import check_file, check_header
from modelmint.formats.gguf.header import Header, read_header
from modelmint.formats.gguf.types import COPY, FILE_TYPES, TENSOR_TYPES, FileType
from modelmint.formats.gguf.vocabulary import FILE
from modelmint.isolated_child import progress

if TYPE_CHECKING:
    from modelmint.sandbox import Sandbox
    from modelmint.step import Work

FELL_BACK = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +\d+ \(required for type +(\S+)\).*?-> falling back to +(\S+)"
)
UNFIT = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\S+)\)[^>]*"
    r"no tensor type fallback is defined"
)
STEP = re.compile(r"\[ *(\d+)/ *(\d+)\]")
KEPT_HIGH = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"))
"""Types whose output tensor llama.cpp stores as q5_K rather than q6_K."""


def quantize(base: Path, out: Path, type_name: str, options: Mapping[str, Any], sandbox: "Sandbox") -> "Work":
    """Write a variant of the base in the folder `base` into the folder `out`.

    Args:
        base: folder of the base.
        out: an empty folder.
        type_name: a name in `FILE_TYPES`.
        options: the variant's options in full.
        sandbox: limits of the child, and threads.

    Raises:
        UnsupportedError: if a tensor's rows do not fit the type asked for, and llama.cpp has no other for them.
        ResourceError: if the disk is full.
        ToolError: if the quantizer failed, or its output is not sound.
    """
    from modelmint.report import Measurement
    from modelmint.step import Work

    outcome = sandbox.call(
        f"{__name__}:run",
        {
            "base": str(base.absolute() / FILE),
            "out": str(out.absolute() / FILE),
            "type_name": type_name,
            "options": dict(options),
            "threads": sandbox.threads,
        },
    )
    result = outcome.value
    return Work(
        measurements=(
            Measurement(measure="bits_per_weight", value=result["bits_per_weight"]),
            Measurement(measure="fallback_tensors", value=result["fallback_tensors"]),
        ),
        notes=tuple(result["notes"]),
        network_isolated=outcome.network_isolated,
    )


def run(base: str, out: str, type_name: str, options: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """In the child: quantize, then check the file; the answer is what `quantize` reports."""
    source, target = Path(base), Path(out)
    header = read_header(source)
    check_header(source.name, header)
    _check_widths(header, options)
    fallbacks = _silent_fallbacks(header, FILE_TYPES[type_name], options)
    # The vocabulary as Python objects would stay in memory beside the weights.
    del header
    log = library.Log(library.INFO_LEVEL, _report)
    if call(source, target, FILE_TYPES[type_name], options, threads) != 0:
        raise failure(log, target)
    fallbacks += _logged_fallbacks(log.text)
    contents = check_file(target)
    kinds = Counter(
        f"from {before} to {after}, because rows of {width} are not whole blocks" for before, after, width in fallbacks
    )
    return {
        "bits_per_weight": contents.bits_per_weight,
        "fallback_tensors": len(fallbacks),
        "notes": [f"{count} of {contents.tensors} tensors fell back {kind}" for kind, count in kinds.most_common()],
    }


def call(
    source: Path, target: Path, kind: FileType, options: Mapping[str, Any], threads: int, *, dry_run: bool = False
) -> int:
    """Call `llama_model_quantize` in this process; 0 is success."""
    llama = library.load()
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = kind.id
    parameters.only_copy = kind.name == COPY
    parameters.dry_run = dry_run
    parameters.pure = options["pure"]
    parameters.quantize_output_tensor = not options["leave_output_tensor"]
    for option in ("output_tensor_type", "token_embedding_type"):
        if options[option]:
            setattr(parameters, option, TENSOR_TYPES[options[option]].id)
    overrides = _overrides(options["tensor_types"])
    if len(overrides) > 1:
        parameters.tt_overrides = ctypes.cast(overrides, type(parameters.tt_overrides))
    status: int = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    return status


def _overrides(tensor_types: Sequence[str]) -> Any:
    """The array that the library reads up to an entry without a pattern."""
    llama = library.load()
    array = (llama.llama_model_tensor_override * (len(tensor_types) + 1))()
    for entry, text in zip(array, tensor_types, strict=False):
        pattern, _, type_name = text.rpartition("=")
        entry.pattern, entry.type = pattern.encode(), TENSOR_TYPES[type_name].id
    return array


def _report(text: str) -> None:
    step = STEP.match(text)
    if step:
        progress(int(step[1]), int(step[2]), "tensors")


def failure(log: library.Log, target: Path) -> ModelMintError:
    """The error for a call that did not succeed.

    Raises:
        OSError: what the system says of the output file, where the library could not write it and does not say why.
    """
    if "iostream error" in log.text:
        with target.open("ab", buffering=0) as file:
            file.write(bytes(1 << 16))
    unfit = UNFIT.search(log.text)
    if unfit:
        return UnsupportedError(
            f"{unfit[4]} stores blocks of {unfit[3]}, and the rows of {unfit[1]} have {unfit[2]} numbers; llama.cpp "
            "has no other type for them: take one with blocks of 32, such as Q4_0, or of 256, which fall back"
        )
    return ToolError(f"llama.cpp's quantizer failed: {log.reason}", stderr_tail=log.text[-4096:])


def _check_widths(header: Header, options: Mapping[str, Any]) -> None:
    """Refuse a type asked for by name whose blocks do not fill a tensor's rows: the library aborts on it."""
    for option, names in (
        ("token_embedding_type", ("token_embd.weight", "per_layer_token_embd.weight")),
        ("output_tensor_type", ("output.weight",)),
    ):
        if not options[option]:
            continue
        kind = TENSOR_TYPES[options[option]]
        for tensor in filter(None, map(header.tensor, names)):
            if tensor.width % kind.block:
                raise UnsupportedError(
                    f"{option}: {kind.name} stores blocks of {kind.block}, and the rows of {tensor.name} have "
                    f"{tensor.width} numbers; take a type with blocks of 32, such as q8_0 or q5_0"
                )


def _logged_fallbacks(text: str) -> list[tuple[str, str, int]]:
    """From, to and row width of each tensor for which the library says so."""
    return [(before, after, int(width)) for _, width, before, after in FELL_BACK.findall(text)]


def _silent_fallbacks(header: Header, kind: FileType, options: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The one fallback that the library does not mention: the output tensor becomes q8_0 where its rows do not fit."""
    output = header.tensor("output.weight")
    tied = output is None
    tensor = output or header.tensor("token_embd.weight")
    default = TENSOR_TYPES[kind.tensors]
    if (
        tensor is None
        or not default.quantized
        or tensor.width % default.block == 0
        or kind.name in ("MXFP4_MOE", "Q8_0")
        or header.architecture == "falcon"
        or options["pure"]
        or options["output_tensor_type"]
        or (options["leave_output_tensor"] and not tied)
        or (options["token_embedding_type"] and tied)
        or any(re.search(text.rpartition("=")[0], tensor.name) for text in options["tensor_types"])
    ):
        return []
    return [("q5_K" if kind.name in KEPT_HIGH else "q6_K", "q8_0", tensor.width)]
