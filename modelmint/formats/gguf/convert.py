"""The unquantized base: llama.cpp's converter, run in a child process, and its output checked.

The converter writes its folder's name into the file, and for some architectures it asks transformers to run code that
comes with a checkpoint. So it is shown a folder of links, as its working folder and by no other name, in which there
is no code.
"""

import json
import logging
import runpy
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmint.errors import ResourceError, StageError, ToolError, UnsupportedError
from modelmint.formats.gguf import converter
from modelmint.formats.gguf.check import check_file, check_tokenizer
from modelmint.formats.gguf.types import TENSOR_TYPES
from modelmint.formats.gguf.vocabulary import FILE
from modelmint.isolated_child import progress

if TYPE_CHECKING:
    from modelmint.sandbox import Sandbox
    from modelmint.step import Work

CODE = frozenset((".py", ".pyc", ".so"))
"""Files of a checkpoint that are never shown to the converter."""

UNNAMED = "model"

UNSUPPORTED = ("pre-tokenizer was not recognized", "not supported", "Can not map tensor", "Duplicated key name")
"""What the converter says of a checkpoint that it cannot take, however sound that may be."""


def convert(source: Path, out: Path, type_name: str, name: str, sandbox: "Sandbox") -> "Work":
    """Write the base of the checkpoint in `source` into the folder `out`.

    Args:
        source: the checkpoint.
        out: an empty folder.
        type_name: f16, bf16 or f32.
        name: the model's name in the file's metadata; empty for ``model``.
        sandbox: limits of the child.

    Raises:
        UnsupportedError: if the converter does not take this checkpoint.
        ToolError: if it failed, or its output is not sound.
    """
    from modelmint.report import Measurement
    from modelmint.step import Work

    converter.source()
    home = converter.home()
    arguments = {"out": str(out.absolute()), "type_name": type_name, "name": name}
    with tempfile.TemporaryDirectory(prefix="modelmint-") as view:
        for path in source.absolute().iterdir():
            if path.suffix not in CODE:
                (Path(view) / path.name).symlink_to(path)
        outcome = sandbox.call(f"{__name__}:run", arguments, python_path=(home, home / "gguf-py"), cwd=Path(view))
    return Work(
        measurements=(Measurement(measure="bits_per_weight", value=outcome.value["bits_per_weight"]),),
        network_isolated=outcome.network_isolated,
    )


def run(out: str, type_name: str, name: str) -> dict[str, Any]:
    """In the child: convert the checkpoint in the working folder, then check the file."""
    file = Path(out) / FILE
    arguments = [".", "--outfile", str(file), "--outtype", type_name, "--model-name", name or UNNAMED]
    total = _elements() * TENSOR_TYPES[type_name].size
    with _watched(file, total):
        _run_script(arguments)
    contents = check_file(file)
    check_tokenizer(file)
    progress(total, total, "bytes")
    return {"tensors": contents.tensors, "bits_per_weight": contents.bits_per_weight}


def _run_script(arguments: list[str]) -> None:
    """Run the converter in this process.

    Raises:
        UnsupportedError: if it does not take this checkpoint.
        ToolError: if it gave up for another reason.
    """
    script = converter.home() / converter.SCRIPT
    sys.argv = [converter.SCRIPT, *arguments]
    heard = _Errors()
    logging.getLogger().addHandler(heard)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise _failed(heard.last or f"it exited with {stop.code}") from None
    except (OSError, MemoryError, StageError):
        raise
    except Exception as error:
        raise _failed(f"{type(error).__name__}: {error}") from error


def _failed(reason: str) -> StageError | UnsupportedError:
    if any(sign in reason for sign in UNSUPPORTED):
        return UnsupportedError(
            f"llama.cpp's converter does not take this checkpoint: {reason}. Choose another format, or a checkpoint of "
            "an architecture and with a tokenizer that it knows (`modelmint inspect` tells before the download)"
        )
    if "No space left on device" in reason:
        return ResourceError(f"the disk is full: {reason}")
    return ToolError(f"llama.cpp's converter failed: {reason}")


class _Errors(logging.Handler):
    """Keeps the last error that the converter logged; it exits with a bare number after some."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


@contextmanager
def _watched(file: Path, total: int) -> Iterator[None]:
    """Report the growth of a file twice a second until the block ends."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            written = file.stat().st_size if file.exists() else 0
            progress(min(written, max(total - 1, 0)), total, "bytes")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _elements() -> int:
    """Weights in the working folder, from the headers of its files; 0 where it keeps them otherwise."""
    count = 0
    for path in sorted(Path().glob("*.safetensors")):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for side in tensor["shape"]:
                    size *= side
                count += size
    return count
