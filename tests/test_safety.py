"""Foreign bytes: what lies, or is not what its name says, is refused before anything opens it."""

import io
import json
import os
import pickle
import struct
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import entry, raw_safetensors, safetensors_of, weights, write_checkpoint

from modelmint.acquire import resolve
from modelmint.errors import SourceError, UnsafeSourceError
from modelmint.examine import examine
from modelmint.inspect import inspect_source
from modelmint.recipe import ModelRef
from modelmint.safetensors_header import BITS, MAX_HEADER_BYTES, read_header
from modelmint.safety import refuse_oversized
from modelmint.settings import Settings

pytestmark = pytest.mark.pure
WEIGHTS = "model.safetensors"


def header_of(content: bytes) -> Any:
    return read_header(WEIGHTS, len(content), lambda start, length: content[start : start + length])


def one(**changes: Any) -> str:
    return json.dumps({"a": {**entry("F32", (2, 3), 0), **changes}})


def test_a_sound_header_gives_the_tensors_in_the_order_of_their_data() -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "b": entry("F32", (2,), 4), "a": entry("F16", (2,), 0)})
    found = header_of(raw_safetensors(header, b"x" * 12))
    assert [(t.name, t.dtype, t.shape, t.end - t.start) for t in found.tensors] == [
        ("a", "F16", (2,), 4),
        ("b", "F32", (2,), 8),
    ]


