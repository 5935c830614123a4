"""llama.cpp's own tokenizer, from the vocabulary inside a GGUF file."""

import ctypes
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from modelmint.errors import ToolError
from modelmint.formats.gguf import library

FILE = "model.gguf"
"""The name of the one file of a base or variant; the user-facing name is given at export."""


def load_model(path: Path, log: library.Log, *, vocabulary_only: bool = False) -> Any:
    """Load a model, its weights mapped from the file.

    Args:
        path: the file.
        log: takes what llama.cpp says; its errors explain a refusal.
        vocabulary_only: leave the weights alone.

    Raises:
        ToolError: if llama.cpp refuses the file.
    """
    llama = library.load()
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = vocabulary_only
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    if model is None:
        raise ToolError(f"llama.cpp refuses {path.name}: {log.reason}")
    return model


class Vocabulary:
    """The tokenizer of a loaded model; meets the protocol `Tokenizer` but for the special tokens' type.

    Args:
        model: from `load_model`; must outlive this.
    """

    def __init__(self, model: Any) -> None:
        self._llama = library.load()
        self._model = model
        self._vocabulary = self._llama.llama_model_get_vocab(model)
        self.vocabulary: int = self._llama.llama_vocab_n_tokens(self._vocabulary)

    @property
    def beginning(self) -> int | None:
        """The beginning-of-sequence token."""
        token: int = self._llama.llama_vocab_bos(self._vocabulary)
        return token if token >= 0 else None

    @property
    def adds_beginning(self) -> bool:
        """Whether the tokenizer puts it first."""
        return bool(self._llama.llama_vocab_get_add_bos(self._vocabulary))

    @cached_property
    def end(self) -> tuple[int, ...]:
        """Every token that ends an answer."""
        ends = self._llama.llama_vocab_is_eog
        return tuple(token for token in range(self.vocabulary) if ends(self._vocabulary, token))

    @cached_property
    def chat_template(self) -> str:
        """The Jinja text of the chat template; empty if there is none."""
        template = self._llama.llama_model_chat_template(self._model, None)
        return template.decode() if template else ""

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer.tokenize`."""
        data = text.encode()
        room = len(data) + 16
        while True:
            tokens = (self._llama.llama_token * room)()
            count = self._llama.llama_tokenize(self._vocabulary, data, len(data), tokens, room, False, special)
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids; see `Tokenizer.detokenize`."""
        ids = (self._llama.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 16
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._llama.llama_detokenize(self._vocabulary, ids, len(tokens), text, room, False, False)
            if count >= 0:
                return text.raw[:count].decode(errors="replace")
            room = -count
