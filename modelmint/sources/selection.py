"""Which files of a checkpoint are needed: configuration, tokenizer, safetensors weights, card and licence.

Never taken: the same weights in other forms (pickles, GGUF, ONNX), code, and whatever else a repository holds.
"""

import re
from collections.abc import Iterable

from modelmint.errors import SourceError, UnsupportedError

INDEX = "model.safetensors.index.json"

_SMALL = re.compile(
    r"""
    config\.json | generation_config\.json | quantize_config\.json | quant_config\.json | hf_quant_config\.json
    | adapter_config\.json
    | tokenizer\.json | tokenizer_config\.json | special_tokens_map\.json | added_tokens\.json
    | vocab\.(json|txt) | merges\.txt | tekken\.json | [^/]+\.tiktoken
    | [^/]*(tokenizer|spiece|sentencepiece|bpe)[^/]*\.model
    | chat_template\.(jinja|json) | additional_chat_templates/[^/]+\.jinja
    | (README|LICENSE|LICENCE|NOTICE|USE_POLICY|COPYING)([.-][^/]*)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-\d{5,6}\.safetensors")
# Weights of something else than the model, or the same weights once more in the layout of another program.
_OTHER_WEIGHTS = re.compile(r"(adapter_|consolidated|training|optimizer|rng_)")
_PICKLES = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle|th|mar)$", re.IGNORECASE)


def needed(paths: Iterable[str], source: object) -> tuple[str, ...]:
    """The paths to acquire, sorted.

    Args:
        paths: every path of the source.
        source: its name for messages.

    Raises:
        SourceError: if there is no config.json or no weights at all; names what is there instead.
        UnsupportedError: if the weights are there, but in no form that is read.
    """
    every = sorted(set(paths))
    if "config.json" not in every:
        nested = [path for path in every if path.endswith("/config.json")]
        hint = f"; there is one in {nested[0].rpartition('/')[0]!r}: is that the checkpoint?" if nested else ""
        raise SourceError(f"{source} is no checkpoint: it has no config.json{hint or _instead(every)}")
    if "adapter_config.json" in every and not any(_SHARD.fullmatch(path) or path == _SINGLE for path in every):
        raise UnsupportedError(
            f"{source} is an adapter, not a model: merge it into its base model (merge_and_unload of peft) and use that"
        )
    weights = _weights(every)
    if not weights:
        raise UnsupportedError(f"{source} has no safetensors weights{_instead(every)}")
    small = [path for path in every if _SMALL.fullmatch(path)]
    index = [INDEX] if INDEX in every and weights != [_SINGLE] else []
    return tuple(sorted({*small, *weights, *index}))


def _weights(paths: list[str]) -> list[str]:
    """One complete set of weights; transformers prefers them in this order too."""
    if _SINGLE in paths:
        return [_SINGLE]
    top = [path for path in paths if "/" not in path and path.endswith(".safetensors")]
    shards = [path for path in top if _SHARD.fullmatch(path)]
    return shards or [path for path in top if not _OTHER_WEIGHTS.match(path)]


def _instead(paths: list[str]) -> str:
    """What a source has in place of what is missing, and the way out."""
    gguf = [path for path in paths if path.lower().endswith(".gguf")]
    if gguf:
        return f", only GGUF such as {gguf[0]}: a variant is made from the original checkpoint; name that one"
    pickles = [path for path in paths if _PICKLES.search(path)]
    if pickles:
        return (
            f", only pickles such as {pickles[0]}, which can run code when they are opened: "
            "name a revision or a repository that has safetensors"
        )
    some = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "") if paths else "nothing"
    return f"; it has {some}"
