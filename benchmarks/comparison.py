"""What a comparison found: stages side by side, figures held against aims, and both as tables or JSON."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Pair:
    """One stage done both ways: seconds by hand, ours, and how many of ours lie outside of the child process."""

    stage: str
    by_hand: float
    ours: float
    store: float = 0.0

    @property
    def ratio(self) -> float:
        """Ours over by hand."""
        return self.ours / self.by_hand


@dataclass(frozen=True)
class Aim:
    """One figure and the bound that it should keep.

    Attributes:
        subject: what it is about, such as a type.
        measure: what was measured.
        by_hand: the tool's figure, as text.
        ours: ModelMint's figure, as text.
        found: the figure that is held against the bound.
        bound: the largest that is well.
    """

    subject: str
    measure: str
    by_hand: str
    ours: str
    found: float
    bound: float

    @property
    def met(self) -> bool:
        """Whether the bound is kept; a figure that is not a number keeps none."""
        return self.found <= self.bound


@dataclass
class Comparison:
    """Everything that one run found.

    Attributes:
        facts: what was run, on what.
        pairs: the stages in their order.
        aims: figures that have a bound.
        notes: figures that have none.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> Pair:
        """All stages together."""
        sums = [sum(getattr(pair, name) for pair in self.pairs) for name in ("by_hand", "ours", "store")]
        return Pair("all", *sums)

    @property
    def missed(self) -> list[Aim]:
        """The aims that were not met."""
        return [aim for aim in self.aims if not aim.met]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        pairs = [asdict(pair) | {"ratio": pair.ratio} for pair in self._stages()]
        aims = [asdict(aim) | {"met": aim.met} for aim in self.aims]
        return {"facts": self.facts, "stages": pairs, "aims": aims, "notes": self.notes, "missed": len(self.missed)}

    def show(self, console: Console) -> None:
        """Print tables and notes."""
        _print(console, ("what", "value"), [(name, _words(value)) for name, value in self.facts.items()])
        stages = [
            (pair.stage, f"{pair.by_hand:.1f}", f"{pair.ours:.1f}", f"{pair.ratio:.2f}", f"{pair.store:.1f}")
            for pair in self._stages()
        ]
        _print(console, ("stage", "by hand s", "ours s", "ratio", "of ours: store s"), stages)
        aims = [
            (aim.subject, aim.measure, aim.by_hand, aim.ours, f"{aim.found:.4g}", f"{aim.bound:.4g}", _mark(aim))
            for aim in self.aims
        ]
        _print(console, ("subject", "measure", "by hand", "ours", "found", "at most", "aim"), aims)
        _print(console, ("without an aim", "value"), [(name, _words(value)) for name, value in self.notes.items()])
        console.print(f"{len(self.aims) - len(self.missed)} of {len(self.aims)} aims are met")

    def _stages(self) -> list[Pair]:
        return [*self.pairs, self.total] if self.pairs else []


class Machine:
    """Tells how much of the machine others used: a measurement beside other work is none."""

    def __init__(self) -> None:
        self._busy, self._stolen = _busy()
        self._own = _own()
        self._started = time.monotonic()

    def used_by_others(self) -> dict[str, float]:
        """Cores that others kept busy since the start, and those that the host gave to other machines, on average."""
        seconds = time.monotonic() - self._started
        busy, stolen = _busy()
        others = (busy - self._busy) - (_own() - self._own)
        return {"others": max(0.0, others) / seconds, "stolen": (stolen - self._stolen) / seconds}


@contextmanager
def seconds_of(into: dict[str, Any], name: str) -> Iterator[None]:
    """Note the wall-clock seconds of a block under a name."""
    started = time.monotonic()
    yield
    into[name] = time.monotonic() - started


def _busy() -> tuple[float, float]:
    """Processor seconds of this machine since it started: those used here, and those stolen."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _waiting, interrupts, soft, stolen = ticks[:8]
    hertz = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupts + soft) / hertz, stolen / hertz


def _own() -> float:
    """Processor seconds of this process and of all its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mark(aim: Aim) -> str:
    return "[green]met[/green]" if aim.met else "[bold red]missed[/bold red]"


def _print(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without the columns that are empty, if there is anything in it."""
    kept = [index for index in range(len(titles)) if any(row[index] for row in rows)]
    if not kept:
        return
    table = Table()
    for index in kept:
        left = titles[index] in ("what", "value", "stage", "subject", "measure", "without an aim")
        table.add_column(titles[index], justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    console.print(table)
