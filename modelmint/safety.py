"""Decides by their contents which foreign files may be opened: each must be what its name says, and never a pickle."""

import io
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from modelmint.errors import SourceError, UnsafeSourceError
from modelmint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES

MAX_JSON_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 128 << 20
"""Tokenizers of a quarter of a million tokens take about 35 MB."""
MAX_TEXT_BYTES = 16 << 20
_HEAD_BYTES = 1024
_ARCHIVE_BYTES = 64 << 20
"""Of larger archives the directory is not read: it could be as large as they are."""

_SIGNATURES = (
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90\0", "a program"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
)
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# What a pickle needs to do anything but build plain values.
_ACTS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4"}
_WAY_OUT = "it was not opened; use a checkpoint whose files are what their names say"


def refuse_oversized(path: str, size: int) -> None:
    """Refuse a small file that is declared to be large, before a byte of it is read.

    Raises:
        UnsafeSourceError: if its kind never is that large.
    """
    if path.endswith(".safetensors"):
        return
    tokenizer = path in ("tokenizer.json", "tekken.json") or path.endswith((".model", ".tiktoken"))
    limit = MAX_TOKENIZER_BYTES if tokenizer else MAX_JSON_BYTES if path.endswith(".json") else MAX_TEXT_BYTES
    if size > limit:
        raise UnsafeSourceError(f"{path} has {size} bytes, and at most {limit} are accepted for its kind; {_WAY_OUT}")


def check_file(folder: Path, path: str) -> None:
    """Refuse a file of a checkpoint that is not what its name says.

    Args:
        folder: of the checkpoint.
        path: inside it.

    Raises:
        UnsafeSourceError: for pickles, archives, programs and the like under any name, and for absurd sizes.
        SourceError: for JSON that cannot be read.
    """
    file = folder / path
    refuse_oversized(path, file.stat().st_size)
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if path.endswith(".safetensors"):
        if _begins_like_safetensors(head):
            return
        found = foreign_kind(file, head) or "no safetensors file"
        raise UnsafeSourceError(f"{path} is {found}; {_WAY_OUT}")
    found = foreign_kind(file, head)
    if not found and not path.endswith((".json", ".model")) and b"\0" in head:
        found = "no text"
    if found:
        raise UnsafeSourceError(f"{path} is {found}; {_WAY_OUT}")
    if path.endswith(".json"):
        read_json(file, path)


def foreign_kind(file: Path, head: bytes) -> str:
    """What a file is if it is something that has no place in a checkpoint; empty if it is not recognized as such."""
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[:4] in _ZIPS or (file.stat().st_size <= _ARCHIVE_BYTES and zipfile.is_zipfile(file)):
        return _archive(file)
    if head[257:262] == b"ustar":
        return "a tar archive"
    return "a pickle, which can run code when it is opened" if _is_pickle(file, head) else ""


def read_json(file: Path, path: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SourceError: if it is no JSON or no object.
        UnsafeSourceError: if it is nested beyond reason.
    """
    try:
        value = json.loads(file.read_bytes())
    except RecursionError as error:
        raise UnsafeSourceError(f"{path} is nested beyond reason; {_WAY_OUT}") from error
    except ValueError as error:
        raise SourceError(f"{path} is no JSON ({error}); fetch the checkpoint anew or use another one") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds no JSON object; fetch the checkpoint anew or use another one")
    return value


def _begins_like_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return len(head) > LENGTH_BYTES and length <= MAX_HEADER_BYTES and head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"


def _archive(file: Path) -> str:
    """A ZIP archive in words, with what its directory declares; nothing is unpacked."""
    if file.stat().st_size > _ARCHIVE_BYTES:
        return "a ZIP archive"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, EOFError):
        return "a damaged ZIP archive"
    declared = sum(entry.file_size for entry in entries)
    pickled = any(entry.filename.endswith(".pkl") for entry in entries)
    kind = "a PyTorch archive with a pickle in it" if pickled else "a ZIP archive"
    return f"{kind} of {file.stat().st_size} bytes that declares {declared} bytes"


def _is_pickle(file: Path, head: bytes) -> bool:
    """Whether the contents are a pickle: by its first bytes, or, of the oldest protocol, by reading its opcodes."""
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return len(head) > 1
    if not head or file.stat().st_size > MAX_TEXT_BYTES:
        return False
    content = file.read_bytes()
    opcodes, last = [], 0
    try:
        # Only names the opcodes; nothing is built or called.
        for opcode, _, position in pickletools.genops(io.BytesIO(content)):
            opcodes.append(opcode.name)
            last = position or 0
    except (ValueError, OverflowError, IndexError, UnicodeError):
        return False
    # A text can begin with a letter and a full stop that happen to be opcodes; it is not one to its very end.
    return not _ACTS.isdisjoint(opcodes) or (len(opcodes) > 2 and last == len(content) - 1)
