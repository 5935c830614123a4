#!/usr/bin/env python3
"""Measures what ModelMint adds to the work itself: of one step, of a release of many variants, and of a second run.

Everything is done with the fake format, whose own work takes milliseconds, in temporary homes with servers of their
own. Exit code 1 if an aim is missed.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from comparison import Aim, Comparison, Machine
from rich.console import Console

from modelmint import locks
from modelmint.host import host
from modelmint.settings import Settings

COMMAND = Path(sys.executable).with_name("modelmint")
INSIDE = Path(__file__).with_name("inside.py")
OWN_SETTINGS = ("MODELMINT_", "MLFLOW_", "PREFECT_")
SERVER_SECONDS = 30

STEP_MILLISECONDS = 15.0
HELP_SECONDS = 0.5
SECOND_RUN_SECONDS = 15.0
GROWTH = 1.25
"""How much longer a large release may take than the smaller ones foretell by a straight line."""


class OverheadError(Exception):
    """A command failed; the message ends with what it printed."""


@dataclass(frozen=True)
class Home:
    """A home folder with a store, a record and a Prefect server of its own."""

    folder: Path

    def release(self, recipe: Path) -> tuple[float, dict[str, int]]:
        """Run the command; seconds, and how many steps were executed and reused."""
        started = time.monotonic()
        output = self._run([str(COMMAND), "release", str(recipe), "--json"])
        return time.monotonic() - started, json.loads(output)["steps"]

    def inside(self, measure: str, argument: str) -> Any:
        """Measure something in a process that has this home."""
        return json.loads(self._run([sys.executable, str(INSIDE), measure, argument]).splitlines()[-1])

    def stop_server(self) -> None:
        """End the home's server without waiting for its grace."""
        file = self.folder / ".modelmint" / "server.json"
        if file.exists():
            keeper = psutil.Process(json.loads(file.read_text())["keeper"])
            keeper.send_signal(signal.SIGTERM)
            keeper.wait(SERVER_SECONDS)
            file.unlink(missing_ok=True)

    def _run(self, command: list[str]) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
        environment = {"MODELMINT_HOME": str(self.folder), "MODELMINT_HOST_LOCK": str(self.folder / "host")}
        done = subprocess.run(command, env=clean | environment, cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise OverheadError(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout


def measure(arguments: argparse.Namespace, scratch: Path) -> Comparison:
    """Measure everything that was asked for."""
    found = Comparison()
    machine = Machine()
    if "help" in arguments.parts:
        _help(found)
    if "steps" in arguments.parts:
        _steps(found, _home(scratch / "steps"), arguments.rounds)
    if "releases" in arguments.parts:
        _releases(found, arguments.variants, scratch)
    if "second" in arguments.parts:
        _second(found, _home(scratch / "second"))
    if arguments.profile:
        _profile(found, _home(scratch / "profile"), max(arguments.variants))
    found.facts = {"machine": f"{host().cpu}, {host().cores} cores"}
    found.notes["cores used by others and by the servers meanwhile"] = machine.used_by_others()
    return found


def _help(found: Comparison) -> None:
    say("modelmint --help")
    seconds = []
    for _ in range(7):
        started = time.monotonic()
        subprocess.run([str(COMMAND), "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.monotonic() - started)
    _aim(found, "modelmint --help", "seconds, median of 7", statistics.median(seconds), HELP_SECONDS)


def _steps(found: Comparison, home: Home, rounds: int) -> None:
    say("steps through Prefect and without")
    try:
        all_rounds = home.inside("steps", str(rounds))
    finally:
        home.stop_server()
    medians = {name: statistics.median(values) for name, values in all_rounds.items()}
    tool = medians["the fake tool itself"]
    _aim(found, "reused step", "milliseconds", medians["reused step through Prefect"], STEP_MILLISECONDS)
    executed = medians["executed step through Prefect"] - tool
    _aim(found, "executed fake step", "milliseconds beside the tool's", executed, STEP_MILLISECONDS)
    for name, value in medians.items():
        found.notes[f"{name}, ms"] = {"median": value, "least": min(all_rounds[name])}


def _releases(found: Comparison, counts: list[int], scratch: Path) -> None:
    first: dict[int, float] = {}
    second: dict[int, float] = {}
    for count in sorted(counts):
        say(f"a release of {count} variants, twice")
        home = _home(scratch / f"release-{count}")
        recipe = _recipe(home.folder, count)
        try:
            # Both databases are made and the server is up, which takes seconds whatever the recipe.
            home.release(_recipe(home.folder, 1))
            first[count], made = home.release(recipe)
            second[count], reused = home.release(recipe)
        finally:
            home.stop_server()
        found.notes[f"{count} variants"] = {
            f"first, {made['executed']} steps executed, s": first[count],
            f"second, {reused['reused']} steps reused, s": second[count],
        }
    for name, seconds in (("first", first), ("second", second)):
        costs = [1000 * cost for cost in _cost_of_one_more(seconds)]
        if costs:
            found.notes[f"one more variant, {name} release, ms"] = ", ".join(f"{cost:.0f}" for cost in costs)
        if len(costs) > 1:
            *_, before, largest = sorted(seconds)
            straight = seconds[before] + (largest - before) * costs[0] / 1000
            measured = seconds[largest] / straight
            _aim(found, f"{name} release of {largest}", "seconds over those of a straight line", measured, GROWTH)


def _cost_of_one_more(seconds: dict[int, float]) -> list[float]:
    """Seconds of one more variant between each two sizes."""
    counts = sorted(seconds)
    return [(seconds[b] - seconds[a]) / (b - a) for a, b in itertools.pairwise(counts)]


def _second(found: Comparison, home: Home) -> None:
    say("a second run")
    recipe = _recipe(home.folder, 7)
    try:
        home.release(recipe)
        warm, _ = home.release(recipe)
        home.stop_server()
        cold, steps = home.release(recipe)
        home.stop_server()
        found.notes["a second run, one after the other, s"] = home.inside("split", str(recipe))
    finally:
        home.stop_server()
    assert steps["executed"] == 0, "a second run has nothing to do"
    _aim(found, "second run, server starts", "seconds", cold, SECOND_RUN_SECONDS)
    _aim(found, "second run, server is up", "seconds", warm, SECOND_RUN_SECONDS)


def _profile(found: Comparison, home: Home, count: int) -> None:
    recipe = _recipe(home.folder, count)
    for name in ("first", "second"):
        say(f"profile of the {name} release of {count} variants")
        try:
            answer = home.inside("profile", str(recipe))
        finally:
            home.stop_server()
        found.notes[f"{name} release of {count}, profiled, s"] = answer["seconds"]
        for thread, places in answer["threads"].items():
            for seconds, place in places:
                found.notes[f"{name}, {thread}: {place}"] = round(seconds, 2)


def _home(folder: Path) -> Home:
    folder.mkdir(parents=True)
    return Home(folder)


def _recipe(folder: Path, count: int) -> Path:
    """Write a recipe of so many fake variants, each with other bytes."""
    kinds = ("Q8", "Q4", "Q3", "Q2")
    variants = [
        {"variant": f"fake:{kinds[n % 4]}@g{4 + n // 4}", "options": {"group": 4 + n // 4}, "required": False}
        # The larger recipe has none of the smaller one's variants: nothing is reused.
        for n in range(count * 4, count * 5)
    ]
    recipe = {
        "schema": 1,
        "name": f"overhead-{count}",
        "source": "fake:tiny",
        "evaluation": {"window": 64, "windows": 8},
        "benchmark": {"prompt_tokens": 32, "generate_tokens": 16},
        "variants": variants,
    }
    path = folder / f"{count}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _aim(found: Comparison, subject: str, name: str, value: float, bound: float) -> None:
    found.aims.append(Aim(subject, name, "", f"{value:.4g}", value, bound))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parts = ("help", "steps", "releases", "second")
    parser = argparse.ArgumentParser(description="Measure what ModelMint adds to the work itself.")
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts), help="what to measure (all)")
    parser.add_argument("--variants", type=int, nargs="+", default=[10, 50, 200], help="in one release (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of 50 steps of each kind (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="also say where the largest release spends its time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="modelmint-overhead-") as scratch,
            locks.machine(Settings().host_lock, "alone", "measuring the overhead"),
        ):
            found = measure(arguments, Path(scratch))
    except OverheadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        found.show(Console(width=None if sys.stdout.isatty() else 160))
    return 1 if found.missed else 0


if __name__ == "__main__":
    sys.exit(main())
