"""Reads the header of a GGUF file: metadata and the list of tensors, never the weights.

A file is foreign until it is checked, so nothing in it is believed: each count and length is held against the bytes
that are there before memory is asked for. The library's own reader loops over an array of ten thousand million
elements as told.
"""

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from modelmint.errors import ToolError
from modelmint.formats.gguf.types import TENSOR_TYPES_BY_ID, TensorType

Scalar = int | float | bool | bytes
MetadataValue: TypeAlias = "Scalar | Sequence[MetadataValue]"

MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_ELEMENTS = 1 << 22
MAX_STRING = 1 << 26
MAX_HEADER = 1 << 29
MAX_DIMENSIONS = 4

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: as llama.cpp calls it.
        shape: lengths, the row's width first.
        type: how its numbers are stored.
        start: where they begin in the file.
        size: their bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    size: int

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.shape[0]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Header:
    """What a file says before its weights.

    Attributes:
        metadata: values by key; strings are bytes, because tokens need not be valid text.
        tensors: in the file's order.
        data_start: where the weights begin.
        size: bytes of the file.
    """

    metadata: dict[str, MetadataValue]
    tensors: tuple[StoredTensor, ...]
    data_start: int
    size: int

    def text(self, key: str) -> str:
        """The text of a key; empty where it is missing or holds no text."""
        value = self.metadata.get(key)
        return value.decode(errors="replace") if isinstance(value, bytes) else ""

    def number(self, key: str) -> float | None:
        """The number of a key; None where it is missing or holds no number."""
        value = self.metadata.get(key)
        return value if isinstance(value, int | float) else None

    def array(self, key: str) -> list[Scalar]:
        """The elements of a key; empty where it is missing or holds no array."""
        value = self.metadata.get(key)
        return [item for item in value if isinstance(item, Scalar)] if isinstance(value, list) else []

    @property
    def architecture(self) -> str:
        """The name of llama.cpp's implementation, such as ``llama``."""
        return self.text("general.architecture")

    def tensor(self, name: str) -> StoredTensor | None:
        """The tensor of that name, if there is one."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_header(path: Path) -> Header:
    """Read a file's header.

    Raises:
        ToolError: if it is no sound GGUF file; the message says what and where.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 24:
            raise ToolError(f"{path.name} is no GGUF file: it has {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path.name, content, size).header()


class _Reader:
    """Walks over the bytes of a header; `at` is where it stands."""

    def __init__(self, name: str, content: mmap.mmap, size: int) -> None:
        self._name, self._content, self._size = name, content, size
        self._end = min(size, MAX_HEADER)
        self._at = 0

    def header(self) -> Header:
        if self._content[:4] != b"GGUF":
            raise self._damaged(f"it begins with {self._content[:4]!r}, not with GGUF")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise self._damaged(f"its version is {version}, and 2 and 3 are known")
        tensors = self._count("tensors", MAX_TENSORS)
        keys = self._count("keys", MAX_KEYS)
        metadata: dict[str, MetadataValue] = {}
        for _ in range(keys):
            key = self._string().decode(errors="replace")
            if key in metadata:
                raise self._damaged(f"the key {key} stands there twice")
            metadata[key] = self._value(key)
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment > 1 << 16 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, not a power of two from 8 to 65536")
        data_start = -(-self._at // alignment) * alignment
        stored = tuple(self._placed(info, data_start, alignment) for info in infos)
        names = {tensor.name for tensor in stored}
        if len(names) != len(stored):
            raise self._damaged("two tensors have the same name")
        return Header(metadata, stored, data_start, self._size)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string().decode(errors="replace")
        dimensions = self._scalar("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions, and 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(int(self._scalar("<Q")) for _ in range(int(dimensions)))
        return name, shape, int(self._scalar("<I")), int(self._scalar("<Q"))

    def _placed(self, info: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int) -> StoredTensor:
        name, shape, type_id, offset = info
        kind = TENSOR_TYPES_BY_ID.get(type_id)
        if kind is None:
            raise self._damaged(f"tensor {name} is of type {type_id}, which is not known")
        if any(length == 0 for length in shape) or shape[0] % kind.block:
            raise self._damaged(f"tensor {name} has the shape {shape}, which {kind.name} cannot store")
        elements = 1
        for length in shape:
            elements *= length
        bytes_ = kind.bytes_of(shape[0], elements)
        start = data_start + offset
        if offset % alignment or start + bytes_ > self._size:
            raise self._damaged(
                f"tensor {name} lies at bytes {start} to {start + bytes_}, and the file has {self._size}: it is cut"
            )
        return StoredTensor(name, shape, kind, start, bytes_)

    def _value(self, key: str) -> MetadataValue:
        return self._typed(key, int(self._scalar("<I")), 0)

    def _typed(self, key: str, kind: int, depth: int) -> MetadataValue:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < 2:
            return self._array(key, depth)
        raise self._damaged(f"the key {key} has a value of type {kind}, which is not known")

    def _array(self, key: str, depth: int) -> MetadataValue:
        kind = int(self._scalar("<I"))
        count = self._count(f"elements of {key}", MAX_ELEMENTS)
        if kind not in _SCALARS:
            if kind == _STRING:
                return [self._string() for _ in range(count)]
            return [self._typed(key, kind, depth + 1) for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind][1]}"
        self._need(struct.calcsize(layout), key)
        values = list(struct.unpack_from(layout, self._content, self._at))
        self._at += struct.calcsize(layout)
        return values

    def _count(self, what: str, most: int) -> int:
        count = int(self._scalar("<Q"))
        if count > most or count > self._end - self._at:
            raise self._damaged(f"it claims {count} {what}, more than the file can hold or {most}")
        return count

    def _string(self) -> bytes:
        length = int(self._scalar("<Q"))
        if length > MAX_STRING:
            raise self._damaged(f"it claims a text of {length} bytes at byte {self._at}, more than {MAX_STRING}")
        self._need(length, "a text")
        value = self._content[self._at : self._at + length]
        self._at += length
        return value

    def _scalar(self, layout: str) -> int | float | bool:
        size = struct.calcsize(layout)
        self._need(size, "a number")
        (value,) = struct.unpack_from(layout, self._content, self._at)
        self._at += size
        return value  # type: ignore[no-any-return] # int, float or bool, by the layout

    def _need(self, size: int, what: str) -> None:
        if size > self._end - self._at:
            raise self._damaged(f"{what} of {size} bytes at byte {self._at} goes beyond the end at {self._end}")

    def _damaged(self, reason: str) -> ToolError:
        return ToolError(f"{self._name} is no sound GGUF file: {reason}")
