"""Looks for weights that are not finite: they load everywhere, survive conversion, and end as senseless logits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelmint.errors import SourceError
from modelmint.isolated_child import progress
from modelmint.safetensors_header import TensorEntry

if TYPE_CHECKING:
    from numpy import unsignedinteger
    from numpy.typing import NDArray

_CHUNK_BYTES = 16 << 20
# Bits that are all set in an infinity and in no finite number, by dtype, with the unsigned type of the same width. The
# eight-bit type with four exponent bits has no infinity, and one value that is no number.
_EXPONENTS = {
    "F16": ("u2", 0x7C00),
    "BF16": ("u2", 0x7F80),
    "F32": ("u4", 0x7F800000),
    "F64": ("u8", 0x7FF0000000000000),
    "C64": ("u4", 0x7F800000),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}


def refuse_not_finite(root: Path, tensors: Mapping[str, Sequence[TensorEntry]]) -> None:
    """Read every weight once and refuse what is not finite.

    Args:
        root: the folder of the checkpoint.
        tensors: by the path of their file.

    Raises:
        SourceError: names the tensors and how many of their weights are NaN or infinite.
    """
    total = sum(tensor.end - tensor.start for entries in tensors.values() for tensor in entries)
    done, wrong = 0, []
    for path, entries in tensors.items():
        for tensor in entries:
            count = count_not_finite(root / path, tensor)
            if count:
                wrong.append(f"{tensor.name} in {path} has {count}")
            done += tensor.end - tensor.start
            progress(done, total, "bytes")
    if wrong:
        more = f"; and {len(wrong) - 5} more tensors" if len(wrong) > 5 else ""
        raise SourceError(
            f"weights are NaN or infinite: {'; '.join(wrong[:5])}{more}; "
            "such a model answers nothing: use another revision"
        )


def count_not_finite(file: Path, tensor: TensorEntry) -> int:
    """How many numbers of a tensor are NaN or infinite; 0 for integers."""
    import numpy as np

    if tensor.dtype not in _EXPONENTS:
        return 0
    kind, mask = _EXPONENTS[tensor.dtype]
    count, left = 0, tensor.end - tensor.start
    with file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        while left:
            content = stream.read(min(left, _CHUNK_BYTES))
            if not content:
                raise SourceError(f"{file.name} ends inside {tensor.name}; fetch the checkpoint anew")
            left -= len(content)
            words: NDArray[unsignedinteger] = np.frombuffer(content, dtype=np.dtype(f"<{kind}"))
            count += int(np.count_nonzero((words & words.dtype.type(mask)) == mask))
    return count
