"""Examines a checkpoint's folder: safety, facts, weights. Runs in a child process, for the bytes are foreign."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from modelmint.card import front_matter, license_of
from modelmint.errors import SourceError, UnsafeSourceError, UnsupportedError
from modelmint.finite import refuse_not_finite
from modelmint.formats import TensorShape
from modelmint.inspection import Inspection
from modelmint.quantized import signs
from modelmint.safetensors_header import TensorEntry, read_header
from modelmint.safety import check_file, read_json
from modelmint.sources.selection import INDEX
from modelmint.vocabulary import judge_vocabulary, read_vocabulary

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
    "embedding.weight",
)
"""How the token embedding is called, by the ends of its names."""
CACHE_BYTES = 2
"""Of one number of the key-value cache, which is float16 by default everywhere."""


def examine(folder: str, scan: bool) -> dict[str, Any]:
    """Examine a checkpoint; the entry of the child process.

    Args:
        folder: with its files; the weights may be holes behind their headers unless they are scanned.
        scan: whether to look for weights that are not finite.

    Returns:
        An `Inspection` as JSON.

    Raises:
        UnsafeSourceError: for a file that must not be opened.
        SourceError: for files that contradict each other, and weights that are not finite.
        UnsupportedError: for a checkpoint that names no architecture.
    """
    root = Path(folder)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    for path in files:
        check_file(root, path)
    tensors = _tensors(root, files)
    inspection = _inspection(root, files, [tensor for entries in tensors.values() for tensor in entries])
    if scan:
        refuse_not_finite(root, tensors)
    return inspection.model_dump(mode="json")


def _inspection(root: Path, files: list[str], tensors: list[TensorEntry]) -> Inspection:
    config = read_json(root / "config.json", "config.json")
    # Models that also see or hear keep their language model's part under this name.
    text = {**config, **part} if isinstance(part := config.get("text_config"), dict) else config
    card = front_matter(root)
    tokenizer = _optional(root, "tokenizer_config.json")
    vocabulary = read_vocabulary(root)
    rows = _embedding_rows(tensors)
    notes = judge_vocabulary(vocabulary, rows, text, _optional(root, "generation_config.json"))
    return Inspection(
        architecture=_architecture(config),
        model_type=str(config.get("model_type") or ""),
        parameters=_parameters(tensors, config),
        dtypes=_dtypes(tensors),
        license=license_of(root, card),
        context_length=_first(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        chat_template=any("chat_template" in path for path in files) or bool(tokenizer.get("chat_template")),
        tokenizer=vocabulary.kind,
        tokens=vocabulary.size,
        vocabulary=rows or _first(text, "vocab_size"),
        weight_bytes=sum(tensor.end - tensor.start for tensor in tensors),
        size=sum((root / path).stat().st_size for path in files),
        cache_bytes_per_token=_cache_bytes(text),
        tensors=tuple(TensorShape(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors),
        quantized_source=signs(config, card, files, tensors),
        repository_code=_repository_code(config, tokenizer),
        notes=notes,
    )


def _tensors(root: Path, files: list[str]) -> dict[str, tuple[TensorEntry, ...]]:
    """The tensors of every weight file, each header judged, and held against the index."""
    found: dict[str, tuple[TensorEntry, ...]] = {}
    for path in files:
        if path.endswith(".safetensors"):
            with (root / path).open("rb") as stream:
                read = partial(_read, stream)
                found[path] = read_header(path, (root / path).stat().st_size, read).tensors
    if not any(found.values()):
        raise SourceError("the checkpoint has no tensors; save it again with save_pretrained")
    where: dict[str, str] = {}
    for path, tensors in found.items():
        for tensor in tensors:
            if tensor.name in where:
                raise UnsafeSourceError(f"{tensor.name} is both in {where[tensor.name]} and in {path}; save it again")
            where[tensor.name] = path
    if INDEX in files:
        _judge_index(read_json(root / INDEX, INDEX), where, found)
    elif len(found) > 1:
        raise SourceError(f"there are {len(found)} weight files but no {INDEX}; fetch the checkpoint anew")
    return found


def _read(stream: BinaryIO, start: int, length: int) -> bytes:
    stream.seek(start)
    return stream.read(length)


def _judge_index(index: Mapping[str, Any], where: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Refuse an index that does not say where the tensors are."""
    declared = index.get("weight_map")
    if not isinstance(declared, dict):
        raise SourceError(f"{INDEX} has no weight_map; fetch the checkpoint anew")
    for name, path in declared.items():
        if path not in found:
            raise SourceError(f"{INDEX} puts {name} into {path!r}, which is not there; fetch the checkpoint anew")
        if where.get(name) != path:
            actual = f"it is in {where[name]}" if name in where else "it is in no file"
            raise SourceError(f"{INDEX} puts {name} into {path}, but {actual}; fetch the checkpoint anew")
    extra = sorted(set(where) - set(declared))
    if extra:
        raise SourceError(f"{where[extra[0]]} has {extra[0]}, which {INDEX} does not name; fetch the checkpoint anew")


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise UnsupportedError(
        "config.json names no architecture; add the class of the model, such as "
        '"architectures": ["LlamaForCausalLM"], or save the checkpoint again with save_pretrained'
    )


def _parameters(tensors: list[TensorEntry], config: Mapping[str, Any]) -> int:
    """Number of weights; an output matrix that repeats the embedding is not counted again."""
    tied = config.get("tie_word_embeddings") is True
    return sum(
        TensorShape(tensor.name, tensor.shape, tensor.dtype).elements
        for tensor in tensors
        if not (tied and tensor.name.endswith("lm_head.weight"))
    )


def _dtypes(tensors: list[TensorEntry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        elements = TensorShape(tensor.name, tensor.shape, tensor.dtype).elements
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + elements
    return dict(sorted(counts.items()))


def _embedding_rows(tensors: list[TensorEntry]) -> int:
    for end in EMBEDDINGS:
        rows = [t.shape[0] for t in tensors if len(t.shape) == 2 and (t.name == end or t.name.endswith("." + end))]
        if rows:
            return rows[0]
    return 0


def _cache_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of keys and values for one token; 0 where the configuration does not say."""
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    width = _first(config, "hidden_size", "n_embd", "d_model")
    head_width = _first(config, "head_dim") or (width // heads if heads else 0)
    return 2 * layers * (_first(config, "num_key_value_heads") or heads) * head_width * CACHE_BYTES


def _first(config: Mapping[str, Any], *names: str) -> int:
    """The first of these fields that is a positive number; 0 if none is."""
    for name in names:
        value = config.get(name)
        if type(value) is int and 0 < value < 2**40:
            return value
    return 0


def _repository_code(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str:
    """The classes that loading would import from the repository, were that ever allowed."""
    named: list[str] = []
    for fields in (config, tokenizer):
        auto_map = fields.get("auto_map")
        if auto_map:
            values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
            named += [str(item) for value in values for item in (value if isinstance(value, list) else [value]) if item]
    return ", ".join(dict.fromkeys(named))


def _optional(root: Path, path: str) -> dict[str, Any]:
    return read_json(root / path, path) if (root / path).is_file() else {}
