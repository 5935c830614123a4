"""Reads the header of a safetensors file, and refuses one that lies.

The library of that name refuses most of this too, but it accepts a tensor named twice, and it must open the whole file;
here a header is judged alone, so that a checkpoint can be refused before its weights are fetched.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelmint.errors import UnsafeSourceError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 25_000_000
"""As the Hub's own client has it; a checkpoint of a hundred thousand tensors needs half of it."""

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one number by dtype."""

_WAY_OUT = "the file is damaged or made to deceive: fetch it anew, or use another checkpoint"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` are positions in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file declares: its tensors in the order of their data, and where the data begins."""

    tensors: tuple[TensorEntry, ...]
    data_start: int


def read_header(name: str, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Read and judge the header of a file.

    Args:
        name: of the file, for messages.
        size: of the whole file, in bytes.
        read: gives `length` bytes from `start`, called as ``read(start, length)``.

    Raises:
        UnsafeSourceError: if the header's length, its text, a name, dtype, shape or offset is not what it must be, or
            the data has holes, overlaps, or ends elsewhere than the file.
    """
    length = header_length(name, size, read(0, LENGTH_BYTES))
    text = read(LENGTH_BYTES, length)
    if len(text) != length:
        raise UnsafeSourceError(f"{name} is cut off in its header, after {len(text)} of {length} bytes; {_WAY_OUT}")
    return _judged(name, size, LENGTH_BYTES + length, _parsed(name, text))


def header_length(name: str, size: int, first: bytes) -> int:
    """The length of the header that the first eight bytes of a file declare.

    Raises:
        UnsafeSourceError: if the file is shorter than that, or the length is beyond what is accepted.
    """
    if len(first) < LENGTH_BYTES:
        raise UnsafeSourceError(f"{name} has {size} bytes, too few for a safetensors file; {_WAY_OUT}")
    length = int(struct.unpack("<Q", first)[0])
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > size:
        raise UnsafeSourceError(
            f"{name} declares a header of {length} bytes, but has {size} bytes in all and at most {MAX_HEADER_BYTES} "
            f"are accepted; {_WAY_OUT}"
        )
    return length


def _parsed(name: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for position, key in enumerate(keys) if key in keys[:position])
            raise UnsafeSourceError(f"{name} has {twice!r} twice in its header; {_WAY_OUT}")
        return fields

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UnsafeSourceError(f"{name} has a header that is no JSON ({error}); {_WAY_OUT}") from error
    if not isinstance(header, dict):
        raise UnsafeSourceError(f"{name} has a header that is no JSON object; {_WAY_OUT}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeSourceError(f"{name} has __metadata__ other than texts; {_WAY_OUT}")
    return header


def _judged(name: str, size: int, data_start: int, header: dict[str, Any]) -> Header:
    tensors = sorted(
        (_tensor(name, data_start, tensor, fields) for tensor, fields in header.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise UnsafeSourceError(
                f"{name}: the data of {tensor.name} {what} (it begins at byte {tensor.start}, not {position}); "
                f"{_WAY_OUT}"
            )
        position = tensor.end
    if position != size:
        raise UnsafeSourceError(
            f"{name} has {size} bytes, but its header accounts for {position}: it is "
            f"{'cut off' if size < position else 'followed by something else'}; {_WAY_OUT}"
        )
    return Header(tuple(tensors), data_start)


def _tensor(name: str, data_start: int, tensor: str, fields: Any) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise UnsafeSourceError(f"{name}: {tensor} has other fields than dtype, shape and data_offsets; {_WAY_OUT}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UnsafeSourceError(f"{name}: {tensor} has the dtype {dtype!r}, which does not exist; {_WAY_OUT}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise UnsafeSourceError(f"{name}: {tensor} has shape {shape} and data_offsets {offsets}; {_WAY_OUT}")
    bits = BITS[dtype]
    for dimension in shape:
        bits *= dimension
    if bits != 8 * (offsets[1] - offsets[0]):
        raise UnsafeSourceError(
            f"{name}: {tensor} has {offsets[1] - offsets[0]} bytes of data, but {dtype} of shape {shape} "
            f"takes {bits // 8}; {_WAY_OUT}"
        )
    return TensorEntry(tensor, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
