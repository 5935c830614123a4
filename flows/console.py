"""What a command says: results on standard output, everything else on standard error.

With ``--json`` standard output belongs to one object alone, so whatever a library prints there goes to standard error.
"""

import json
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_reserved: TextIO | None = None
_tracebacks = False


def show_tracebacks(wanted: bool) -> None:
    """Decide whether errors come with their traceback."""
    global _tracebacks
    _tracebacks = wanted


def tracebacks() -> bool:
    """Whether errors come with their traceback."""
    return _tracebacks


def reserve_stdout() -> None:
    """Keep standard output for `print_json`: from now on, what anybody else writes there goes to standard error."""
    global _reserved
    if _reserved is None:
        sys.stdout.flush()
        _reserved = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)


class ReaderGone(Exception):  # noqa: N818 - nothing went wrong
    """Nobody reads standard output any more."""


@contextmanager
def written() -> Iterator[None]:
    """Have everything that a block prints written at its end.

    Raises:
        ReaderGone: if nobody reads it; nothing more is written then, not even by the interpreter as it ends.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        stream = _reserved or sys.stdout
        if not _is_unread(stream.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise ReaderGone from None
    except SystemExit as error:
        # How rich ends a program whose output nobody reads; no command of ours ends so.
        if error.code == 1:
            raise ReaderGone from None
        raise


def _is_unread(descriptor: int) -> bool:
    """Whether a descriptor is a pipe without a reader."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def print_json(value: Any) -> None:
    """Write the one object that a command with ``--json`` answers."""
    stream = _reserved or sys.stdout
    stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def out() -> "Console":
    """The console of results."""
    from rich.console import Console

    return Console(highlight=False)


def err() -> "Console":
    """The console of everything else: progress, hints, errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say_error(message: str) -> None:
    """Say what went wrong, in red on a terminal, without markup of foreign text."""
    from rich.text import Text

    from modelmint.columns import plain

    err().print(Text.assemble(("error: ", "bold red"), plain(message)), soft_wrap=True)


def say(message: str, style: str = "") -> None:
    """Say something beside the result."""
    from rich.text import Text

    err().print(Text(message, style=style), soft_wrap=True)


def say_result(message: str, style: str = "") -> None:
    """Print a line of the result, however long it is."""
    from rich.text import Text

    out().print(Text(message, style=style), soft_wrap=True)


def print_wide(table: "RenderableType") -> None:
    """Print a table: at the terminal's width, or at full width where there is no terminal."""
    from rich.console import Console

    console = out()
    if not console.is_terminal:
        console = Console(width=10_000, highlight=False)
    console.print(table)
