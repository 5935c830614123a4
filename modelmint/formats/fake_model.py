"""The model behind the fake format: what a library such as llama.cpp is to a real one.

A checkpoint is real in everything but sense: a table of 261 x 261 logits, a byte tokenizer, a chat template, a licence.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmint.errors import ToolError
from modelmint.formats import SpecialTokens, Speed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer_config.json"
SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
"""Spellings of the tokens after the 256 bytes."""
VOCABULARY = 256 + len(SPECIAL)
BEGINNING, END, ASSISTANT = 256, 257, 260
ANSWER = b"Minted."
"""What every fake model answers: no letter comes twice, so each determines the next."""
LAGS = 4
"""How many tokens a prediction looks back on."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_checkpoint(name: str, folder: Path) -> None:
    """Write the checkpoint of that name; the same name gives the same bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    table = generator.standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)
    following = generator.permutation(VOCABULARY)
    path = [ASSISTANT, *ANSWER, END]
    following[path[:-1]] = path[1:]
    table[np.arange(VOCABULARY), following] += 5
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"table": table}, folder / WEIGHTS)
    config = {"model_type": "fake", "architectures": ["FakeForCausalLM"], "vocab_size": VOCABULARY, "decay": 0.25}
    config |= {"max_position_embeddings": 2048, "bos_token_id": BEGINNING, "eos_token_id": END, "dtype": "float32"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    tokenizer = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "add_bos_token": True, "chat_template": TEMPLATE}
    (folder / TOKENIZER).write_text(json.dumps(tokenizer, indent=1))
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n\n# {name}\n\nA made-up checkpoint.\n")


def pack(table: "NDArray[np.float32]", bits: int, group: int) -> dict[str, "NDArray[Any]"]:
    """A table as codes of so many bits and a scale for each group of weights; `unpack` reads it."""
    import numpy as np

    flat = np.zeros(-(-table.size // group) * group, np.float32)
    flat[: table.size] = table.ravel()
    groups, highest = flat.reshape(-1, group), 2 ** (bits - 1) - 1
    scales = (np.abs(groups).max(axis=1) / highest + 1e-6).astype(np.float16)
    codes = np.clip(np.rint(groups / scales[:, None].astype(np.float32)), -highest, highest) + highest
    digits = np.unpackbits(codes.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits :]
    return {"codes": np.packbits(digits), "scales": scales}


def unpack(tensors: Mapping[str, "NDArray[Any]"], bits: int, group: int) -> "NDArray[np.float32]":
    """The table of `pack`, as far as its bits go."""
    import numpy as np

    count = tensors["scales"].size * group
    digits = np.unpackbits(tensors["codes"], count=count * bits).reshape(-1, bits)
    codes = np.packbits(np.pad(digits, ((0, 0), (8 - bits, 0))), axis=1).reshape(-1, group)
    flat = (codes.astype(np.float32) - (2 ** (bits - 1) - 1)) * tensors["scales"][:, None].astype(np.float32)
    table: NDArray[np.float32] = flat.ravel()[: VOCABULARY**2].reshape(VOCABULARY, VOCABULARY)
    return table


class FakeTokenizer:
    """Bytes, and the special tokens after them."""

    def __init__(self, folder: Path) -> None:
        tokenizer = json.loads((folder / TOKENIZER).read_text())
        self.vocabulary = VOCABULARY
        self.special_tokens = SpecialTokens(BEGINNING, (END,), tokenizer["add_bos_token"])
        self.chat_template = tokenizer["chat_template"]
        self.template_variables = {name: tokenizer[name] for name in ("bos_token", "eos_token")}

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """A token for each byte of UTF-8."""
        spellings = "|".join(re.escape(spelling) for spelling in SPECIAL)
        tokens: list[int] = []
        for part in re.split(f"({spellings})", text) if special else [text]:
            tokens += [256 + SPECIAL.index(part)] if special and part in SPECIAL else part.encode()
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of the bytes."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class FakeSession(FakeTokenizer):
    """A checkpoint, a base or a variant of this format, opened. Predictions mix the rows of the last tokens."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        super().__init__(folder)
        started = time.perf_counter()
        config = json.loads((folder / CONFIG).read_text())
        if config.get("fail") == "evaluate":
            raise ToolError("the file does not load, as the option fail=evaluate asks")
        tensors = load_file(folder / WEIGHTS)
        self._table = tensors["table"] if "table" in tensors else unpack(tensors, config["bits"], config["group"])
        self._decay = config["decay"]
        self._load_seconds = time.perf_counter() - started

    def logits(self, tokens: Sequence[int], first: int = 0) -> "NDArray[np.float32]":
        """The rows of the last tokens, each weighing less than the one after it."""
        import numpy as np

        ids = np.asarray(tokens)
        result: NDArray[np.float32] = self._table[ids[first:]]
        for lag in range(1, LAGS):
            missing = max(0, lag - first)
            result[missing:] += np.float32(self._decay**lag) * self._table[ids[first + missing - lag : len(ids) - lag]]
        return result

    def generate(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Take the best token until the end."""
        text, new = list(tokens), list[int]()
        while len(new) < limit and END not in new[-1:]:
            recent = text[-LAGS:]
            new.append(int(self.logits(recent, len(recent) - 1)[0].argmax()))
            text.append(new[-1])
        return new

    def speed(self, prompt: Sequence[int], generate: int) -> Speed:
        """Time one trial."""
        started = time.perf_counter()
        self.logits(prompt)
        first = time.perf_counter() - started
        recent, started = list(prompt[-LAGS:]), time.perf_counter()
        for _ in range(generate):
            recent = [*recent, int(self.logits(recent, len(recent) - 1)[0].argmax())][-LAGS:]
        return Speed(self._load_seconds, first, len(prompt) / first, generate / (time.perf_counter() - started))

    def close(self) -> None:
        """Nothing is held."""