def test_what_the_library_writes_is_read() -> None:
    from safetensors.numpy import save

    found = header_of(save(weights()))
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {n: a.shape for n, a in weights().items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, too few"),
        (b"\x01\x02", "has 2 bytes, too few"),
        (struct.pack("<Q", 2**63) + b"{}", "declares a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 100) + b"{}", "declares a header of 100 bytes, but has 10 bytes"),
        (raw_safetensors(one(), b"x" * 23), "its header accounts for .* it is cut off"),
        (raw_safetensors(one(), b"x" * 25), "followed by something else"),
        (raw_safetensors(one() + " ", b""), "it is cut off"),
        (raw_safetensors("[]", b""), "a header that is no JSON object"),
        (raw_safetensors("{", b""), "a header that is no JSON"),
        (raw_safetensors("[" * 100_000, b""), "a header that is no JSON"),
        (raw_safetensors('{"a": ' + "9" * 5000 + "}", b""), "a header that is no JSON"),
        (raw_safetensors(one(dtype="F999"), b"x" * 24), "the dtype 'F999', which does not exist"),
        (raw_safetensors(one(dtype=["F32"]), b"x" * 24), "has the dtype"),
        (raw_safetensors(one(shape=[2, -3]), b"x" * 24), "has shape"),
        (raw_safetensors(one(shape=[2, True]), b"x" * 24), "has shape"),
        (raw_safetensors(one(shape=[2**63, 2]), b"x" * 24), "has shape"),
        (raw_safetensors(one(shape=[2**62, 2**62]), b"x" * 24), "has 24 bytes of data, but F32 of shape"),
        (raw_safetensors(one(shape=6), b"x" * 24), "has shape 6"),
        (raw_safetensors(one(data_offsets=[0, 2**62]), b"x" * 24), "has 4611686018427387904 bytes of data"),
        (raw_safetensors(one(data_offsets=[24, 0]), b"x" * 24), "has -24 bytes of data"),
        (raw_safetensors(one(data_offsets=[0]), b"x" * 24), "has shape"),
        (raw_safetensors(one(extra=1), b"x" * 24), "has other fields than dtype, shape and data_offsets"),
        (raw_safetensors('{"a": 1}', b""), "has other fields"),
        (raw_safetensors('{"__metadata__": {"a": 1}}', b""), "has __metadata__ other than texts"),
        (
            raw_safetensors(json.dumps({"a": entry("I8", (4,), 0), "b": entry("I8", (4,), 2)}), b"x" * 6),
            "the data of b overlaps the tensor before it",
        ),
        (
            raw_safetensors(json.dumps({"a": entry("I8", (4,), 0), "b": entry("I8", (4,), 6)}), b"x" * 10),
            "the data of b leaves a hole before it",
        ),
        (raw_safetensors(json.dumps({"a": entry("I8", (4,), 2)}), b"x" * 6), "leaves a hole before it"),
        (
            raw_safetensors('{"a": %s, "a": %s}' % ((json.dumps(entry("I8", (4,), 0)),) * 2), b"x" * 4),
            "has 'a' twice in its header",
        ),
        (
            raw_safetensors('{"a": {"dtype": "I8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', b"x" * 4),
            "has 'dtype' twice in its header",
        ),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UnsafeSourceError, match=rf"model\.safetensors.*{message}"):
        header_of(content)


@given(st.binary(max_size=200), st.integers(0, 60))
def test_no_bytes_make_the_reader_fail_otherwise(noise: bytes, position: int) -> None:
    sound = raw_safetensors(one(), b"x" * 24)
    content = sound[:position] + noise + sound[position + len(noise) :]
    try:
        header_of(content)
    except UnsafeSourceError:
        return
    # Whatever was accepted, the library accepts too.
    from safetensors import deserialize

    deserialize(content)


def test_every_dtype_of_the_library_is_known() -> None:
    from safetensors import SafetensorError, deserialize

    for dtype, bits in BITS.items():
        content = raw_safetensors(json.dumps({"a": entry(dtype, (8,), 0, bits)}), b"x" * bits)
        try:
            deserialize(content)
        except SafetensorError as error:  # the message would name the dtypes that it knows
            pytest.fail(f"{dtype}: {error}")


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
        stream.truncate(MAX_HEADER_BYTES * 4)
    with pytest.raises(UnsafeSourceError, match="declares a header of 25000001 bytes"):
        inspect_source(ModelRef.parse(f"file:{folder}"), Settings())


# Contents under another name -----------------------------------------------------------------------------------------


class _Evil:
    """What a pickle would run if anybody opened it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/should-not-be-there",)


def zip_with(name: str, content: bytes, declared: int | None = None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    packed = stream.getvalue()
    if declared is not None:
        size = struct.pack("<I", len(content))
        packed = packed.replace(size, struct.pack("<I", declared))
    return packed


def tar_with(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


EVIL = {
    **{f"protocol {n}": (pickle.dumps(_Evil(), n), "is a pickle, which can run code") for n in range(6)},
    "plain values of protocol 0": (pickle.dumps({"a": [1, 2]}, 0), "is a pickle"),
    "plain values of protocol 4": (pickle.dumps({"a": [1, 2]}, 4), "is a pickle"),
    "PyTorch archive": (zip_with("archive/data.pkl", pickle.dumps(_Evil())), "a PyTorch archive with a pickle in it"),
    "archive behind a text": (b"# A text\n" + zip_with("x", b"x"), "is a ZIP archive of"),
    "archive that swells": (zip_with("data.pkl", b"\0" * 100_000, 2**31), "that declares 2147483648 bytes"),
    "tar archive": (tar_with("pickle", b"x" * 600), "is a tar archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\xff" * 100, "is a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "is an HDF5 file"),
    "NumPy": (b"\x93NUMPY\x01\0" + b"\0" * 100, "is a NumPy file"),
    "program": (b"\x7fELF" + b"\0" * 100, "is a program"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 100, "is a gzip archive"),
}


@pytest.mark.parametrize(
    "path",
    [WEIGHTS, "config.json", "tokenizer.json", "README.md", "LICENSE", "tokenizer.model", "merges.txt", "x.jinja"],
)
@pytest.mark.parametrize("kind", EVIL)
def test_dangerous_contents_are_refused_under_any_name(tmp_path: Path, path: str, kind: str) -> None:
    content, message = EVIL[kind]
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / path).write_bytes(content)
    with pytest.raises(UnsafeSourceError, match=f"{path} (is|has) .*") as caught:
        examine(str(folder), scan=False)
    assert message in str(caught.value)
    assert not Path("/tmp/should-not-be-there").exists()


def test_the_same_is_found_before_the_download(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Evil()) + b"x" * 2000)
    with pytest.raises(UnsafeSourceError, match=r"model\.safetensors is a pickle, which can run code"):
        inspect_source(ModelRef.parse(f"file:{folder}"), Settings())


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "N.B. this",
        "cos\nsystem\n",
        "I. Introduction\n",
        "(see below)\n",
        "content\nmore\nthan this\n",
        "](x)",
        "PKI for models\n",
        "MZ\n",
        "BZ\n",
    ],
)
def test_a_text_that_begins_like_a_pickle_is_a_text(tmp_path: Path, text: str) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / "LICENSE").write_text(text)
    assert examine(str(folder), scan=False)["architecture"] == "LlamaForCausalLM"


def test_a_header_whose_length_begins_like_a_pickle_is_a_header(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    content = safetensors_of(weights())
    length = struct.unpack("<Q", content[:8])[0]
    padding = 0x480 - length
    assert padding > 0
    padded = struct.pack("<Q", 0x480) + content[8 : 8 + length] + b" " * padding + content[8 + length :]
    assert padded.startswith(b"\x80\x04")
    (folder / WEIGHTS).write_bytes(padded)
    assert examine(str(folder), scan=False)["parameters"] > 0


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("config.json", b"[" * 200_000, "is nested beyond reason"),
        ("config.json", b'{"a":' * 200_000, "is nested beyond reason"),
        ("config.json", b"{", "is no JSON"),
        ("config.json", b"\xff\xfe{}", "is no JSON"),
        ("config.json", b'{"vocab_size": ' + b"9" * 10_000 + b"}", "is no JSON"),
        ("generation_config.json", b"[]", "holds no JSON object"),
        ("tokenizer.json", b"{}", "tokenizer.json has no model"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": [1]}}}', "gives a token the id"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}', "gives a token the id -1"),
        ("README.md", b"text\0with nul", "is no text"),
    ],
)
def test_absurd_small_files_are_refused(tmp_path: Path, path: str, content: bytes, message: str) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / path).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        examine(str(folder), scan=False)


@pytest.mark.parametrize("path", ["config.json", "tokenizer.json", "README.md", "tokenizer.model"])
def test_a_small_file_that_is_declared_to_be_huge_is_refused_unread(tmp_path: Path, path: str) -> None:
    with pytest.raises(UnsafeSourceError, match=f"{path} has {2**40} bytes, and at most"):
        refuse_oversized(path, 2**40)
    refuse_oversized(WEIGHTS, 2**40)
    folder = write_checkpoint(tmp_path / "tiny")
    with (folder / path).open("wb") as stream:
        stream.truncate(300 << 20)
    started = time.monotonic()
    with pytest.raises(UnsafeSourceError, match=f"{path} has {300 << 20} bytes, and at most"):
        inspect_source(ModelRef.parse(f"file:{folder}"), Settings())
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["a\nb.json", "a\\b.json"])
def test_a_file_name_with_control_characters_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / name).write_text("{}")
    with pytest.raises(UnsafeSourceError, match="could be written outside of its folder; nothing was read"):
        resolve(ModelRef.parse(f"file:{folder}"), Settings())
