"""The reference stage: what the source, or the unquantized base of a format, predicts on the evaluation text.

Its artifact holds the compact log-probabilities of `modelmint.divergence` in ``reference.safetensors``, and in
``expectations.json`` what the source's tokenizer and chat template do; `evaluate` holds every variant against both.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, JsonValue

from modelmint import checkpoint, divergence, formats, parity
from modelmint.artifact import Digest, Step, Tool, canonical_json
from modelmint.errors import SourceError, ToolError
from modelmint.host import hardware_class
from modelmint.isolate import progress
from modelmint.recipe import Evaluation
from modelmint.report import HardwareClass, Measurement, Value
from modelmint.sandbox import sandbox
from modelmint.step import Context, StepResult, Work, Workspace, run_step

if TYPE_CHECKING:
    from modelmint.formats import Session

STAGE_VERSION = 1
NUMBERS, EXPECTATIONS = "reference.safetensors", "expectations.json"
CHARACTERS_PER_TOKEN = 16
"""More than any tokenizer needs on average: so much of a long text is read first."""


class Header(Value):
    """What is known of a reference besides its numbers.

    Attributes:
        schema_version: version of the file's layout.
        kind: whose predictions these are: the source's under PyTorch, or a format's unquantized base.
        format: of that base; empty for the source.
        dtype: the arithmetic of the source; of a base it is its file's.
        vocabulary: number of token ids.
        first: position in each window of the first prediction that is scored; the last but one is the last.
        perplexity: of the reference on the text.
        perplexity_spread: its standard error.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    kind: Literal["source", "base"]
    format: str = ""
    dtype: str
    vocabulary: int
    first: int
    perplexity: float
    perplexity_spread: float

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)


@dataclass(frozen=True)
class Reference:
    """A reference as it is read.

    Attributes:
        header: what is known of it.
        tokens: shape (windows, window).
        windows: the compact log-probabilities of each window's scored positions.
    """

    header: Header
    tokens: NDArray[np.int32]
    windows: tuple[divergence.Compact, ...]

    def targets(self, window: int) -> NDArray[np.int32]:
        """The tokens that the scored positions of a window predict."""
        return self.tokens[window, self.header.first + 1 :]


def reference(
    source: Digest, text: Digest, evaluation: Evaluation, context: Context, *, base: tuple[str, Digest] | None = None
) -> StepResult:
    """Record what variants are measured against.

    Args:
        source: digest of the checkpoint; its tokenizer cuts the text in any case.
        text: digest of the evaluation text, an artifact of one UTF-8 file.
        evaluation: how quality is measured.
        context: store, settings and who asks.
        base: name of a format and digest of its unquantized base, whose predictions are taken instead of the source's.

    Raises:
        SourceError: if the text is too short or not UTF-8.
        UnsafeSourceError: if the source's chat template takes more time or memory than any sound one.
        UnsupportedError: if the source cannot be opened.
        ToolError: if its logits are not finite, or native code crashed.
    """
    config = json.loads(context.store.read(source, "config.json"))
    format_module = formats.load(base[0]) if base else None
    native = checkpoint.is_native(config) or (format_module is not None and format_module.NATIVE)
    threads = context.settings.tool_threads()
    hardware = hardware_class(threads)
    step = Step(
        stage="reference",
        stage_version=STAGE_VERSION,
        parameters={
            "reference": "base" if base else "source",
            "hardware": hardware.model_dump(mode="json"),
            **evaluation.model_dump(mode="json", include={"window", "windows", "top", "sample", "seed", "prompts"}),
            **_arithmetic(base, format_module, evaluation),
        },
        inputs={"source": source, "text": text} | ({"base": base[1]} if base else {}),
        tools=_tools(config, format_module),
        observation=True,
    )

    def work(workspace: Workspace) -> Work:
        entries = context.store.artifact(source).files
        small = tuple(entry.path for entry in entries if not entry.path.endswith(".safetensors"))
        folder = context.store.materialize(source, workspace.folder / "source", only=small if base else ())
        text_folder = context.store.materialize(text, workspace.folder / "text")
        arguments: dict[str, Any] = {
            "source": str(folder),
            "text": str(text_folder / context.store.artifact(text).files[0].path),
            "evaluation": evaluation.model_dump(mode="json"),
            "threads": threads,
            "out": str(workspace.out),
            "base_format": base[0] if base else "",
            "base": str(context.store.materialize(base[1], workspace.folder / "base")) if base else "",
        }
        isolated = None
        if native:
            isolated = (
                sandbox(context, workspace, threads).call("modelmint.reference:in_child", arguments).network_isolated
            )
        else:
            in_child(**arguments)
        return Work(measurements=(_perplexity(workspace.out, hardware),), network_isolated=isolated)

    return run_step(context, step, work)


def _arithmetic(
    base: tuple[str, Digest] | None, module: formats.Format | None, evaluation: Evaluation
) -> dict[str, JsonValue]:
    """Whose predictions are taken, as it enters the key."""
    if base is None or module is None:
        return {"dtype": evaluation.dtype}
    return {"format": base[0], "format_version": module.STAGE_VERSION}


