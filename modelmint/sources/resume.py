"""Fetches a file over connections that may break: each one goes on where the last one ended."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from modelmint.errors import NetworkError, SourceError
from modelmint.sources import PinnedFile

TRIES = 5
"""How often in a row a connection may bring nothing worthwhile before the download gives up."""
RETRY_SECONDS = 1.0
_WORTHWHILE_BYTES = 1 << 16


def resume(
    what: str,
    file: PinnedFile,
    target: Path,
    on_bytes: Callable[[int], None],
    connect: Callable[[BinaryIO], None],
) -> None:
    """Complete a file; what `target` holds already is its beginning.

    Args:
        what: the source's name, for messages.
        file: what is fetched.
        target: where to.
        on_bytes: told of bytes that have to come again, as a negative number.
        connect: appends to the open file what one connection brings, from the file's end on.

    Raises:
        NetworkError: if `TRIES` connections in a row brought nothing worthwhile; what came is kept.
        SourceError: what `connect` raises.
    """
    tries = 0
    with target.open("ab") as out:
        if out.tell() > file.size:
            on_bytes(-out.tell())
            out.truncate(0)
        while out.tell() < file.size:
            before = out.tell()
            try:
                connect(out)
                failure = NetworkError(f"{what}: the connection ended inside {file.path}")
            except NetworkError as error:
                failure = error
            if out.tell() == file.size:
                return
            tries = 0 if out.tell() - before >= _WORTHWHILE_BYTES else tries + 1
            if tries >= TRIES:
                came = f"{out.tell()} of {file.size} bytes of {file.path} came"
                raise NetworkError(f"{failure}; {came}, tried {tries} times: run again to continue") from failure
            time.sleep(RETRY_SECONDS * 2 ** max(tries - 1, 0))


def append(
    what: str, file: PinnedFile, chunks: Iterable[bytes], out: BinaryIO, on_bytes: Callable[[int], None]
) -> None:
    """Append what comes.

    Raises:
        SourceError: if it is more than the source declared.
    """
    for chunk in chunks:
        if out.tell() + len(chunk) > file.size:
            raise SourceError(
                f"{what}: {file.path} is longer than the {file.size} bytes that were declared; run again, and if it "
                "stays so, report it to the owner of the source"
            )
        out.write(chunk)
        on_bytes(len(chunk))
