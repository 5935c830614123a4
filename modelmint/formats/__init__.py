"""The formats, one module each, behind two protocols.

A format is a module with the names of `Format`; it is listed in `FORMATS` and imported on first use. What it opens for
measuring is a `Session`. Nothing outside this folder branches on a format's name.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from modelmint.errors import RecipeError
from modelmint.spelling import did_you_mean

if TYPE_CHECKING:
    # Child processes import this package on their way to a tool, and what they load counts as the tool's memory.
    import numpy as np
    from numpy.typing import NDArray

    from modelmint.artifact import Tool
    from modelmint.recipe import Variant
    from modelmint.report import Value
    from modelmint.sandbox import Sandbox
    from modelmint.step import Work

FORMATS = {
    "gguf": "modelmint.formats.gguf.format",
    "fake": "modelmint.formats.fake",
}
"""Module of each format."""


@dataclass(frozen=True)
class QuantizationType:
    """A quantization type of a format.

    Attributes:
        name: as the format's users type it.
        bits: nominal bits per weight, for predictions and ordering.
        summary: one line for lists and forms.
        needs_calibration: whether it cannot be made without an importance matrix.
    """

    name: str
    bits: float
    summary: str
    needs_calibration: bool = False


@dataclass(frozen=True)
class TensorShape:
    """One weight of a checkpoint, from its file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens; None where the model has none.

    `end` holds every id that ends an answer. `adds_beginning` says whether the tokenizer puts `beginning` first.
    """

    beginning: int | None
    end: tuple[int, ...]
    adds_beginning: bool


@dataclass(frozen=True)
class Speed:
    """One benchmark trial; seconds, and tokens per second."""

    load_seconds: float
    first_token_seconds: float
    prefill_rate: float
    decode_rate: float


class Tokenizer(Protocol):
    """Text to token ids and back, as one format or the source does it."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids: rows of the embedding."""
        ...

    @property
    def special_tokens(self) -> SpecialTokens:
        """The ids that begin and end."""
        ...

    @property
    def chat_template(self) -> str:
        """The Jinja text of the chat template; empty if there is none."""
        ...

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; nothing is put before or after it.

        Args:
            text: any text.
            special: whether the spellings of special tokens in the text become those tokens (for rendered chats).
        """
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        ...


class Session(Tokenizer, Protocol):
    """A loaded model that can be measured. Lives in a child process where its format is native."""

    def logits(self, tokens: Sequence[int], first: int = 0) -> "NDArray[np.float32]":
        """Logits after each token of a fresh context, from position `first` on.

        Args:
            tokens: token ids, the beginning-of-sequence token included where the model wants one.
            first: the first position that is asked for; tools save work on those before.

        Returns:
            Shape (len(tokens) - first, vocabulary), float32; row i is the prediction after tokens[first + i].
        """
        ...

    def generate(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Continue greedily from a fresh context until a token in `special_tokens.end` or `limit` tokens.

        Returns:
            The new tokens; the last one is an end token if and only if the end was reached.
        """
        ...

    def speed(self, prompt: Sequence[int], generate: int) -> Speed:
        """Time one trial: warm up, prefill `prompt`, then decode `generate` tokens, one by one.

        `load_seconds` is what opening this session took.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class Format(Protocol):
    """What a format's module offers."""

    NAME: str
    """The name in `FORMATS`."""

    TITLE: str
    """The name for people, such as ``GGUF``."""

    STAGE_VERSION: int
    """Raised whenever the module starts to give other bytes, or its sessions other figures, for the same inputs."""

    NATIVE: bool
    """Whether sessions run native code, so that they belong in a child process."""

    VariantOptions: "type[Value]"
    """A variant's options, typed; unknown keys are refused."""

    BaseOptions: "type[Value]"
    """Options of the unquantized base, typed."""

    def types(self) -> Mapping[str, QuantizationType]:
        """Every quantization type by its usual name."""
        ...

    def tools(self, stage: str = "convert") -> "tuple[Tool, ...]":
        """The identities of all tools that can change the output of a stage.

        Args:
            stage: ``convert``, which may use more tools than the others; ``quantize``, ``evaluate`` or ``benchmark``.

        Raises:
            UnsupportedError: if a tool is not installed; the message says how to install it.
        """
        ...

    def check(self, variant: "Variant") -> None:
        """Refuse a variant that cannot be made: unknown type or option, calibration needed.

        Raises:
            RecipeError: says which and, for a name, what was meant.
        """
        ...

    def base_type(self, options: Mapping[str, Any]) -> str:
        """The type of the unquantized base that these base options ask for, such as ``f16``."""
        ...

    def parameters(self, variant: "Variant") -> dict[str, Any]:
        """The options of a variant in full, defaults filled in: what goes into the step's key."""
        ...

    def refuse_unsupported(self, snapshot: Path) -> None:
        """Refuse a checkpoint that the converter will not take, from its small files alone.

        Args:
            snapshot: a folder with at least config.json and the tokenizer's files.

        Raises:
            UnsupportedError: names the architecture or the pre-tokenizer, and the way out.
        """
        ...

    def predict_size(self, tensors: Sequence[TensorShape], variant: "Variant") -> int:
        """Predicted bytes of a variant's files, from the checkpoint's tensor shapes."""
        ...

    def convert(self, source: Path, out: Path, options: Mapping[str, Any], sandbox: "Sandbox") -> "Work":
        """Write the unquantized base of the checkpoint in `source` into the folder `out`.

        Raises:
            ToolError: if the converter failed or its output is not whole.
        """
        ...

    def quantize(self, base: Path, out: Path, variant: "Variant", sandbox: "Sandbox") -> "Work":
        """Write a variant of the base in the folder `base` into the folder `out`.

        Returns:
            With measurements ``bits_per_weight`` and ``fallback_tensors``, and a note for each kind of fallback.

        Raises:
            ToolError: if the quantizer failed or its output is not whole.
        """
        ...

    def open_session(self, folder: Path, threads: int, context: int) -> Session:
        """Load a variant or base for measuring, with room for `context` tokens."""
        ...

    def file_name(self, model: str, type_name: str, label: str, path: str) -> str:
        """The user-facing name of one file of a variant, such as ``SmolLM2-135M-Q4_K_M.gguf``."""
        ...


def load(name: str) -> Format:
    """The format of that name.

    Raises:
        RecipeError: if there is none.
    """
    if name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}{did_you_mean(name, FORMATS)}")
    return cast(Format, importlib.import_module(FORMATS[name]))
