"""Doctored files: each is refused with its reason, at once and in little memory; native crashes stay in their child."""

import resource
import struct
import time
from pathlib import Path

import pytest
from gguf_calls import SANDBOX, base, doctored, in_child, scratch

from modelmint.errors import ToolError
from modelmint.formats.gguf import format as gguf
from modelmint.formats.gguf.check import check_file
from modelmint.formats.gguf.header import read_header
from modelmint.recipe import Variant

pytestmark = pytest.mark.tools

KEY = struct.pack("<Q", 1) + b"k"


def written(content: bytes) -> Path:
    path = scratch() / "model.gguf"
    path.write_bytes(content)
    return path


def gguf_file(keys: bytes = b"", count: int = 0, tensors: int = 0, rest: bytes = b"") -> Path:
    return written(b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + keys + rest + bytes(64))


def tensor(dimensions: int = 1, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(shape)}QIQ", dimensions, *shape, kind, offset)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (lambda: written(b""), "it has 0 bytes"),
        (lambda: written(b"PK\x03\x04" + bytes(60)), "begins with"),
        (lambda: written(b"GGUF" + struct.pack("<IQQ", 77, 0, 0)), "version is 77"),
        (lambda: gguf_file(count=2**63), "claims 9223372036854775808 keys"),
        (lambda: gguf_file(tensors=2**40), "claims 1099511627776 tensors"),
        (lambda: gguf_file(KEY + struct.pack("<IIQ", 9, 0, 10**10), 1), "claims 10000000000 elements of k"),
        (lambda: gguf_file(KEY + struct.pack("<IIQ", 9, 8, 10**10), 1), "claims 10000000000 elements of k"),
        (lambda: gguf_file(KEY + struct.pack("<IIQIQ", 9, 9, 8, 9, 10**10), 1), "elements of k"),
        (lambda: gguf_file(KEY + struct.pack("<IQ", 8, 10**11), 1), "text of 100000000000 bytes"),
        (lambda: gguf_file(KEY + struct.pack("<IQ", 8, 10**6), 1), "goes beyond the end"),
        (lambda: gguf_file(KEY + struct.pack("<I", 99), 1), "value of type 99"),
        (lambda: gguf_file((KEY + struct.pack("<IB", 0, 1)) * 2, 2), "k stands there twice"),
        (lambda: gguf_file(tensors=1, rest=tensor(dimensions=2**31)), "2147483648 dimensions"),
        (lambda: gguf_file(tensors=1, rest=tensor(kind=999)), "type 999"),
        (lambda: gguf_file(tensors=1, rest=tensor(offset=2**40)), "the file has .*: it is cut"),
        (lambda: gguf_file(tensors=1, rest=tensor(3, (2**62, 2**62, 2**62))), "it is cut"),
        (lambda: gguf_file(tensors=1, rest=tensor(shape=(0,))), "cannot store"),
        (lambda: gguf_file(tensors=2, rest=tensor(shape=(4,)) * 2), "same name"),
    ],
)
def test_absurd_headers_are_refused_at_once(path, reason):
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ToolError, match=reason):
        read_header(path())
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_every_cut_of_a_file_is_refused():
    content = (base() / "model.gguf").read_bytes()
    for length in [*range(0, 4000, 97), 50_000, len(content) // 2, len(content) - 32]:
        with pytest.raises(ToolError, match=r"no (sound )?GGUF file"):
            check_file(written(content[:length]))


@pytest.mark.parametrize(
    ("key", "layout", "value", "reason"),
    [
        ("llama.block_count", "I", 0, "block_count is 0"),
        ("llama.block_count", "I", 600, "block_count is 600"),
        ("llama.block_count", "I", 2**31, "block_count is 2147483648"),
        ("llama.block_count", "I", 1, "block_count is 1, but tensors are there for 2"),
        ("llama.attention.layer_norm_rms_epsilon", "f", float("nan"), "rms_epsilon is nan"),
        ("llama.vocab_size", "I", 639, "vocab_size says 639"),
        ("tokenizer.ggml.bos_token_id", "I", 2**31 - 1, "bos_token_id is 2147483647, outside its 640"),
        ("tokenizer.ggml.eos_token_id", "I", 999_999, "eos_token_id is 999999, outside its 640"),
    ],
)
def test_wrong_metadata_is_refused_before_the_quantizer_sees_it(key, layout, value, reason):
    with pytest.raises(ToolError, match=reason):
        gguf.quantize(doctored(base(), key, layout, value), scratch(), Variant.parse("gguf:Q8_0"), SANDBOX)


@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_K"])
def test_a_weight_that_is_no_number_is_named(type_name):
    folder = base()
    if type_name != "f16":
        gguf.quantize(
            base(), folder := scratch(), Variant.parse(f"gguf:{type_name.upper()}".replace("4_K", "4_K_M")), SANDBOX
        )
    content = bytearray((folder / "model.gguf").read_bytes())
    stored = next(t for t in read_header(folder / "model.gguf").tensors if t.name == "blk.0.attn_q.weight")
    assert stored.type.name == type_name
    # An f16 number, and of the other types the step of a block, which is the first thing in it.
    at = stored.start + 100 * stored.type.size
    content[at : at + 2] = b"\x00\x7e"
    with pytest.raises(ToolError, match=r"blk\.0\.attn_q\.weight holds NaN"):
        check_file(written(bytes(content)))


def test_bytes_after_the_last_tensor_are_refused():
    with pytest.raises(ToolError, match="4096 bytes follow the last tensor"):
        check_file(written((base() / "model.gguf").read_bytes() + bytes(4096)))


def test_overlapping_tensors_are_refused():
    header = read_header(base() / "model.gguf")
    content = bytearray((base() / "model.gguf").read_bytes())
    second = header.tensors[1]
    name = struct.pack("<Q", len(second.name)) + second.name.encode()
    at = content.index(name) + len(name) + 4 + 8 * len(second.shape) + 4
    struct.pack_into("<Q", content, at, header.tensors[0].start - header.data_start)
    with pytest.raises(ToolError, match="overlap"):
        check_file(written(bytes(content)))


class TestNativeCrashes:
    def test_too_many_layers_abort_the_child_only(self):
        folder = doctored(base(), "llama.block_count", "I", 600)
        with pytest.raises(ToolError, match="SIGABRT") as caught:
            in_child("decode", folder=str(folder), tokens=[1, 2])
        assert caught.value.signal == "SIGABRT"
        assert in_child("decode", folder=str(base()), tokens=[1, 2]).value

    def test_a_vocabulary_without_byte_tokens_aborts_the_child_only(self):
        content = (base() / "model.gguf").read_bytes()
        for byte in range(256):
            content = content.replace(b"<0x%02X>" % byte, b"<!x%02X>" % byte)
        path = written(content)
        with pytest.raises(ToolError, match="killed by SIGABRT") as caught:
            in_child("tokenize", folder=str(path.parent), text="🦙")
        assert caught.value.signal == "SIGABRT"
        with pytest.raises(ToolError, match="lacks 166 of the 256 byte tokens"):
            check_file(path)

    def test_an_unknown_architecture_is_an_error_with_llama_cpps_reason(self):
        content = (base() / "model.gguf").read_bytes().replace(b"llama.", b"lyama.")
        place = content.index(b"general.architecture") + len(b"general.architecture") + 4 + 8
        path = written(content[:place] + b"lyama" + content[place + 5 :])
        with pytest.raises(ToolError, match="unknown model architecture: 'lyama'"):
            in_child("decode", folder=str(path.parent), tokens=[1])
