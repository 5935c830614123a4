"""Counts the tokens of a checkpoint's tokenizer from its files, and judges them against the model's embedding.

A model whose embedding has fewer rows than there are tokens, or whose end token does not exist, loads without a word in
most libraries and fails later, in native code.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmint.errors import SourceError
from modelmint.safety import read_json

_WAY_OUT = "the checkpoint's parts do not belong together: fetch it anew, or correct it and save it again"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
        kind: such as ``BPE``; empty where unknown.
        size: the highest id and one; 0 where unknown.
        ids: of all tokens, by spelling.
        special: ids of added tokens that only special markup spells.
    """

    kind: str = ""
    size: int = 0
    ids: frozenset[int] = frozenset()
    special: frozenset[int] = frozenset()


def read_vocabulary(folder: Path) -> Vocabulary:
    """The tokens of whichever tokenizer files there are; an unknown vocabulary if there are none.

    Raises:
        SourceError: if a file does not have the form of its kind.
    """
    if (folder / "tokenizer.json").is_file():
        return _fast(read_json(folder / "tokenizer.json", "tokenizer.json"))
    models = sorted(folder.glob("*.model"))
    if models:
        pieces = _sentencepieces(models[0])
        return _of("SentencePiece", set(range(pieces)) | _added(folder))
    if (folder / "vocab.json").is_file():
        ids = _ids("vocab.json", read_json(folder / "vocab.json", "vocab.json").values())
        return _of("BPE", ids | _added(folder))
    if (folder / "vocab.txt").is_file():
        return _of("WordPiece", set(range(len((folder / "vocab.txt").read_bytes().splitlines()))))
    return Vocabulary("tekken" if (folder / "tekken.json").is_file() else "")


def judge_vocabulary(
    vocabulary: Vocabulary, rows: int, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[str, ...]:
    """Refuse tokens that the model has no row for; returns notes about what is unusual but sound.

    Args:
        vocabulary: of the tokenizer.
        rows: of the embedding; 0 where unknown.
        config: the text model's part of config.json.
        generation: the content of generation_config.json.

    Raises:
        SourceError: names the field and both numbers.
    """
    declared = config.get("vocab_size")
    if rows and declared is not None and declared != rows:
        raise SourceError(f"config.json says vocab_size {declared}, but the embedding has {rows} rows; {_WAY_OUT}")
    rows = rows or (declared if isinstance(declared, int) else 0)
    if not rows:
        return ()
    for file, fields in (("config.json", config), ("generation_config.json", generation)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            _judge_special(file, name, fields.get(name), rows)
    beyond = {number for number in vocabulary.ids if number >= rows}
    if beyond - vocabulary.special:
        raise SourceError(
            f"the tokenizer has a token with id {max(beyond)}, but the embedding has {rows} rows; {_WAY_OUT}"
        )
    notes = []
    if beyond:
        notes.append(f"{len(beyond)} special tokens of the tokenizer have no row in the embedding and cannot be used.")
    if vocabulary.size and vocabulary.size < rows:
        notes.append(f"The embedding has {rows} rows for {vocabulary.size} tokens: the rest is padding.")
    return tuple(notes)


def _judge_special(file: str, name: str, value: Any, rows: int) -> None:
    for number in value if isinstance(value, list) else [value]:
        if number is None or (number == -1 and name == "pad_token_id"):
            continue
        if type(number) is not int or not 0 <= number < rows:
            raise SourceError(f"{file} says {name} {number}, but the model has tokens 0 to {rows - 1}; {_WAY_OUT}")


def _fast(content: Mapping[str, Any]) -> Vocabulary:
    model, added = content.get("model"), content.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise SourceError(f"tokenizer.json has no model; {_WAY_OUT}")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        ids = _ids("tokenizer.json", vocabulary.values())
    elif isinstance(vocabulary, list):
        ids = set(range(len(vocabulary)))
    else:
        raise SourceError(f"tokenizer.json has no vocabulary; {_WAY_OUT}")
    tokens = [token for token in added if isinstance(token, dict)]
    special = _ids("tokenizer.json", (token.get("id") for token in tokens if token.get("special")))
    more = _ids("tokenizer.json", (token.get("id") for token in tokens))
    return _of(str(model.get("type") or "BPE"), ids | more, special)


def _of(kind: str, ids: set[int], special: set[int] | None = None) -> Vocabulary:
    return Vocabulary(kind, max(ids, default=-1) + 1, frozenset(ids), frozenset(special or ()))


def _added(folder: Path) -> set[int]:
    file = folder / "added_tokens.json"
    return _ids(file.name, read_json(file, file.name).values()) if file.is_file() else set()


def _ids(path: str, values: Iterable[Any]) -> set[int]:
    ids: set[int] = set()
    for number in values:
        if type(number) is not int or not 0 <= number < 2**31:
            raise SourceError(f"{path} gives a token the id {number!r:.100}; {_WAY_OUT}")
        ids.add(number)
    return ids


def _sentencepieces(file: Path) -> int:
    """How many pieces a SentencePiece model has: its fields number 1, read without its library."""
    content = file.read_bytes()
    return sum(field == 1 for field in _fields(content, file.name))


def _fields(content: bytes, name: str) -> Iterator[int]:
    """The numbers of the top-level fields of a protocol buffer."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position, name)
        kind = key & 7
        if kind == 0:
            _, position = _varint(content, position, name)
        elif kind == 2:
            length, position = _varint(content, position, name)
            position += length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        if kind not in (0, 1, 2, 5) or position > len(content):
            raise SourceError(f"{name} is no SentencePiece model; {_WAY_OUT}")
        yield key >> 3


def _varint(content: bytes, position: int, name: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise SourceError(f"{name} is no SentencePiece model; {_WAY_OUT}")