def in_child(
    source: str, text: str, evaluation: Mapping[str, Any], threads: int, out: str, base_format: str, base: str
) -> None:
    """Measure and write the reference: what `reference` runs in a child process where native code is involved."""
    wanted = Evaluation.model_validate(evaluation)
    tokenizer = checkpoint.open_tokenizer(Path(source))
    tokens = evaluation_windows(Path(text), tokenizer, wanted.window, wanted.windows)
    expected = parity.expectations(tokenizer, wanted.prompts)
    Path(out, EXPECTATIONS).write_bytes(canonical_json(expected.model_dump(mode="json")))
    session: Session
    if base:
        session = formats.load(base_format).open_session(Path(base), threads, wanted.window)
    else:
        session = checkpoint.open_source(Path(source), wanted.dtype, threads)
    try:
        windows = _measure(session, tokens, wanted)
    finally:
        session.close()
    surprisal = -np.stack([window.target_log_probs for window in windows]).astype(np.float64)
    mean = divergence.mean_by_window(surprisal)
    header = Header(
        kind="base" if base else "source",
        format=base_format,
        dtype="" if base else wanted.dtype,
        vocabulary=tokenizer.vocabulary,
        first=first_scored(wanted.window),
        perplexity=math.exp(mean.value),
        perplexity_spread=math.exp(mean.value) * mean.spread,
    )
    _write(Path(out, NUMBERS), Reference(header, tokens, windows))


def first_scored(window: int) -> int:
    """The position whose prediction is the first to be scored: from the middle of a window on, as llama.cpp does it."""
    return window // 2


def evaluation_windows(path: Path, tokenizer: formats.Tokenizer, window: int, count: int) -> NDArray[np.int32]:
    """Cut the text into windows of tokens, in the very way of llama.cpp's perplexity tool.

    The whole text is one run of tokens. Where the tokenizer puts a beginning-of-sequence token first, it takes the
    place of each window's first token.

    Returns:
        Shape (count, window).

    Raises:
        SourceError: if the text is not UTF-8 or gives fewer windows.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"the evaluation text is not UTF-8 (byte {error.start}); convert it first") from error
    special = tokenizer.special_tokens
    start = [special.beginning] if special.adds_beginning and special.beginning is not None else []
    needed = window * count
    # Tokens far from the cut do not depend on it, so a long text need not be tokenized in full.
    part = text[: CHARACTERS_PER_TOKEN * needed]
    tokens = start + tokenizer.tokenize(part)
    if len(tokens) < needed + window and len(part) < len(text):
        tokens = start + tokenizer.tokenize(text)
    if len(tokens) < needed:
        raise SourceError(
            f"the evaluation text gives {len(tokens) // window} windows of {window} tokens ({len(tokens)} tokens), "
            f"and {count} are asked for; name a longer text, or lower windows or window under evaluation"
        )
    windows = np.array(tokens[:needed], np.int32).reshape(count, window)
    if start:
        windows[:, 0] = start[0]
    return windows


def read(folder: Path) -> Reference:
    """Read the numbers of a reference."""
    from safetensors import safe_open

    with safe_open(folder / NUMBERS, "numpy") as file:
        header = Header.model_validate_json(file.metadata()["modelmint"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    tokens = arrays.pop("tokens")
    count = tokens.shape[1] - 1 - header.first
    windows = tuple(
        divergence.Compact(**{name: array[start : start + count] for name, array in arrays.items()})
        for start in range(0, len(tokens) * count, count)
    )
    return Reference(header, tokens, windows)


def read_expectations(folder: Path) -> parity.Expectations:
    """Read what the source does with texts and chats."""
    return parity.Expectations.model_validate_json(Path(folder, EXPECTATIONS).read_bytes())


def _measure(session: "Session", tokens: NDArray[np.int32], wanted: Evaluation) -> tuple[divergence.Compact, ...]:
    """Compress the logits of one window after the other."""
    first, windows = first_scored(wanted.window), []
    progress(0, len(tokens), "windows")
    for index, window in enumerate(tokens):
        logits = session.logits(window[:-1].tolist(), first)
        if not divergence.all_finite(logits):
            raise ToolError(
                f"the reference gives logits that are not finite in window {index + 1} of {len(tokens)}; "
                "its weights are damaged, or its arithmetic needs 'dtype: float32'"
            )
        if logits.shape[1] != session.vocabulary:
            raise ToolError(
                f"the reference predicts {logits.shape[1]} tokens, and its configuration names a vocabulary of "
                f"{session.vocabulary}; correct vocab_size in config.json"
            )
        generator = np.random.default_rng([wanted.seed, index])
        windows.append(
            divergence.compress(logits, window[first + 1 :], top=wanted.top, sample=wanted.sample, generator=generator)
        )
        progress(index + 1, len(tokens), "windows")
    return tuple(windows)


def _write(path: Path, written: Reference) -> None:
    from safetensors.numpy import save_file

    names = ("top_ids", "top_log_probs", "sample_ids", "sample_log_probs", "rest_mass", "target_log_probs")
    arrays: dict[str, NDArray[Any]] = {
        name: np.concatenate([getattr(window, name) for window in written.windows]) for name in names
    }
    # One entry, because the library writes several in any order.
    metadata = {"modelmint": written.header.model_dump_json()}
    save_file({"tokens": written.tokens} | arrays, path, metadata)


def _perplexity(folder: Path, hardware: HardwareClass) -> Measurement:
    found = read(folder)
    return Measurement(
        measure="perplexity",
        value=found.header.perplexity,
        spread=found.header.perplexity_spread,
        trials=sum(len(window.target_log_probs) for window in found.windows),
        statistic="mean",
        hardware=hardware,
    )


def _tools(config: Mapping[str, Any], format_module: formats.Format | None) -> tuple[Tool, ...]:
    """What tokenizes and what predicts, each once."""
    found = {tool.name: tool for tool in checkpoint.tools(config)}
    if format_module is not None:
        found |= {tool.name: tool for tool in format_module.tools("evaluate")}
    return tuple(found.values())
