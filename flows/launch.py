"""Runs the release flow from a command: starts Prefect's server where none is configured, and loses no task run.

Starting the server and importing Prefect and MLflow take seconds each, so they happen at the same time.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from flows.console import say
from flows.doctor import servers
from flows.environment import prepare
from flows.local_server import local_server
from flows.signals import Terminated, stopped_by_signals
from flows.stages import Stages
from modelmint.errors import ModelMintError, NetworkError, StageError
from modelmint.settings import Settings

if TYPE_CHECKING:
    from modelmint.release import ReleaseReport

STORED_SECONDS = 15.0
"""How long the server may take to store what the flow has sent it."""

INTERRUPTED_SECONDS = 3.0
"""The same, when the command was told to end."""

_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_IDS = 200


def launch(settings: Settings, recipe: str, variants: list[str], name: str, stages: Stages) -> "ReleaseReport":
    """Run the release flow.

    Args:
        settings: where things lie; decides whether a server is started.
        recipe: name or file of a recipe.
        variants: only these; all if empty.
        name: of the release.
        stages: shows what runs.

    Raises:
        NetworkError: if a configured server does not answer.
        ModelMintError: what stopped the release as a whole.
    """
    prepare(settings)
    for finding in servers(settings):
        if finding.level == "problem":
            # Said at once: Prefect would fail with a riddle, and MLflow try for minutes.
            raise NetworkError(f"{finding.check}: {finding.text}; {finding.way_out}")
    server = _Server(settings)
    with server.running(), stages, stopped_by_signals(stages.stop):
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.release import release

        # The heartbeat costs a second for each flow; the process is watched by who started it.
        with (
            temporary_settings({PREFECT_API_URL: server.address(), PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
            stages.of_tasks(),
        ):
            try:
                state = release(recipe, variants, name, return_state=True)
            except (KeyboardInterrupt, Terminated):
                wait_until_stored(stages.ended, INTERRUPTED_SECONDS)
                raise
            late = wait_until_stored(stages.ended)
    if late:
        say(f"{late} task runs are not in Prefect's database {STORED_SECONDS:.0f} s after the release ended", "yellow")
    found: Any = state.result(raise_on_failure=False)
    if isinstance(found, ModelMintError):
        raise found
    if isinstance(found, BaseException):
        raise StageError(f"the release stopped: {type(found).__name__}: {found}") from found
    return cast("ReleaseReport", found)


def wait_until_stored(task_runs: set[str], seconds: float = STORED_SECONDS) -> int:
    """Wait until the server has the end of every task run in its database; how many it does not have in time."""
    from prefect.client.orchestration import get_client

    waiting = sorted(task_runs)
    deadline = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while waiting:
            part = waiting[:_IDS]
            wanted = {"id": {"any_": part}, "state": {"type": {"any_": list(_ENDED)}}}
            stored = int(client.request("POST", "/task_runs/count", json={"task_runs": wanted}).text)
            if stored == len(part):
                waiting = waiting[_IDS:]
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.1)
    return len(waiting)


@dataclass
class _Server:
    """The server of a command: the configured one, or our own, started in a thread."""

    settings: Settings
    _found: list[str] = field(default_factory=list)
    _failed: list[Exception] = field(default_factory=list)
    _thread: threading.Thread | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have a server for the time of the block."""
        with ExitStack() as stack:
            if self.settings.prefect_api_url is None:
                self._thread = threading.Thread(target=self._start, args=(stack,), name="server", daemon=True)
                self._thread.start()
            yield

    def address(self) -> str:
        """The address of its API, as soon as it answers.

        Raises:
            ModelMintError: if it does not come up.
        """
        if self.settings.prefect_api_url is not None:
            return self.settings.prefect_api_url
        assert self._thread is not None, "asked inside of running() only"
        self._thread.join()
        if self._failed:
            raise self._failed[0]
        return self._found[0]

    def _start(self, stack: ExitStack) -> None:
        try:
            self._found.append(stack.enter_context(local_server(self.settings.home)))
        except Exception as error:  # noqa: BLE001
            # Raised again in the thread that asks for the address.
            self._failed.append(error)
