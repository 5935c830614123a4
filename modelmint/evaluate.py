"""The evaluate stage: a variant held against the reference, and what it says to a few prompts.

The same stage measures an unquantized base against the source, which is what conversion lost; the caller names it so.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelmint import divergence, formats, parity
from modelmint import reference as reference_stage
from modelmint.artifact import Digest, Step, Tool, canonical_json
from modelmint.divergence import Comparison, Estimate
from modelmint.errors import StageError, ToolError
from modelmint.formats import Session
from modelmint.host import hardware_class
from modelmint.isolate import progress
from modelmint.recipe import Evaluation
from modelmint.reference import Reference
from modelmint.report import Answer, HardwareClass, Measurement, Measurements
from modelmint.sandbox import sandbox
from modelmint.step import Context, StepResult, Work, Workspace, run_step
from modelmint.store import Store

STAGE_VERSION = 1
MEASUREMENTS = "measurements.json"
PROMPT_TOKENS = 32
"""How much of the evaluation text is continued where a recipe has no prompts."""
PHASE_BYTES = 80
"""Of the file that says what is being done; every phase is shorter."""


def evaluate(
    format_name: str, variant: Digest, reference: Digest, evaluation: Evaluation, threads: int, context: Context
) -> StepResult:
    """Measure the quality of a variant or of an unquantized base.

    Args:
        format_name: a name in the table of formats.
        variant: digest of the files to measure.
        reference: digest of the reference.
        evaluation: of which the prompts and their limit matter here; the rest is in the reference.
        threads: for the format's tool; 0 for what the settings say.
        context: store, settings and who asks.

    Returns:
        The step whose output is ``measurements.json``; `read` reads it.

    Raises:
        ToolError: if the variant does not load or native code crashed; the message says at which point.
    """
    module = formats.load(format_name)
    threads = context.settings.tool_threads(threads)
    hardware = hardware_class(threads).model_dump(mode="json")
    wanted = evaluation.model_dump(mode="json", include={"prompts", "answer_tokens"})
    step = Step(
        stage="evaluate",
        stage_version=STAGE_VERSION,
        parameters={"format": format_name, "format_version": module.STAGE_VERSION, "hardware": hardware, **wanted},
        inputs={"variant": variant, "reference": reference},
        tools=_tools(module),
        observation=True,
    )

    def work(workspace: Workspace) -> Work:
        phase = workspace.folder / "phase"
        arguments: dict[str, Any] = {
            "format_name": format_name,
            "variant": str(context.store.materialize(variant, workspace.folder / "variant")),
            "reference": str(context.store.materialize(reference, workspace.folder / "reference")),
            "hardware": hardware,
            "out": str(workspace.out / MEASUREMENTS),
            "phase": str(phase),
            **wanted,
        }
        if not module.NATIVE:
            in_child(**arguments)
            return Work()
        try:
            outcome = sandbox(context, workspace, threads).call("modelmint.evaluate:in_child", arguments)
        except ToolError as error:
            doing = phase.read_text().strip() if phase.exists() else "starting"
            raise ToolError(
                f"failed while {doing}: {error}",
                signal=error.signal,
                exit_code_of_tool=error.exit_code_of_tool,
                stderr_tail=error.stderr_tail,
            ) from error
        return Work(network_isolated=outcome.network_isolated)

    return run_step(context, step, work)


def read(store: Store, digest: Digest) -> Measurements:
    """The measurements that an evaluate step has stored."""
    return Measurements.model_validate_json(store.read(digest, MEASUREMENTS))


def in_child(
    format_name: str,
    variant: str,
    reference: str,
    hardware: Mapping[str, Any],
    prompts: Sequence[str],
    answer_tokens: int,
    out: str,
    phase: str,
) -> None:
    """Measure and write the measurements: what `evaluate` runs in a child process where native code is involved.

    Args:
        format_name: a name in the table of formats.
        variant: folder of the files to measure.
        reference: folder of the reference.
        hardware: the class of this machine and the threads to use.
        prompts: what is asked.
        answer_tokens: limit of an answer.
        out: the file to write.
        phase: a file that always says what is being done, for the message after a crash.
    """
    held_against = reference_stage.read(Path(reference))
    expected = reference_stage.read_expectations(Path(reference))
    found = _Found(HardwareClass.model_validate(hardware), Path(phase))
    # A token has at least one byte, so no prompt has more tokens than it and what a template adds have bytes.
    around = max((len(item.rendered.text.encode()) for item in (*expected.chats, *expected.prompts)), default=0)
    longest = max((len(prompt.encode()) for prompt in prompts), default=PROMPT_TOKENS)
    room = max(held_against.tokens.shape[1], around + longest + 1 + answer_tokens)
    found.begin("loading the model")
    session = formats.load(format_name).open_session(Path(variant), found.hardware.threads, room)
    try:
        found.add("loads", 1)
        same_tokens = _measure_parity(found, expected, session)
        if same_tokens:
            _measure_divergence(found, held_against, session)
        else:
            found.notes.append("divergence is left out: the predictions are about other tokens")
        if same_tokens or prompts:
            _measure_answers(found, expected, session, prompts, answer_tokens, held_against.tokens[0], room)
    finally:
        session.close()
    Path(out).write_bytes(canonical_json(found.document().model_dump(mode="json")))


class _Found:
    """What has been measured so far."""

    def __init__(self, hardware: HardwareClass, phase: Path) -> None:
        self.hardware = hardware
        self.notes: list[str] = []
        self._phase = phase
        self._measurements: list[Measurement] = []
        self._answers: list[Answer] = []

    def begin(self, doing: str) -> None:
        """Say what comes next, so that a crash can be told from another."""
        # Written over what was said before: ext4 puts a file that is emptied first on the disk at once, each time.
        descriptor = os.open(self._phase, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, doing.encode().ljust(PHASE_BYTES))
        finally:
            os.close(descriptor)

    def add(self, measure: str, value: float, trials: int = 1, spread: float = 0.0, statistic: Any = "exact") -> None:
        """Take a figure."""
        self._measurements.append(
            Measurement(
                measure=measure, value=value, trials=trials, spread=spread, statistic=statistic, hardware=self.hardware
            )
        )

    def add_parity(self, measure: str, found: parity.Parity) -> None:
        """Take the share that is equal, and the note on what is not."""
        self.add(measure, found.fraction, found.compared)
        self.notes += found.notes

    def answer(self, prompt: str, text: str, tokens: Sequence[int], stopped: bool) -> None:
        """Take an answer; what is no valid text becomes U+FFFD."""
        clean = text.encode("utf-8", "replace").decode()
        self._answers.append(Answer(prompt=prompt, text=clean, tokens=len(tokens), stopped=stopped))

    def document(self) -> Measurements:
        """Everything, as it is stored."""
        return Measurements(
            measurements=tuple(self._measurements), answers=tuple(self._answers), notes=tuple(self.notes)
        )

    @property
    def answers(self) -> Sequence[Answer]:
        """The answers taken."""
        return self._answers


def _measure_parity(found: _Found, expected: parity.Expectations, session: Session) -> bool:
    """Compare tokenizer, template and special tokens; whether both vocabularies have one size."""
    found.begin("tokenizing texts, where its tokenizer should do as the source's does")
    found.add_parity("tokenizer_parity", parity.tokenizer_parity(expected, session))
    found.begin("comparing the chat template")
    found.add_parity("template_parity", parity.template_parity(expected, session))
    found.begin("comparing the special tokens")
    special = parity.special_tokens_parity(expected.special_tokens, session.special_tokens)
    found.add_parity("special_tokens_parity", special)
    return session.vocabulary == expected.vocabulary


def _measure_divergence(found: _Found, reference: Reference, session: Session) -> None:
    """Compare the predictions on every window; leave the figures out if a logit is not finite."""
    found.begin("predicting the evaluation text")
    comparisons: list[Comparison] = []
    total, first = len(reference.tokens), reference.header.first
    progress(0, total, "windows")
    for index, window in enumerate(reference.tokens):
        logits = session.logits(window[:-1].tolist(), first)
        if not divergence.all_finite(logits):
            found.add("finite_logits", 0, trials=index + 1)
            share = 1 - float(np.isfinite(logits).mean())
            found.notes.append(
                f"divergence is left out: {share:.2%} of the logits of window {index + 1} are not finite"
            )
            return
        comparisons.append(divergence.compare(reference.windows[index], logits, reference.targets(index)))
        progress(index + 1, total, "windows")
    found.add("finite_logits", 1, trials=total)
    _summarize(found, comparisons)


def _summarize(found: _Found, comparisons: Sequence[Comparison]) -> None:
    divergences = np.stack([comparison.divergence for comparison in comparisons])
    surprisal = np.stack([comparison.surprisal for comparison in comparisons])
    excess = surprisal - np.stack([comparison.reference_surprisal for comparison in comparisons])
    agrees = np.stack([comparison.agrees for comparison in comparisons]).astype(np.float64)

    def add(measure: str, estimate: Estimate, statistic: str) -> None:
        found.add(measure, estimate.value, divergences.size, estimate.spread, statistic)

    add("kl_divergence", divergence.mean_by_window(divergences), "mean")
    tail = divergence.tail_by_window(divergences, np.stack([comparison.error for comparison in comparisons]), 0.99)
    if tail is None:
        found.notes.append("the 99th percentile is left out: the draw is too small to tell it; raise evaluation.sample")
    else:
        add("kl_divergence_p99", tail, "p99")
    add("top_1_agreement", divergence.mean_by_window(agrees), "mean")
    add("perplexity", _exponential(divergence.mean_by_window(surprisal)), "mean")
    add("perplexity_ratio", _exponential(divergence.mean_by_window(excess)), "ratio")


def _exponential(estimate: Estimate) -> Estimate:
    """The exponential of a mean; its standard error to first order."""
    value = math.exp(estimate.value)
    return Estimate(value, value * estimate.spread)


def _measure_answers(
    found: _Found,
    expected: parity.Expectations,
    session: Session,
    prompts: Sequence[str],
    limit: int,
    text: NDArray[np.int32],
    room: int,
) -> None:
    """Have every prompt answered greedily."""
    found.begin("answering the prompts")
    chat = bool(session.chat_template)
    asked = list(_prompts(found, expected, session, prompts, text))
    for prompt, tokens in asked:
        if len(tokens) + limit > room:
            found.notes.append(f"the prompt {prompt[:60]!r} takes {len(tokens)} tokens and was not asked")
            continue
        new = session.generate(tokens, limit)
        found.answer(prompt, session.detokenize(new), new, bool(new) and new[-1] in session.special_tokens.end)
    found.add("generates", sum(bool(answer.text.strip()) for answer in found.answers) / len(asked), len(asked))
    stopped = [answer for answer in found.answers if answer.stopped]
    if chat:
        found.add("stops", len(stopped) / len(asked), len(asked))
        for answer in found.answers:
            if not answer.stopped:
                found.notes.append(f"the answer to {answer.prompt[:60]!r} was cut at the limit of {limit} tokens")
    else:
        found.notes.append("there is no chat template, so plain prompts were continued and need not stop")


def _prompts(
    found: _Found,
    expected: parity.Expectations,
    session: Session,
    prompts: Sequence[str],
    text: NDArray[np.int32],
) -> Sequence[tuple[str, list[int]]]:
    """Each prompt with its tokens: as a chat where there is a template, otherwise as plain text to continue."""
    if not prompts:
        start = text[:PROMPT_TOKENS].tolist()
        return [(session.detokenize(start), start)]
    if not session.chat_template:
        return [(prompt, _begun(session, session.tokenize(prompt))) for prompt in prompts]
    try:
        rendered = parity.rendered_prompts(expected, session, prompts)
    except StageError as error:
        found.notes.append(str(error))
        rendered = ()
    texts = [item.text for item in rendered] or list(prompts)
    return [
        (prompt, _begun(session, session.tokenize(chat, special=True)))
        for prompt, chat in zip(prompts, texts, strict=True)
    ]


def _begun(session: Session, tokens: list[int]) -> list[int]:
    """The tokens with the beginning-of-sequence token first where the model wants one and the template gave none."""
    special = session.special_tokens
    if not special.adds_beginning or special.beginning is None or tokens[:1] == [special.beginning]:
        return tokens
    return [special.beginning, *tokens]


def _tools(module: formats.Format) -> tuple[Tool, ...]:
    """What predicts, and what the divergence is computed with."""
    from importlib.metadata import version

    found = {tool.name: tool for tool in module.tools("evaluate")}
    found["numpy"] = Tool(name="numpy", version=version("numpy"))
    return tuple(found.values())
