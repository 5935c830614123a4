"""Homes in which whole releases run, in this process or as commands, and the Prefect server that they use."""

import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from rich.console import Console

from flows.launch import launch
from flows.stages import Stages
from modelmint.artifact import StepRecord
from modelmint.recipe import Recipe
from modelmint.recipe_file import write_recipe
from modelmint.release import ReleaseReport
from modelmint.settings import Settings
from modelmint.store import Store

COMMAND = Path(sys.executable).with_name("modelmint")
OWN_SETTINGS = ("MODELMINT_", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HF_ENDPOINT", "HF_TOKEN", "AWS_ENDPOINT_URL")
"""What a person may have set; no test sees it."""

FAKE: dict[str, Any] = {
    "schema": 1,
    "name": "fake",
    "source": "fake:tiny",
    "evaluation": {"window": 64, "windows": 8},
    "benchmark": {"prompt_tokens": 32, "generate_tokens": 16},
}
"""The shipped fake recipe without its variants."""


MLFLOW_WARNS = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
"""MLflow still asks SQLAlchemy for something that is to go."""


@dataclass(frozen=True)
class Server:
    """A Prefect server, asked through its own HTTP API."""

    api: str

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.api}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def flow_run(self, report: ReleaseReport) -> dict[str, Any]:
        """The flow run of a release."""
        (run,) = self.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [report.links.flow_run]}}})
        return dict(run)

    def task_runs(self, report: ReleaseReport) -> dict[str, str]:
        """The state's name of each task run of a release, by the name of the task run."""
        body = {"flow_runs": {"id": {"any_": [report.links.flow_run]}}, "limit": 200}
        return {run["name"]: run["state"]["name"] for run in self.post("task_runs/filter", body)}

    def artifacts(self, report: ReleaseReport) -> list[dict[str, Any]]:
        """What a release shows in the user interface."""
        body = {"flow_runs": {"id": {"any_": [report.links.flow_run]}}, "limit": 200}
        return list(self.post("artifacts/filter", body))


@dataclass
class Home:
    """A home folder with a store and a record of its own; releases in it run in this process or as commands."""

    folder: Path
    server: Server
    environment: dict[str, str] = field(default_factory=dict)
    started: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "MODELMINT_HOME": str(self.folder),
            "MODELMINT_HOST_LOCK": str(self.folder / "host"),
            "PREFECT_API_URL": self.server.api,
            **self.environment,
        }

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def recipe(self, variants: Sequence[object], **changes: Any) -> str:
        """Write the fake recipe with other variants, and say where it lies."""
        return self.write(Recipe.model_validate({**FAKE, "variants": variants, **changes}))

    def write(self, recipe: Recipe) -> str:
        path = self.folder / f"{recipe.digest[-8:]}.yaml"
        path.write_text(write_recipe(recipe))
        return str(path)

    def release(self, recipe: str, variants: Sequence[str] = (), name: str = "") -> ReleaseReport:
        """Run a release in this process."""
        with pytest.MonkeyPatch.context() as patch:
            for variable in list(os.environ):
                if variable.startswith(OWN_SETTINGS):
                    patch.delenv(variable)
            for variable, value in self.environment.items():
                patch.setenv(variable, value)
            return launch(Settings(), recipe, list(variants), name, Stages(Console(file=io.StringIO())))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start the command in a process of its own; it and all its children have the home as their TMPDIR."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
        scratch = self.folder / "tmp"
        scratch.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [COMMAND, *arguments],
            env={**kept, **self.environment, "TMPDIR": str(scratch)},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """End every command that a test which failed has left."""
        for process in self.started:
            process.kill()
            process.communicate()

    def processes(self) -> list[psutil.Process]:
        """Whatever still runs of the commands that were started here."""
        marker, found = str(self.folder / "tmp"), []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def records(self) -> list[StepRecord]:
        return list(self.store.records())

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / 'mlruns' / 'mlflow.db'}")

    def runs(self, kind: str = "release", recipe: str = "fake") -> list[Run]:
        """The runs of a recipe's experiment, the oldest first."""
        return list(
            self.mlflow.search_runs(
                [self.experiment(recipe)], f"tags.`modelmint.kind` = '{kind}'", order_by=["attributes.start_time ASC"]
            )
        )

    def models(self, recipe: str = "fake") -> list[LoggedModel]:
        return list(self.mlflow.search_logged_models([self.experiment(recipe)]))

    def experiment(self, recipe: str = "fake") -> str:
        found = self.mlflow.get_experiment_by_name(recipe)
        assert found is not None, f"no experiment is called {recipe}"
        return str(found.experiment_id)


def stop_keeper(home: Path) -> None:
    """End the server of a home, if there is one, without waiting for its grace."""
    try:
        known = json.loads((home / ".modelmint" / "server.json").read_text())
        keeper = psutil.Process(known["keeper"])
        keeper.send_signal(signal.SIGTERM)
        keeper.wait(30)
    except (FileNotFoundError, psutil.NoSuchProcess):
        return
