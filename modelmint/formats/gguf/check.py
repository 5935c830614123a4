"""Looks a finished GGUF file over before anybody relies on it: a tool's exit code is not believed.

llama.cpp loads many a file that is wrong (a vocabulary of another size, special tokens out of range, weights that are
not numbers) and aborts the process on others. What can be known from the file is refused here, with a sentence
instead of a crash.
"""

import ctypes
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from modelmint.errors import ToolError
from modelmint.formats.gguf import library
from modelmint.formats.gguf.header import Header, StoredTensor, read_header
from modelmint.formats.gguf.types import INTEGER_TYPES

MAX_LAYERS = 512
SLAB_BYTES = 1 << 24
SPECIAL_TOKEN_KEY = re.compile(r"tokenizer\.ggml\.\w+_token_id")
EPSILON_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
PROBE = "Zażółć gęślą jaźń, 3.14 naïve\n\t— 你好, мир! 🦙\x01"


@dataclass(frozen=True)
class Contents:
    """What the tensors of a file amount to.

    Attributes:
        bytes: of all tensors.
        elements: of all tensors.
        tensors: how many there are.
    """

    bytes: int
    elements: int
    tensors: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, over all tensors."""
        return 8 * self.bytes / self.elements


def check_file(path: Path) -> Contents:
    """Check a whole file: structure, vocabulary, special tokens, every weight.

    Raises:
        ToolError: names the first thing that is wrong.
    """
    header = read_header(path)
    check_header(path.name, header)
    check_weights(path, header)
    return Contents(
        bytes=sum(tensor.size for tensor in header.tensors),
        elements=sum(tensor.elements for tensor in header.tensors),
        tensors=len(header.tensors),
    )


def check_header(name: str, header: Header) -> None:
    """Check all that is known without the weights.

    Raises:
        ToolError: names the first thing that is wrong.
    """
    if not header.architecture:
        raise _wrong(name, "it names no architecture (general.architecture)")
    if not header.tensors:
        raise _wrong(name, "it has no tensors")
    _check_layout(name, header)
    _check_layers(name, header)
    _check_vocabulary(name, header)


def check_weights(path: Path, header: Header) -> None:
    """Check that every weight is a number, by llama.cpp's own function; reads the file in slabs.

    Raises:
        ToolError: names the first tensor with NaN, infinity or a damaged block.
    """
    valid = library.tensor_library().ggml_validate_row_data
    buffer = bytearray(SLAB_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    with path.open("rb", buffering=0) as file:
        for tensor in header.tensors:
            if tensor.type.name in INTEGER_TYPES:
                continue
            slab = SLAB_BYTES // tensor.type.size * tensor.type.size
            file.seek(tensor.start)
            remaining = tensor.size
            while remaining:
                wanted = min(slab, remaining)
                count = file.readinto(memoryview(buffer)[:wanted])
                if count != wanted:
                    raise _wrong(path.name, f"tensor {tensor.name} is cut short by {remaining - (count or 0)} bytes")
                if not valid(tensor.type.id, address, wanted):
                    raise _wrong(path.name, f"tensor {tensor.name} holds NaN, infinity or a damaged block")
                remaining -= wanted


def check_tokenizer(path: Path) -> None:
    """Let llama.cpp load the vocabulary and take a text apart; it aborts this process where it cannot.

    Raises:
        ToolError: if the vocabulary is refused, or the text does not come back.
    """
    from modelmint.formats.gguf.vocabulary import Vocabulary, load_model

    log = library.Log()
    model = load_model(path, log, vocabulary_only=True)
    vocabulary = Vocabulary(model)
    tokens = vocabulary.tokenize(PROBE)
    if any(not 0 <= token < vocabulary.vocabulary for token in tokens) or not tokens:
        raise _wrong(
            path.name, f"its tokenizer gave {tokens[:8]} for a text, not ids from 0 to {vocabulary.vocabulary}"
        )
    library.load().llama_model_free(model)


def _check_layout(name: str, header: Header) -> None:
    placed = sorted(header.tensors, key=lambda tensor: tensor.start)
    for before, after in itertools.pairwise(placed):
        if before.start + before.size > after.start:
            raise _wrong(name, f"the tensors {before.name} and {after.name} overlap")
    last = placed[-1]
    beyond = header.size - (last.start + last.size)
    if beyond >= _alignment(header):
        raise _wrong(name, f"{beyond} bytes follow the last tensor, {last.name}")


def _alignment(header: Header) -> int:
    return int(header.number("general.alignment") or 32)


def _check_layers(name: str, header: Header) -> None:
    architecture = header.architecture
    layers = header.number(f"{architecture}.block_count")
    found = {int(match[1]) for tensor in header.tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
    if layers is None or not 1 <= layers <= MAX_LAYERS:
        raise _wrong(name, f"{architecture}.block_count is {layers}, and llama.cpp takes 1 to {MAX_LAYERS} layers")
    if found != set(range(int(layers))):
        raise _wrong(name, f"{architecture}.block_count is {layers}, but tensors are there for {len(found)} layers")
    for key in EPSILON_KEYS:
        epsilon = header.number(f"{architecture}.{key}")
        if epsilon is not None and not (math.isfinite(epsilon) and 0 <= epsilon < 1):
            raise _wrong(name, f"{architecture}.{key} is {epsilon}, not a small number")


def _check_vocabulary(name: str, header: Header) -> None:
    tokens = header.array("tokenizer.ggml.tokens")
    embedding: StoredTensor | None = header.tensor("token_embd.weight")
    if not tokens or embedding is None:
        raise _wrong(name, "it has no " + ("vocabulary" if not tokens else "token embedding"))
    rows = embedding.elements // embedding.width
    said = header.number(f"{header.architecture}.vocab_size")
    if len(tokens) != rows or (said is not None and said != rows):
        raise _wrong(
            name,
            f"its vocabulary has {len(tokens)} tokens, its embedding {rows} rows, and "
            f"{header.architecture}.vocab_size says {said}; check vocab_size in the checkpoint's config.json",
        )
    for key in header.metadata:
        token = header.number(key)
        if SPECIAL_TOKEN_KEY.fullmatch(key) and not (token is not None and 0 <= token < rows):
            raise _wrong(name, f"{key} is {token}, outside its {rows} tokens; check the checkpoint's special tokens")
    _check_byte_tokens(name, header, tokens)


def _check_byte_tokens(name: str, header: Header, tokens: list[int | float | bool | bytes]) -> None:
    """llama.cpp spells what a SentencePiece vocabulary lacks by its bytes, and aborts where there are none."""
    if header.text("tokenizer.ggml.model") != "llama":
        return
    known = set(tokens)
    missing = [byte for byte in range(256) if b"<0x%02X>" % byte not in known and bytes((byte,)) not in known]
    if missing:
        raise _wrong(
            name,
            f"its SentencePiece vocabulary lacks {len(missing)} of the 256 byte tokens, first <0x{missing[0]:02X}>, "
            "and llama.cpp aborts at the first text that needs one. Is the checkpoint's tokenizer of the right class "
            "(tokenizer_class in tokenizer_config.json)? A SentencePiece model must be trained with byte_fallback",
        )


def _wrong(name: str, reason: str) -> ToolError:
    return ToolError(f"{name} is not sound: {reason}")
