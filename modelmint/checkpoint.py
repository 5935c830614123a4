"""The source checkpoint under PyTorch, as a session like any format's, and its own tokenizer.

Both follow the checkpoint's files to the letter: nothing is downloaded and no code of the checkpoint is run.
"""

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from modelmint.artifact import Tool
from modelmint.errors import UnsupportedError
from modelmint.formats import Session, SpecialTokens, Speed
from modelmint.parity import SourceTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OTHER_KINDS = {"fake": ("modelmint.formats.fake_model", "FakeTokenizer", "FakeSession")}
"""Checkpoints that are not PyTorch's, by ``model_type``: module and classes of tokenizer and session, none native."""


class SourceSession(Session, SourceTokenizer, Protocol):
    """A session that is also the source's tokenizer."""


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this config.json is opened by native code, which belongs in a child process."""
    return config.get("model_type") not in OTHER_KINDS


def tools(config: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The identities of what computes the logits and the tokens of a checkpoint with this config.json."""
    names = ("torch", "transformers", "tokenizers", "numpy") if is_native(config) else ("numpy",)
    return tuple(Tool(name=name, version=version(name)) for name in names)


def open_tokenizer(folder: Path) -> SourceTokenizer:
    """The tokenizer of a checkpoint, from its small files alone.

    Raises:
        UnsupportedError: if the folder has none that can be opened.
    """
    other = _other_kind(folder, tokenizer_only=True)
    return CheckpointTokenizer(folder) if other is None else cast(SourceTokenizer, other)


def open_source(folder: Path, dtype: str, threads: int) -> SourceSession:
    """Load a checkpoint for measuring.

    Args:
        folder: with configuration, tokenizer and safetensors weights.
        dtype: ``float32``, or ``bfloat16`` where memory is short; logits are float32 in either case.
        threads: for PyTorch.

    Raises:
        UnsupportedError: if transformers does not know the architecture or cannot open the files.
    """
    other = _other_kind(folder, tokenizer_only=False)
    return CheckpointSession(folder, dtype, threads) if other is None else cast(SourceSession, other)


def _other_kind(folder: Path, *, tokenizer_only: bool) -> object | None:
    kind = _json(folder / "config.json").get("model_type")
    if kind not in OTHER_KINDS:
        return None
    module, tokenizer, session = OTHER_KINDS[kind]
    opened: object = getattr(importlib.import_module(module), tokenizer if tokenizer_only else session)(folder)
    return opened


class CheckpointTokenizer:
    """The tokenizer of a checkpoint by the `tokenizers` library, which transformers uses too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _json(folder / "config.json")
        self._options = _json(folder / "tokenizer_config.json")
        self._backend = _backend(folder)

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding, which can be more than the tokens that have a spelling."""
        text = self._config.get("text_config") or self._config
        return int(text.get("vocab_size") or self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Every end that the configuration, the generation configuration or the tokenizer names."""
        beginning = self._id("bos_token")
        ends = {self._id("eos_token")}
        for settings in (self._config, _json(self._folder / "generation_config.json")):
            named = settings.get("eos_token_id")
            ends |= set(named) if isinstance(named, list) else {named}
        adds = self._options.get("add_bos_token")
        if not isinstance(adds, bool):
            # Without a word from the configuration, the tokenizer's own post-processor decides.
            adds = self._backend.encode("a", add_special_tokens=True).ids[:1] == [beginning]
        end = tuple(sorted(token for token in ends if isinstance(token, int)))
        return SpecialTokens(beginning, end, adds and beginning is not None)

    @cached_property
    def chat_template(self) -> str:
        """The text of ``chat_template.jinja`` or of the tokenizer's configuration; of several the default one."""
        path = self._folder / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        template = self._options.get("chat_template") or ""
        if isinstance(template, list):
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), "")
        return str(template)

    @cached_property
    def template_variables(self) -> dict[str, str]:
        """``bos_token`` and its like, as the tokenizer's configuration spells them."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        return {name: spelling for name in names if (spelling := self._spelling(name))}

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text."""
        self._backend.encode_special_tokens = not special
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def _spelling(self, name: str) -> str:
        named = self._options.get(name) or _json(self._folder / "special_tokens_map.json").get(name) or ""
        return str(named.get("content", "") if isinstance(named, dict) else named)

    def _id(self, name: str) -> int | None:
        spelling = self._spelling(name)
        return self._backend.token_to_id(spelling) if spelling else None


class CheckpointSession(CheckpointTokenizer):
    """A checkpoint under PyTorch."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        super().__init__(folder)
        started = time.perf_counter()
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                # One way to compute attention for every machine; the fused kernels are chosen by shape and hardware.
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).eval()
        except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
            reason, _, _ = str(error).partition("\n")
            raise UnsupportedError(
                f"transformers {transformers.__version__} cannot open the source checkpoint: {reason}; "
                "where a format can, write 'reference: base' under evaluation"
            ) from error
        self._torch = torch
        self._load_seconds = time.perf_counter() - started

    def logits(self, tokens: Sequence[int], first: int = 0) -> "NDArray[np.float32]":
        """Logits after each token from position `first` on."""
        with self._torch.inference_mode():
            output = self._model(
                input_ids=self._torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=len(tokens) - first
            )
            result: NDArray[np.float32] = output.logits[0].float().numpy()
        return result

    def generate(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Continue greedily."""
        best, past = self._next(tokens, None)
        new = [best]
        while len(new) < limit and best not in self.special_tokens.end:
            best, past = self._next([best], past)
            new.append(best)
        return new

    def speed(self, prompt: Sequence[int], generate: int) -> Speed:
        """Time one trial."""
        self._next(prompt[:8], None)
        started = time.perf_counter()
        best, past = self._next(prompt, None)
        first = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(generate):
            best, past = self._next([best], past)
        return Speed(self._load_seconds, first, len(prompt) / first, generate / (time.perf_counter() - started))

    def close(self) -> None:
        """Free the weights."""
        del self._model

    def _next(self, tokens: Sequence[int], past: Any) -> tuple[int, Any]:
        """The best next token, and the cache that now holds `tokens` too."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)])
            output = self._model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            return int(output.logits[0, -1].argmax()), output.past_key_values


def _backend(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint; transformers converts older files, which takes seconds."""
    try:
        if (folder / "tokenizer.json").exists():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # the library raises no narrower class for a damaged file
        raise UnsupportedError(
            f"the source's tokenizer cannot be opened: {error}; save it again with transformers as tokenizer.json"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """A small JSON object of the checkpoint; empty if the file is not there.

    Raises:
        UnsupportedError: if it is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedError(f"{path.name} of the source is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedError(f"{path.name} of the source is not a JSON object")
    return value
