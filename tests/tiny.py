"""Tiny random checkpoints of real architectures, with a tokenizer trained on the spot: everything a converter asks for.

Width 256, so that no quantization type has to fall back. The weights are spread more widely than fresh ones usually
are, so that the next-token distributions are far from uniform and quantization shows.
"""

import functools
import io
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelmint.formats import TensorShape

VOCABULARY = 640
USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CARD = "---\nlicense: apache-2.0\n---\nRandom weights, made by a test.\n"

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True, "head_dim": 64}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"tie_word_embeddings": True, "original_max_position_embeddings": 1024}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 64, "sliding_window": 512, "query_pre_attn_scalar": 64, "bos_token_id": 2, "eos_token_id": 1},
    ),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def checkpoint(folder: Path, architecture: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Write a random checkpoint with tokenizer, chat template and card into `folder`, and return the folder.

    Args:
        folder: made if need be.
        architecture: llama, qwen3, phi3 or gemma3 (its text model).
        seed: of the weights.
        **config: replaces values of the configuration, such as ``hidden_size=192``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = json.dumps(config, sort_keys=True)
    shutil.copytree(_made(architecture, seed, key), folder, dirs_exist_ok=True)
    return folder


def shapes(folder: Path) -> list["TensorShape"]:
    """The weights of a checkpoint, from its file's header."""
    from modelmint.formats import TensorShape

    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return [
        TensorShape(name, tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


@functools.cache
def _made(architecture: str, seed: int, config: str) -> Path:
    """A checkpoint is made once per session and copied from then on."""
    import torch
    import transformers

    folder = Path(tempfile.mkdtemp(prefix=f"{architecture}-", dir=_scratch()))
    config_class, model_class, special = _ARCHITECTURES[architecture]
    settings = {**_COMMON, **special, **json.loads(config)}
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in _tokenizer(architecture == "gemma3").iterdir():
        shutil.copy(path, folder)
    (folder / "README.md").write_text(CARD)
    return folder


@functools.cache
def _tokenizer(gemma: bool) -> Path:
    """Tokenizer files as real checkpoints ship them: the SentencePiece model, and the same as a tokenizers pipeline.

    transformers only turns pieces into vocabulary and merges; its own Llama class puts no space before a text that
    begins with one, unlike SentencePiece and llama.cpp.
    """
    import transformers

    folder = Path(tempfile.mkdtemp(prefix="tokenizer-", dir=_scratch()))
    (folder / "tokenizer.model").write_bytes(_sentencepiece(gemma))
    bos, eos = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    made = (transformers.GemmaTokenizer if gemma else transformers.LlamaTokenizer).from_pretrained(folder)
    pipeline = json.loads(made.backend_tokenizer.to_str())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    body = {"Sequence": {"id": "A", "type_id": 0}}
    pipeline |= {
        "added_tokens": [token for token in pipeline["added_tokens"] if token["id"] < VOCABULARY],
        "normalizer": spaces if gemma else {"type": "Sequence", "normalizers": [prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, body],
            "pair": [first, body, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [2 if gemma else 1], "tokens": [bos]}},
        },
    }
    config = {
        "add_bos_token": True,
        "bos_token": bos,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": 1_000_000,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    for name, content in (("tokenizer.json", pipeline), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


@functools.cache
def _sentencepiece(gemma: bool) -> bytes:
    from pydoc_data.topics import topics

    import sentencepiece

    lines = [line.strip() for text in topics.values() for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    special = (
        {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"}
        if gemma
        else {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:4000]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        add_dummy_prefix=not gemma,
        control_symbols=[USER, ASSISTANT],
        num_threads=1,
        minloglevel=2,
        **special,
    )
    return model.getvalue()


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
