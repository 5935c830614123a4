"""What the tests of GGUF run in child processes, and the models that they share."""

import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny

from modelmint.formats.gguf import format as gguf
from modelmint.isolate import Limits, Outcome
from modelmint.recipe import Variant
from modelmint.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
SANDBOX = Sandbox(threads=1, limits=Limits(wall_seconds=240))
TEXTS = (
    "The assert statement is a convenient way to insert debugging assertions.",
    " leading and  double spaces\n\n\tand a tab",
    "naïve — Zażółć 你好 🦙 3.14159 2024",
    "def f(x):\n    return x**2  # squared",
    "",
)


@cache
def source(architecture: str = "llama", **config: Any) -> Path:
    """A tiny checkpoint, made once."""
    return tiny.checkpoint(scratch() / "source", architecture, **config)


@cache
def base(architecture: str = "llama", **config: Any) -> Path:
    """The f16 base of a tiny checkpoint, made once."""
    folder = scratch()
    gguf.convert(source(architecture, **config), folder, {}, SANDBOX)
    return folder


@cache
def variant(type_name: str, architecture: str = "llama") -> Path:
    """A variant of a tiny checkpoint, made once."""
    folder = scratch()
    gguf.quantize(base(architecture), folder, Variant.parse(f"gguf:{type_name}"), SANDBOX)
    return folder


def scratch() -> Path:
    """A new folder that is removed with all the others when the tests end."""
    return Path(tempfile.mkdtemp(dir=_root()))


@cache
def _root() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="gguf-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_child(function: str, **arguments: Any) -> Outcome:
    """Call a function of this file in a child process."""
    paths = (ROOT, ROOT / "tests")
    return SANDBOX.call(f"tests.formats.gguf_calls:{function}", arguments, python_path=paths)


def doctored(folder: Path, key: str, layout: str, value: float) -> Path:
    """A copy of a base whose metadata has another scalar under `key`, written with the struct layout `layout`."""
    copy = scratch()
    content = bytearray((folder / "model.gguf").read_bytes())
    name = struct.pack("<Q", len(key)) + key.encode()
    at = content.index(name) + len(name) + 4
    struct.pack_into("<" + layout, content, at, value)
    (copy / "model.gguf").write_bytes(content)
    return copy


def tokenize(folder: str, text: str) -> list[int]:
    """In a child: what llama.cpp makes of a text."""
    session = gguf.open_session(Path(folder), 1, 64)
    tokens = session.tokenize(text)
    session.close()
    return tokens


def decode(folder: str, tokens: list[int]) -> list[int]:
    """In a child: the most probable next token after each."""
    session = gguf.open_session(Path(folder), 1, 64)
    best = session.logits(tokens).argmax(axis=-1).tolist()
    session.close()
    return best  # type: ignore[no-any-return]
