"""Where things lie and what the machine may spend: the only place that reads environment variables."""

import os
import tempfile
from functools import cached_property
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""No tool that we start reports home; set before any of them is imported."""


class Settings(BaseSettings):
    """What a person or a deployment decides once for a machine.

    Attributes:
        home: folder of everything that is kept here; store, records and the local servers lie inside it.
        store: folder of the content-addressed store; default ``<home>/store``.
        mirror: ``s3://bucket/prefix`` of the store's mirror; empty for none.
        tracking_uri: MLflow's tracking server; default the SQLite file ``<home>/mlruns/mlflow.db``.
        prefect_api_url: Prefect's server; None makes the command start one for the run.
        threads: threads for tools where a recipe says 0; 0 for all cores this process may use.
        step_seconds: wall-clock limit of one step's child process.
        step_memory_bytes: memory limit of one step's child process; 0 for nine tenths of the machine's.
        require_isolation: refuse to open foreign files where a child process cannot be cut off from the network.
        hf_endpoint: address of a Hub other than the public one.
        hf_token: token for the Hub, from the environment only.
        s3_endpoint: address of an S3 server other than Amazon's.
        host_lock: folder of the lock by which heavy steps of all stores share this machine; default one per user in the
            system's folder for temporary files.
    """

    model_config = SettingsConfigDict(env_prefix="MODELMINT_", frozen=True, extra="ignore", populate_by_name=True)

    home: Path = Field(default_factory=Path.cwd)
    store_folder: Path | None = Field(default=None, validation_alias="MODELMINT_STORE")
    mirror: str = ""
    tracking: str = Field(default="", validation_alias="MLFLOW_TRACKING_URI")
    prefect_api_url: str | None = Field(default=None, validation_alias="PREFECT_API_URL")
    threads: int = Field(default=0, ge=0)
    step_seconds: float = Field(default=6 * 3600.0, gt=0)
    step_memory_bytes: int = Field(default=0, ge=0)
    require_isolation: bool = False
    hf_endpoint: str | None = Field(default=None, validation_alias="HF_ENDPOINT")
    hf_token: SecretStr | None = Field(default=None, validation_alias="HF_TOKEN")
    s3_endpoint: str | None = Field(default=None, validation_alias="AWS_ENDPOINT_URL")
    host_lock: Path = Field(default_factory=lambda: Path(tempfile.gettempdir()) / f"modelmint-{os.geteuid()}")

    @cached_property
    def store(self) -> Path:
        """Folder of the store."""
        return (self.store_folder or self.home / "store").absolute()

    @cached_property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI; always explicit, because a leftover folder can flip MLflow's own default."""
        return self.tracking or f"sqlite:///{(self.home / 'mlruns' / 'mlflow.db').absolute()}"

    def tool_threads(self, wanted: int = 0) -> int:
        """How many threads a tool gets: what the recipe says, else the setting, else every core we may use."""
        return wanted or self.threads or len(os.sched_getaffinity(0))


def child_environment() -> dict[str, str]:
    """What a child process inherits: search paths and locale, never a token or a password."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OPENBLAS_CORETYPE")
    return {name: os.environ[name] for name in kept if name in os.environ}


def server_environment(prefect_home: Path, port: int) -> dict[str, str]:
    """The environment of a Prefect server on loopback: its own folder, no telemetry, the UI calling the right port."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {
        **clean,
        **TELEMETRY_OFF,
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }


def tracking_server_environment(settings: Settings) -> dict[str, str]:
    """The environment of an MLflow server on loopback over the record of `settings`.

    The database's address goes here and not into arguments: the list of processes would show a password in it.
    """
    clean = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return {
        **clean,
        **TELEMETRY_OFF,
        "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri,
        "MODELMINT_HOME": str(settings.home.absolute()),
        "MODELMINT_STORE": str(settings.store),
    }


def silence_telemetry() -> None:
    """Switch off the telemetry of every library in this process and its children."""
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


def reach_loopback_directly() -> None:
    """Let no proxy stand between this machine and itself: libraries ask it for 127.0.0.1 as well unless told not to."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
