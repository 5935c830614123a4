"""Where llama.cpp's converter lies, whether it is the one that belongs to the installed library, and what it knows.

::

    <sys.prefix>/share/modelmint/llama.cpp/
        convert_hf_to_gguf.py  conversion/  gguf-py/
        source.json     version, digest of the source distribution, compile flags, digest of every file
"""

import ast
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modelmint.errors import UnsupportedError
from modelmint.formats.gguf.library import INSTALL

SCRIPT = "convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Source:
    """The source distribution that library and converter were built from.

    Attributes:
        package: the distribution's name.
        version: its version.
        digest: its content digest.
        flags: compile flags of the library, in the order they were given.
    """

    package: str
    version: str
    digest: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class PreTokenizers:
    """How the converter recognizes the pre-tokenizer of a byte-level BPE tokenizer.

    Attributes:
        text: what it has the tokenizer encode.
        names: llama.cpp's name of the pre-tokenizer by the hash of the resulting ids.
    """

    text: str
    names: Mapping[str, str]


def home() -> Path:
    """The folder of the converter."""
    return Path(sys.prefix) / "share" / "modelmint" / "llama.cpp"


@cache
def source() -> Source:
    """What is installed, each file of the converter checked once per process.

    Raises:
        UnsupportedError: if library or converter are missing, differ in version, or a file was changed.
    """
    record = _record()
    try:
        installed = importlib.metadata.version(record.source.package)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError(f"the package {record.source.package} is not installed; {INSTALL}") from None
    if installed != record.source.version:
        raise UnsupportedError(
            f"the converter in {home()} belongs to {record.source.package} {record.source.version}, but {installed} is "
            f"installed; {INSTALL}"
        )
    for name, expected in record.files.items():
        path = home() / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if found != expected:
            raise UnsupportedError(f"{path} has SHA-256 {found}, not {expected} as recorded; {INSTALL}")
    return record.source


@dataclass(frozen=True)
class _Record:
    source: Source
    files: Mapping[str, str]


def _record() -> _Record:
    path = home() / "source.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != 1:
            raise UnsupportedError(f"{path} has schema {record['schema']}, and 1 is known; {INSTALL}")
        files = {str(name): str(digest) for name, digest in record["files"].items()}
        found = Source(
            package=record["package"],
            version=record["version"],
            digest="sha256:" + record["sdist_sha256"],
            flags=tuple(record["cmake_args"]),
        )
    except FileNotFoundError:
        raise UnsupportedError(f"llama.cpp's converter is not installed: no {path}; {INSTALL}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedError(f"{path} cannot be read ({error!r}); {INSTALL}") from error
    if SCRIPT not in files:
        raise UnsupportedError(f"{path} lists no {SCRIPT}; {INSTALL}")
    return _Record(found, files)


@cache
def architectures() -> Mapping[str, str]:
    """The converter's own table: architecture of a text model, as in config.json, to the module that converts it."""
    tree = ast.parse((home() / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP":
            table: dict[str, str] = ast.literal_eval(node.value) if node.value else {}
            return table
    raise UnsupportedError(f"the converter in {home()} has no table of architectures; {INSTALL}")


@cache
def pre_tokenizers() -> PreTokenizers:
    """The pre-tokenizers that the converter recognizes, read from its source."""
    text = (home() / "conversion" / "base.py").read_text(encoding="utf-8")
    function = text.partition("def get_vocab_base_pre(")[2].partition("# Marker: End get_vocab_base_pre")[0]
    sample = re.search(r"^ +chktxt = (.+)$", function, re.MULTILINE)
    names = dict(re.findall(r'chkhsh == "([0-9a-f]{64})":\s+(?:#.*\s+)*res = "([^"]+)"', function))
    if sample is None or not names:
        raise UnsupportedError(f"the converter in {home()} has no table of pre-tokenizers; {INSTALL}")
    return PreTokenizers(ast.literal_eval(sample[1]), names)
