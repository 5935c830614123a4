"""The two user interfaces on loopback: Prefect's with the history of the local server, MLflow's with the record."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.local_server import free_port, local_server
from modelmint.errors import InputError, ToolError
from modelmint.settings import Settings, tracking_server_environment

MLFLOW_PORT = 5000
START_SECONDS = 120.0
STOP_SECONDS = 8.0
CLASSIC_PAGES = "?workflowType=machine_learning"
"""Without it MLflow's pages show agents and traces, and no metrics of variants."""


@dataclass(frozen=True)
class Pages:
    """Where the user interfaces are, the process that serves MLflow's if it is ours, and what that prints."""

    prefect: str
    mlflow: str
    process: "subprocess.Popen[bytes] | None"
    log: Path

    def wait(self) -> None:
        """Wait until the server of MLflow's pages ends, or for ever where it is not ours.

        Raises:
            ToolError: if it ended by itself.
        """
        while self.process is None or self.process.poll() is None:
            time.sleep(0.5)
        raise ToolError(f"MLflow's server ended with {self.process.returncode}; what it printed is in {self.log}")


@contextmanager
def pages(settings: Settings, mlflow_port: int = 0) -> Iterator[Pages]:
    """Serve both user interfaces for the time of the block; servers that are configured are used as they are.

    Args:
        settings: where the records lie.
        mlflow_port: for MLflow's; 0 for 5000, or any free one if that is taken.

    Raises:
        InputError: if the port is taken.
        ToolError: if a server does not come up.
    """
    with ExitStack() as stack:
        process = None
        tracking = settings.tracking_uri
        if not tracking.startswith(("http://", "https://")):
            port = _port(mlflow_port)
            process = stack.enter_context(_mlflow(settings, port))
            tracking = f"http://127.0.0.1:{port}"
        # MLflow starts while Prefect's server is looked for or started.
        prefect = settings.prefect_api_url or stack.enter_context(local_server(settings.home))
        if process is not None:
            _wait(process, f"{tracking}/health", _log(settings))
        yield Pages(prefect.removesuffix("/api"), f"{tracking.rstrip('/')}/{CLASSIC_PAGES}", process, _log(settings))


@contextmanager
def _mlflow(settings: Settings, port: int) -> "Iterator[subprocess.Popen[bytes]]":
    (settings.home / "mlruns").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "mlflow", "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    log = _log(settings)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--artifacts-destination", "modelmint:///experiments"],
            # Eight processes for jobs of agents, which there are none of here.
            env={**tracking_server_environment(settings), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _wait(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:]
    raise ToolError(f"MLflow's server did not come up at {address}; {log} ends with:\n{tail}", stderr_tail=tail)


def _log(settings: Settings) -> Path:
    return settings.home / ".modelmint" / "mlflow.log"


def _port(wanted: int) -> int:
    """The port that was asked for, else the usual one, else any."""
    import socket

    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", wanted or MLFLOW_PORT))
        except OSError as error:
            if wanted:
                raise InputError(
                    f"port {wanted} cannot be used: {error.strerror}; give another --mlflow-port"
                ) from None
            return free_port()
    return wanted or MLFLOW_PORT
