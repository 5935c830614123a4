"""Whether the converter will take a checkpoint, from its small files alone: minutes before it would say so itself.

The converter knows a byte-level BPE tokenizer by the hash of the ids it gives for one test text, and refuses every
other one, because llama.cpp splits text by rules that are written out in its source.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from modelmint.errors import SourceError, UnsupportedError
from modelmint.formats.gguf import converter
from modelmint.spelling import did_you_mean

TOP_LEVEL_FIRST = frozenset(
    (
        "StepVLForConditionalGeneration",
        "Sarashina2VisionForCausalLM",
        "Exaone4_5_ForConditionalGeneration",
        "Step3p7ForConditionalGeneration",
        "KimiK3ForConditionalGeneration",
    )
)
"""Architectures that the converter does not look up in their text configuration."""


def refuse_unsupported(snapshot: Path) -> None:
    """Refuse a checkpoint whose architecture or pre-tokenizer the converter does not know.

    Args:
        snapshot: a folder with at least config.json and the tokenizer's files.

    Raises:
        UnsupportedError: names the architecture or the hash, and the way out.
        SourceError: if a file that must be there is missing or is no JSON.
    """
    converter.source()
    config = _json(snapshot / "config.json")
    architecture = _architecture(config)
    known = converter.architectures()
    if architecture not in known:
        raise UnsupportedError(
            f"llama.cpp's converter does not know the architecture {architecture!r} (model_type "
            f"{config.get('model_type', 'not given')}){did_you_mean(architecture, known)}. Take another format, or a "
            "newer llama-cpp-python when it supports this architecture"
        )
    tokenizer = snapshot / "tokenizer.json"
    if tokenizer.is_file() and _recognized_by_hash(snapshot, _json(tokenizer)):
        _refuse_unknown_pre_tokenizer(snapshot, config)


def _architecture(config: dict[str, Any]) -> str:
    """The architecture that the converter goes by: the text model's where the configuration holds several."""
    named = (config.get("architectures") or [""])[0]
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("architectures") and named not in TOP_LEVEL_FIRST:
        named = text["architectures"][0]
    if not named:
        raise UnsupportedError(
            'config.json names no architecture; add "architectures", such as ["LlamaForCausalLM"], to the checkpoint'
        )
    return str(named)


def _recognized_by_hash(snapshot: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether the converter needs the hash: for byte-level BPE, not for what comes with a SentencePiece model."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        return False
    return not (snapshot / "tokenizer.model").is_file() or _tokenizer_class(snapshot) == "GPT2Tokenizer"


def _refuse_unknown_pre_tokenizer(snapshot: Path, config: dict[str, Any]) -> None:
    known = converter.pre_tokenizers()
    found = _hash_of_file(snapshot / "tokenizer.json", known.text)
    if found in known.names:
        return
    # The converter asks transformers, which for some tokenizer classes builds another pipeline than the file's.
    found = _hash_by_transformers(snapshot, known.text)
    if found not in known.names:
        raise UnsupportedError(
            f"llama.cpp's converter does not recognize the pre-tokenizer: its test text gives the hash {found} "
            f"(tokenizer_class {_tokenizer_class(snapshot) or 'not given'}, model_type "
            f"{config.get('model_type', 'not given')}). If the tokenizer was changed in fine-tuning, put the original "
            "model's tokenizer files back; otherwise take another format, or a newer llama-cpp-python"
        )


def _hash_of_file(path: Path, text: str) -> str:
    from tokenizers import Tokenizer

    # The library raises bare Exception for a file that it cannot read.
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise SourceError(f"{path.name} is no tokenizer that the tokenizers library can read: {error}") from error
    return _hash(tokenizer.encode(text).ids)


def _hash_by_transformers(snapshot: Path, text: str) -> str:
    from transformers import AutoTokenizer

    return _hash(AutoTokenizer.from_pretrained(snapshot, trust_remote_code=False, local_files_only=True).encode(text))


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(str(ids).encode()).hexdigest()


def _tokenizer_class(snapshot: Path) -> str:
    path = snapshot / "tokenizer_config.json"
    return str(_json(path).get("tokenizer_class") or "") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"the checkpoint has no {path.name}; is {path.parent.name} a Hugging Face checkpoint?"
        ) from None
    except ValueError as error:
        raise SourceError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path.name} holds {type(content).__name__}, not a JSON object")
    return content
