"""Shows the stages of a release as they run: a live line for each on a terminal, plain lines elsewhere.

What runs is heard from the stages themselves (`tasks.shown.LISTENERS`), how it ended from Prefect's log of task runs,
which goes to the server and not to the console. The ids of the task runs that ended are kept, so that the command can
wait until the server has stored them all.
"""

import ctypes
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from modelmint.columns import plain
from modelmint.progress import in_words
from modelmint.table import duration

if TYPE_CHECKING:
    from modelmint.isolate import Progress

PLAIN_SECONDS = 5.0
"""Where nobody watches, a stage says no more often how far it is."""

TASK_RUNS = "prefect.task_runs"
OWN = "modelmint"
_FINISHED = re.compile(
    r"Finished in state (?P<state>\w+)\((?:(?P<quote>['\"])(?P<message>.*)(?P=quote))?.*\)", re.DOTALL
)
_DIGEST = re.compile(r"((?:sha256:)?[0-9a-f]{12})[0-9a-f]{28,}")
_MARKS = {"Completed": ("✓", "green"), "Cached": ("·", "dim"), "NotReady": ("-", "yellow")}
_FAILED = ("✗", "bold red")
_WIDEST = 160


@dataclass
class _Stage:
    """One stage that runs."""

    started: float
    told: float
    bar: TaskID | None = None
    thread: int = field(default_factory=threading.get_ident)


class Interrupted(BaseException):
    """Raised in the thread of a stage when the command ends; no error handler of a stage takes it for a failure."""


class Stages(logging.Handler):
    """Tells of stages on a console, for as long as it is entered.

    Args:
        console: where to; usually standard error.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.ended: set[str] = set()
        self._console = console
        self._running: dict[str, _Stage] = {}
        self._stopping = False
        self._bars = Bars(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[words]}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        own = logging.getLogger(OWN)
        self._own_level = own.level
        own.addHandler(self)
        own.setLevel(logging.INFO)
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()
        own = logging.getLogger(OWN)
        own.removeHandler(self)
        own.setLevel(self._own_level)

    @contextmanager
    def of_tasks(self) -> Iterator[None]:
        """Hear the stages that run as tasks; Prefect is imported for it."""
        from tasks.shown import LISTENERS

        LISTENERS.append(self.heard)
        logging.getLogger(TASK_RUNS).addHandler(self)
        try:
            yield
        finally:
            logging.getLogger(TASK_RUNS).removeHandler(self)
            LISTENERS.remove(self.heard)

    def heard(self, label: str, progress: "Progress") -> None:
        """Take a step forward of a stage; the first may say nothing but that it begins.

        Raises:
            Interrupted: if the command is ending, so that no further stage begins.
        """
        if self._stopping:
            raise Interrupted
        stage = self._running.get(label)
        if stage is None:
            stage = self._running[label] = _Stage(started=time.monotonic(), told=time.monotonic())
            stage.bar = self._bars.add_task(plain(label), total=None, words="")
        if not (progress.total or progress.done):
            return
        words = in_words(progress)
        if self._console.is_terminal and stage.bar is not None:
            self._bars.update(stage.bar, completed=progress.done, total=progress.total or None, words=words)
        elif time.monotonic() - stage.told >= PLAIN_SECONDS:
            stage.told = time.monotonic()
            self._print(Text(plain(f"{label}: {words}")))

    def stop(self) -> None:
        """Have every running stage end at its next line of Python, with its child process, and let none begin."""
        self._stopping = True
        for stage in list(self._running.values()):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(stage.thread), ctypes.py_object(Interrupted))

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of a log: how a task run ended, or what a stage of ours says."""
        # As of any handler of logs: what goes wrong here must not end the work.
        with suppress(BrokenPipeError):
            try:
                self._take(record)
            except Exception:  # noqa: BLE001
                self.handleError(record)

    def _take(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        name = str(getattr(record, "task_run_name", ""))
        if record.name == TASK_RUNS and (found := _FINISHED.match(message)):
            if found["state"] != "NotReady":
                self.ended.add(str(getattr(record, "task_run_id", "")))
            # What we stop ourselves has not failed.
            if not (self._stopping and found["state"] == "Crashed"):
                self.finished(name, found["state"], found["message"] or "")
        elif record.name == TASK_RUNS and "Retry" in message:
            self._print(Text(plain(f"  {name}: {_one_line(message)}"), style="yellow"))
        elif record.name.startswith(OWN):
            self._print(Text(plain(f"  {_one_line(message)}"), style="dim"))

    def finished(self, name: str, state: str, message: str = "") -> None:
        """Say how a stage ended: `state` is ``Completed``, ``Cached``, ``NotReady`` or another name of a failure."""
        label = max((label for label in self._running if name.startswith(label)), key=len, default="")
        stage = self._running.pop(label, None)
        if stage is not None and stage.bar is not None:
            self._bars.remove_task(stage.bar)
        mark, style = _MARKS.get(state, _FAILED)
        line = Text.assemble((f"{mark} ", style), plain(_DIGEST.sub(r"\1", name)))
        if state == "Cached":
            line.append("  reused", style="dim")
        elif state == "NotReady":
            line.append("  left out: what it needs has failed", style="dim")
        elif state == "Completed":
            seconds = time.monotonic() - stage.started if stage else 0.0
            line.append(f"  {duration(seconds) if seconds >= 1 else f'{seconds:.1f} s'}" if stage else "", style="dim")
        else:
            line.append(f"  {_one_line(plain(message))}", style="red")
        self._print(line)

    def _print(self, line: Text) -> None:
        if self._console.is_terminal:
            self._console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            self._console.print(line, soft_wrap=True)


def _one_line(text: str) -> str:
    text = text.removeprefix("Task run encountered an exception ").replace("\\n", "\n").strip()
    first = text.partition("\n")[0]
    return first if len(first) <= _WIDEST else first[: _WIDEST - 1] + "…"
