"""One side of the comparison: the work done by hand, with llama.cpp's own converter and tools."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPAWN = Path(__file__).with_name("spawn.py")
CONVERTER = Path(sys.prefix) / "share" / "modelmint" / "llama.cpp" / "convert_hf_to_gguf.py"
HEADER_BYTES = 20
"""Of a file of logits: its magic, and context, vocabulary and chunks as 32-bit integers."""


class HandError(Exception):
    """A tool failed; the message says which and what it printed last."""


@dataclass(frozen=True)
class Run:
    """One run of a tool: wall-clock seconds, most memory it held resident, and all that it printed."""

    seconds: float
    peak_bytes: int
    output: str


@dataclass(frozen=True)
class Divergence:
    """What llama-perplexity says of a variant: mean KL divergence in nats, share of equal top tokens."""

    run: Run
    kl: float
    top_1: float


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one trial, and the seconds it took with loading and warming up."""

    seconds: float
    prefill: float
    decode: float


class Hand:
    """The tools, and the folder that they write to.

    Args:
        folder: for what is made.
        tools: path of each tool by its name.
        threads: given to each tool that takes them.
    """

    def __init__(self, folder: Path, tools: dict[str, Path], threads: int) -> None:
        self.folder = folder
        self.tools = tools
        self.threads = str(threads)
        self.base = folder / "base" / "model.gguf"
        self.logits_file = folder / "logits.bin"
        self.base.parent.mkdir(parents=True)

    def convert(self, source: Path) -> Run:
        """Convert a checkpoint to f16; from inside of its folder, whose name would get into the file otherwise."""
        arguments = [".", "--outfile", str(self.base), "--outtype", "f16", "--model-name", "model"]
        return run([sys.executable, str(CONVERTER), *arguments], cwd=source)

    def logits(self, text: Path, window: int, chunks: int) -> Run:
        """Write the logits of the base."""
        # Without --no-escape the tool turns a backslash and an n in the text into a line end.
        given = ["--file", str(text), "--no-escape", "--ctx-size", str(window), "--chunks", str(chunks)]
        return self._perplexity(self.base, given)

    def tokens(self) -> NDArray[np.int32]:
        """The tokens that the logits are about, of shape (chunks, window)."""
        with self.logits_file.open("rb") as file:
            header = file.read(HEADER_BYTES)
            window, _, chunks = np.frombuffer(header, np.int32, offset=8).tolist()
            return np.fromfile(file, np.int32, window * chunks).reshape(chunks, window)

    def quantize(self, kind: str) -> Run:
        """Quantize the base to a type."""
        target = self.file(kind)
        target.parent.mkdir()
        return run([str(self.tools["llama-quantize"]), str(self.base), str(target), kind, self.threads])

    def divergence(self, kind: str, window: int) -> Divergence:
        """Hold a variant against the logits of the base."""
        done = self._perplexity(self.file(kind), ["--kl-divergence", "--ctx-size", str(window)])
        kl = _figure(done.output, r"Mean\s+KLD:\s+(\S+)")
        return Divergence(done, kl, _figure(done.output, r"Same top p:\s+(\S+)") / 100)

    def speed(self, kind: str, prompt: int, generate: int) -> Rates:
        """One repetition of llama-bench, in a process of its own."""
        lengths = ["-p", str(prompt), "-n", str(generate), "-r", "1", "-t", self.threads]
        done = run([str(self.tools["llama-bench"]), "-m", str(self.file(kind)), *lengths, "-o", "json"])
        tests = json.loads(done.output[done.output.index("[\n") : done.output.rindex("]") + 1])
        rates = {("decode" if test["n_gen"] else "prefill"): float(test["avg_ts"]) for test in tests}
        return Rates(done.seconds, **rates)

    def file(self, kind: str) -> Path:
        """Where a variant lies."""
        return self.folder / kind / "model.gguf"

    def _perplexity(self, model: Path, arguments: Sequence[str]) -> Run:
        common = ["--model", str(model), "--threads", self.threads, "--kl-divergence-base", str(self.logits_file)]
        return run([str(self.tools["llama-perplexity"]), *common, *arguments])


def run(command: Sequence[str], cwd: Path | None = None) -> Run:
    """Run a command and measure it.

    Raises:
        HandError: if it does not exit with 0.
    """
    reader, writer = os.pipe()
    launcher = [sys.executable, "-I", "-S", str(SPAWN), str(writer), *command]
    try:
        done = subprocess.run(
            launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, pass_fds=[writer]
        )
    finally:
        os.close(writer)
    with os.fdopen(reader) as measured:
        words = measured.read().split()
    if len(words) != 3 or words[2] != "0":
        code = words[2] if len(words) == 3 else done.returncode
        raise HandError(f"`{' '.join(command)}` ended with {code}:\n{done.stdout[-2000:]}")
    return Run(float(words[0]), int(words[1]), done.stdout)


def _figure(output: str, pattern: str) -> float:
    found = re.search(pattern, output)
    if not found:
        raise HandError(f"llama-perplexity printed nothing like {pattern!r}:\n{output[-2000:]}")
    return float(found[1])
