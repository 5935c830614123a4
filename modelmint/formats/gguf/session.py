"""A GGUF file under llama.cpp, measured: logits, greedy answers, speed.

It is set up as llama-bench sets a model up by default (weights mapped, logical batch 2048, physical batch 512,
attention and key-value cache as the library chooses), so that the figures can be held against that tool's.
"""

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelmint.errors import ToolError
from modelmint.formats import SpecialTokens, Speed
from modelmint.formats.gguf import library
from modelmint.formats.gguf.vocabulary import FILE, Vocabulary, load_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 2048
PHYSICAL_BATCH = 512
SEED = 1


class GgufSession:
    """A loaded model; meets the protocol `Session`.

    Native code aborts the process on some damaged files: this belongs in a child process.

    Args:
        folder: of a base or variant.
        threads: what llama.cpp may use.
        context: room for so many tokens.

    Raises:
        ToolError: if llama.cpp refuses the file.
    """

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        self._llama = library.load()
        self._log = library.Log()
        self._model = self._context = None
        started = time.perf_counter()
        self._model = load_model(folder / FILE, self._log)
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = BATCH
        parameters.n_ubatch = PHYSICAL_BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = self._llama.llama_init_from_model(self._model, parameters)
        if self._context is None:
            raise ToolError(f"llama.cpp cannot open a context of {context} tokens: {self._log.reason}")
        self._load_seconds = time.perf_counter() - started
        # The library may round the context up, and cuts the batch to it.
        self._room: int = self._llama.llama_n_ctx(self._context)
        self._step: int = self._llama.llama_n_batch(self._context)
        self._text = Vocabulary(self._model)
        self._batch = self._llama.llama_batch_init(BATCH, 0, 1)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._text.vocabulary

    @property
    def special_tokens(self) -> SpecialTokens:
        """The ids that begin and end."""
        return SpecialTokens(self._text.beginning, self._text.end, self._text.adds_beginning)

    @property
    def chat_template(self) -> str:
        """The Jinja text of the chat template; empty if there is none."""
        return self._text.chat_template

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer.tokenize`."""
        return self._text.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._text.detokenize(tokens)

    def logits(self, tokens: Sequence[int], first: int = 0) -> "NDArray[np.float32]":
        """Logits after each token of a fresh context, from position `first` on; see `Session.logits`."""
        self._clear()
        rows = np.empty((len(tokens) - first, self.vocabulary), dtype=np.float32)
        filled = 0
        for start in range(0, len(tokens), self._step):
            part = tokens[start : start + self._step]
            wanted = sum(start + index >= first for index in range(len(part)))
            self._decode(part, start, first=max(first - start, 0))
            if wanted:
                # The library keeps the logits of one call side by side, in the order of the positions asked for.
                found = self._llama.llama_get_logits(self._context)
                rows[filled : filled + wanted] = np.ctypeslib.as_array(found, (wanted, self.vocabulary))
                filled += wanted
        return rows

    def generate(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Continue greedily from a fresh context; see `Session.generate`."""
        self._clear()
        self._prefill(tokens)
        end = frozenset(self._text.end)
        answer: list[int] = []
        while len(answer) < limit:
            token = self._best()
            answer.append(token)
            if token in end or len(answer) == limit:
                break
            self._decode([token], len(tokens) + len(answer) - 1)
        return answer

    def speed(self, prompt: Sequence[int], generate: int) -> Speed:
        """Time one trial; see `Session.speed`.

        As llama-bench does it, decoding starts from an empty context and is fed with arbitrary tokens: what they are
        does not change the work.
        """
        random = np.random.default_rng(SEED)
        arbitrary = [int(token) for token in random.integers(self.vocabulary, size=generate)]
        self._clear()
        self._prefill(prompt)
        self._decode(arbitrary[:1], len(prompt))
        self._synchronize()

        self._clear()
        started = time.perf_counter()
        self._prefill(prompt)
        self._synchronize()
        prefilled = time.perf_counter()
        self._best()
        first_token = time.perf_counter()

        self._clear()
        decoding = time.perf_counter()
        for position, token in enumerate(arbitrary):
            self._decode([token], position)
            self._synchronize()
        decoded = time.perf_counter()
        return Speed(
            load_seconds=self._load_seconds,
            first_token_seconds=first_token - started,
            prefill_rate=len(prompt) / (prefilled - started),
            decode_rate=generate / (decoded - decoding),
        )

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        if self._context is not None:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._llama.llama_model_free(self._model)
            self._model = None

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)

    def _synchronize(self) -> None:
        self._llama.llama_synchronize(self._context)

    def _prefill(self, tokens: Sequence[int]) -> None:
        """Decode a prompt into an empty context; only the logits after its last token are computed."""
        for start in range(0, len(tokens), self._step):
            part = tokens[start : start + self._step]
            self._decode(part, start, first=len(part) - 1)

    def _decode(self, tokens: Sequence[int], position: int, first: int = 0) -> None:
        """Decode tokens at the positions from `position` on; logits from index `first` on."""
        if position + len(tokens) > self._room:
            raise ToolError(
                f"{position + len(tokens)} tokens do not fit into the context of {self._room} opened for them"
            )
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= first
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise ToolError(
                f"llama.cpp could not decode {len(tokens)} tokens at position {position} (status {status}): "
                f"{self._log.reason}"
            )

    def _best(self) -> int:
        """The most probable token after the last position decoded."""
        found = self._llama.llama_get_logits_ith(self._context, -1)
        return int(
            np.argmax(np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)))
        )
