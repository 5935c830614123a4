"""Brings an evaluation or calibration text into the store, so that it is measured on the same bytes ever after.

The artifact has one file, ``text.txt``: UTF-8, with line ends of one character.
"""

import importlib.util
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import JsonValue

from modelmint.artifact import Step, digest_of_bytes
from modelmint.errors import SourceError, UnsupportedError
from modelmint.recipe import DatasetRef, ModelRef
from modelmint.settings import Settings
from modelmint.sources import PinnedFile
from modelmint.step import Context, StepResult, Work, Workspace, run_step

STAGE_VERSION = 1
FILE = "text.txt"
MAX_TEXT_BYTES = 64 << 20
"""Of a file or object; a thousand windows of 512 tokens take about two million."""
DATASET_BYTES = 16 << 20
"""How much of a dataset is taken, from its beginning."""

Read = Callable[[Path], bytes]


def acquire_text(ref: DatasetRef, context: Context) -> StepResult:
    """Bring a text into the store, unless it is there already.

    Args:
        ref: where it is; a file and an object are pinned by their contents, a dataset by its commit.
        context: store, settings and who asks.

    Raises:
        SourceError: if it is missing, closed, empty, too large or no text.
        UnsupportedError: if it is a dataset and the extra for datasets is not installed.
        NetworkError: if the remote end failed for now.
    """
    parameters, read = _pinned(ref, context.settings)
    step = Step(stage="text", stage_version=STAGE_VERSION, parameters=parameters)

    def work(workspace: Workspace) -> Work:
        (workspace.out / FILE).write_bytes(_normal(ref, read(workspace.folder)))
        return Work()

    return run_step(context, step, work, machine="network")


def _pinned(ref: DatasetRef, settings: Settings) -> tuple[dict[str, JsonValue], Read]:
    """What names these very bytes, and how to read them."""
    if ref.source == "pydoc":
        # The topics are written for each version of Python.
        return {"source": "pydoc", "python": platform.python_version()}, lambda scratch: _pydoc()
    source = ModelRef.parse(ref.source)
    if source.scheme == "file":
        content = _file(source)
        return {"source": f"file:{digest_of_bytes(content)}"}, lambda scratch: content
    if source.scheme == "s3":
        return _object(source, settings)
    return _dataset(ref, source, settings)


def _pydoc() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _file(source: ModelRef) -> bytes:
    path = Path(source.location).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise SourceError(f"{source}: {path.absolute()} {what}; name a text file in UTF-8")
    _refuse_large(source, path.stat().st_size)
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise SourceError(f"{source} cannot be read: {error.strerror}; change its permissions") from error


def _object(source: ModelRef, settings: Settings) -> tuple[dict[str, JsonValue], Read]:
    from modelmint.sources import s3

    client, bucket, key = s3.text_object(source.location, settings)
    pinned: PinnedFile = s3.pin_object(client, bucket, key, FILE, source)
    _refuse_large(source, pinned.size)

    def read(scratch: Path) -> bytes:
        s3.fetch_object(client, bucket, key, pinned, scratch / FILE, str(source), lambda count: None)
        return (scratch / FILE).read_bytes()

    return {"source": str(source), "identity": pinned.identity, "version": pinned.version}, read


def _dataset(ref: DatasetRef, source: ModelRef, settings: Settings) -> tuple[dict[str, JsonValue], Read]:
    """A dataset of the Hub; its rows are read one after the other, by the library of that name."""
    if importlib.util.find_spec("datasets") is None:
        raise UnsupportedError(
            f"{ref} is a dataset of the Hub, and reading one takes a package that is not installed: "
            "pip install 'modelmint[datasets]'; or name a text file with file:path"
        )
    from modelmint.sources.hub import Hub, dataset_commit

    commit = dataset_commit(source, settings)

    def read(scratch: Path) -> bytes:
        from datasets import load_dataset

        hub = Hub(settings)
        options = {"split": ref.split, "revision": commit, "token": hub.token}
        try:
            with hub.explained(source):
                rows = load_dataset(source.location, ref.config or None, streaming=True, **options)
                return _joined(ref, (row.get(ref.column) for row in rows))
        except ValueError as error:
            # An unknown configuration or split; the message lists those that there are.
            raise SourceError(f"{ref}: {error}; correct config or split") from error
        except FileNotFoundError as error:
            raise SourceError(f"{ref}: {error}; use a dataset with files of text, JSON, CSV or Parquet") from error

    parameters: dict[str, JsonValue] = {"source": f"hf:{source.location}@{commit}", "bytes": DATASET_BYTES}
    return parameters | {"config": ref.config, "split": ref.split, "column": ref.column}, read


def _joined(ref: DatasetRef, rows: Iterable[object]) -> bytes:
    """The first rows that are not empty, with an empty line between them."""
    parts: list[bytes] = []
    size = 0
    for row in rows:
        if not isinstance(row, str):
            raise SourceError(f"{ref}: there is no text in column {ref.column!r}; set column to the one that holds it")
        if row.strip():
            parts.append(row.strip("\n").encode())
            size += len(parts[-1]) + 2
        if size > DATASET_BYTES:
            break
    return b"\n\n".join(parts)


def _refuse_large(source: ModelRef, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise SourceError(
            f"{source} has {size} bytes, and at most {MAX_TEXT_BYTES} are accepted; "
            "cut it: a few hundred thousand bytes are enough for dozens of windows"
        )


def _normal(ref: DatasetRef, content: bytes) -> bytes:
    """The same text with line ends of one character and no byte-order mark.

    Raises:
        SourceError: if it is no UTF-8, no text, or empty.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{ref} is no UTF-8 (at byte {error.start}); convert it, such as with iconv -t utf-8"
        ) from error
    if "\0" in text:
        raise SourceError(f"{ref} is no text: it has NUL characters; name a text file")
    if not text.strip():
        raise SourceError(f"{ref} is empty; name a text of at least a few thousand words")
    return text.replace("\r\n", "\n").replace("\r", "\n").encode()
