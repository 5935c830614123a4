#!/usr/bin/env python3
"""Holds ModelMint's stages against llama.cpp's own tools: the same work on the same model, side by side in one run.

Both sides are built from the same source distribution with the same flags, and get the same checkpoint, text, threads
and lengths; who goes first alternates. By default the checkpoint is SmolLM2-135M off its quantization grid, so that the
figures of quality are those of weights that were never quantized. Exit code 1 if an aim is missed.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import llama_tools
from comparison import Aim, Comparison, Machine, Pair, seconds_of
from hand import Hand, HandError, Rates
from ours import Ours, Stage
from rich.console import Console

from modelmint import locks
from modelmint.artifact import digest_of_file
from modelmint.errors import ModelMintError
from modelmint.formats.gguf.vocabulary import FILE
from modelmint.host import hardware_class, host
from modelmint.recipe import Evaluation
from modelmint.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M")
SEED = 1
"""Of the noise that takes the checkpoint off its grid."""

TIME_RATIO = 1.1
KL_DIFFERENCE = 0.01
SPEED_DIFFERENCE = 0.05
MEMORY_RATIO, MEMORY_MORE = 1.1, 40e6
REFERENCE_SHARE = 1 / 30

T = TypeVar("T")
U = TypeVar("U")


class Contest:
    """One comparison as it goes: both sides, and what was found so far.

    Args:
        arguments: of the command line.
        hand: the tools.
        ours: the stages.
    """

    def __init__(self, arguments: argparse.Namespace, hand: Hand, ours: Ours) -> None:
        self.arguments = arguments
        self.hand = hand
        self.ours = ours
        self.found = Comparison()
        self._turn = 0

    def both(self, by_hand: Callable[[], T], ours: Callable[[], U]) -> tuple[T, U]:
        """Do both, and the other one first at the next turn."""
        self._turn += 1
        if self._turn % 2:
            first = by_hand()
            return first, ours()
        second = ours()
        return by_hand(), second

    def run(self, source: Path, text: Path) -> None:
        """Do everything."""
        acquired, taken = self.ours.acquire(source), self.ours.text(text)
        self.found.notes["bring checkpoint and text into the store, s"] = acquired.seconds + taken.seconds
        base = self.convert(source, acquired)
        reference = self.reference(text, acquired, taken, base)
        for kind in self.arguments.types:
            variant = self.quantize(kind, base)
            evaluated = self.divergence(kind, variant, reference)
            if self.arguments.pairs:
                self.speed(kind)
        if self.arguments.types:
            wanted = Evaluation(reference="base", window=self.arguments.window, windows=self.arguments.windows)
            asked = self.ours.evaluate(variant.output, reference.output, wanted)
            self.found.notes[f"three answers, which no tool gives, s ({kind})"] = asked.seconds - evaluated.seconds
        total = self.found.total
        self.found.aims.insert(0, _at_most("all stages", "seconds", total.by_hand, total.ours, "s", TIME_RATIO))

    def convert(self, source: Path, acquired: Stage) -> Stage:
        """Convert the checkpoint."""
        say("convert")
        by_hand, ours = self.both(lambda: self.hand.convert(source), lambda: self.ours.convert(acquired.output))
        self.found.pairs.append(Pair("convert", by_hand.seconds, ours.seconds, ours.store_seconds))
        self._same_bytes("base", self.hand.base, ours)
        return ours

    def reference(self, text: Path, acquired: Stage, taken: Stage, base: Stage) -> Stage:
        """Have the base predict the text, and look whether both predicted the same tokens."""
        say("logits of the base")
        window, windows = self.arguments.window, self.arguments.windows
        by_hand, ours = self.both(
            lambda: self.hand.logits(text, window, windows),
            lambda: self.ours.reference(acquired.output, taken.output, base.output),
        )
        self.found.pairs.append(Pair("logits of the base", by_hand.seconds, ours.seconds, ours.store_seconds))
        tokens = self.ours.read_reference(ours.output, self.hand.folder / "reference").tokens
        theirs = self.hand.tokens()
        different = int((theirs != tokens).sum()) if theirs.shape == tokens.shape else theirs.size
        shapes = [f"{array.shape[0]} x {array.shape[1]}" for array in (theirs, tokens)]
        self.found.aims.append(Aim("text", "tokens that differ", *shapes, different, 0))
        size, kept = self.hand.logits_file.stat().st_size, self.ours.store.artifact(ours.output).size
        self.found.aims.append(
            Aim("reference", "bytes", f"{size / 1e6:.1f} MB", f"{kept / 1e6:.2f} MB", kept / size, REFERENCE_SHARE)
        )
        return ours

    def quantize(self, kind: str, base: Stage) -> Stage:
        """Quantize to a type."""
        say(f"{kind}: quantize")
        by_hand, ours = self.both(lambda: self.hand.quantize(kind), lambda: self.ours.quantize(base.output, kind))
        self.found.pairs.append(Pair(f"{kind} quantize", by_hand.seconds, ours.seconds, ours.store_seconds))
        self._same_bytes(kind, self.hand.file(kind), ours)
        allowed = MEMORY_RATIO * by_hand.peak_bytes + MEMORY_MORE
        peaks = [f"{peak / 1e6:.0f} MB" for peak in (by_hand.peak_bytes, ours.peak_bytes)]
        measure = f"peak memory over {MEMORY_RATIO} x + {MEMORY_MORE / 1e6:.0f} MB"
        self.found.aims.append(Aim(kind, measure, *peaks, ours.peak_bytes / allowed, 1.0))
        return ours

    def divergence(self, kind: str, variant: Stage, reference: Stage) -> Stage:
        """Hold a variant against the base."""
        say(f"{kind}: divergence")
        by_hand, ours = self.both(
            lambda: self.hand.divergence(kind, self.arguments.window),
            lambda: self.ours.evaluate(variant.output, reference.output),
        )
        self.found.pairs.append(Pair(f"{kind} KL", by_hand.run.seconds, ours.seconds, ours.store_seconds))
        kl = self.ours.figure(ours.output, "kl_divergence")
        figures = [f"{figure:.6f}" for figure in (by_hand.kl, kl)]
        self.found.aims.append(Aim(kind, "mean KL, difference", *figures, abs(kl / by_hand.kl - 1), KL_DIFFERENCE))
        top_1 = self.ours.figure(ours.output, "top_1_agreement")
        self.found.notes[f"{kind} top-1"] = {"by hand": f"{by_hand.top_1:.4%}", "ours": f"{top_1:.4%}"}
        return ours

    def speed(self, kind: str) -> None:
        """Measure the speed of one and the same file in turns, each time in a fresh process."""
        say(f"{kind}: speed")
        prompt, generate = self.arguments.prompt, self.arguments.generate
        trials = [
            self.both(
                lambda: self.hand.speed(kind, prompt, generate),
                lambda: self.ours.speed(self.hand.file(kind).parent, prompt, generate),
            )
            for _ in range(self.arguments.pairs)
        ]
        seconds = [sum(trial[side].seconds for trial in trials) for side in (0, 1)]
        self.found.pairs.append(Pair(f"{kind} speed x {len(trials)}", *seconds))
        for name in ("prefill", "decode"):
            rates = [statistics.median(_rate(trial[side], name) for trial in trials) for side in (0, 1)]
            ratio = statistics.median(_rate(trial[1], name) / _rate(trial[0], name) for trial in trials)
            words = [f"{rate:.1f} tokens/s" for rate in rates]
            self.found.aims.append(Aim(kind, f"{name}, difference", *words, abs(ratio - 1), SPEED_DIFFERENCE))

    def _same_bytes(self, subject: str, file: Path, ours: Stage) -> None:
        digests = [digest_of_file(file), self.ours.store.artifact(ours.output).file(FILE).digest]
        shown = [digest.removeprefix("sha256:")[:12] for digest in digests]
        self.found.aims.append(Aim(subject, "other bytes", *shown, int(digests[0] != digests[1]), 0))


def _rate(rates: Rates, name: str) -> float:
    return float(getattr(rates, name))


def _at_most(subject: str, measure: str, by_hand: float, ours: float, unit: str, ratio: float) -> Aim:
    words = [f"{figure:.1f} {unit}" for figure in (by_hand, ours)]
    return Aim(subject, f"{measure}, ratio", *words, ours / by_hand, ratio)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(arguments: argparse.Namespace) -> Comparison:
    """Set both sides up in a temporary folder and have them do everything.

    Raises:
        BuildError: llama.cpp's tools could not be built.
        HandError: one of them failed.
        ModelMintError: a stage of ours failed.
    """
    tools = llama_tools.build(jobs=2)
    source = (arguments.model or _off_grid()).resolve()
    evaluation = Evaluation(
        reference="base", window=arguments.window, windows=arguments.windows, prompts=(), answer_tokens=1
    )
    with tempfile.TemporaryDirectory(prefix="modelmint-by-hand-", dir=arguments.scratch) as name:
        folder = Path(name)
        (folder / "ours").mkdir()
        text = folder / "text.txt"
        text.write_bytes(_text(arguments.text))
        ours = Ours(folder / "ours", arguments.threads, evaluation)
        contest = Contest(arguments, Hand(folder / "hand", tools, arguments.threads), ours)
        with _alone():
            machine, notes = Machine(), contest.found.notes
            with seconds_of(notes, "the whole comparison, s"):
                contest.run(source, text)
            notes["cores used by others meanwhile"] = machine.used_by_others()
    contest.found.facts = _facts(source, arguments)
    return contest.found


def _off_grid() -> Path:
    command = [sys.executable, str(ROOT / "examples" / "smollm2.py"), "--break-grid", str(SEED)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def _text(file: Path | None) -> bytes:
    if file is not None:
        return file.read_bytes()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _alone() -> contextlib.AbstractContextManager[None]:
    """Nothing else of ours runs on this machine meanwhile."""
    return locks.machine(Settings().host_lock, "alone", "a comparison with llama.cpp's tools")


def _facts(source: Path, arguments: argparse.Namespace) -> dict[str, str]:
    machine = host()
    return {
        "checkpoint": f"{source.name}",
        "reference": "the f16 base under llama.cpp",
        "text": f"{arguments.windows} windows of {arguments.window} tokens, second half scored",
        "speed": f"{arguments.prompt} tokens prefilled, {arguments.generate} decoded, {arguments.pairs} pairs",
        "machine": f"{machine.cpu}, {machine.cores} cores, {hardware_class(arguments.threads)}",
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold ModelMint's stages against llama.cpp's own tools.")
    parser.add_argument("--types", nargs="*", default=list(TYPES), help="quantization types (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="checkpoint (default: SmolLM2-135M-Instruct off its grid)")
    parser.add_argument("--text", type=Path, help="evaluation text (default: the topics that come with Python)")
    parser.add_argument("--threads", type=int, default=2, help="for every tool (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=12, help="of the text (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens in one (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=int, default=7, help="of speed for each type; 0 for none (default: %(default)s)"
    )
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are prefilled (default: %(default)s)")
    parser.add_argument("--generate", type=int, default=64, help="tokens that are decoded (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files, which take some 2 GB")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    try:
        found = compare(arguments)
    except (llama_tools.BuildError, HandError, ModelMintError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        found.show(Console(width=None if sys.stdout.isatty() else 160))
    return 1 if found.missed else 0


if __name__ == "__main__":
    sys.exit(main())
