"""Runs the command line in this process, and as the program that is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run

COMMAND = Path(sys.executable).with_name("modelmint")
OWN_SETTINGS = ("MODELMINT_", "MLFLOW_", "PREFECT_", "HF_", "AWS_")


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def object(self) -> Any:
        """The one object on standard output."""
        return json.loads(self.out)


@dataclass
class CommandLine:
    """A command line in a home of its own."""

    home: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Answer:
        """Run a command in this process."""
        self.capture.readouterr()
        code = run(list(arguments))
        found = self.capture.readouterr()
        return Answer(code, found.out, found.err)


def program(
    home: Path, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run the installed program."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    own = {"MODELMINT_HOME": str(home), "MODELMINT_HOST_LOCK": str(home / "host"), **(environment or {})}
    return subprocess.run(
        [COMMAND, *arguments], env=clean | own, cwd=home, capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    """A command line in an empty home."""
    for name in list(os.environ):
        if name.startswith(OWN_SETTINGS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODELMINT_HOME", str(tmp_path))
    monkeypatch.setenv("MODELMINT_HOST_LOCK", str(tmp_path / "host"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    before = dict(os.environ)
    yield CommandLine(tmp_path, capfd)
    # Commands set variables for Prefect and MLflow, which are not meant for other tests.
    os.environ.clear()
    os.environ.update(before)
