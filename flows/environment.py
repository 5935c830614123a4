"""The environment that Prefect and MLflow find: set here, once, before either of them is imported."""

import os

from modelmint.errors import InputError
from modelmint.settings import Settings, reach_loopback_directly, silence_telemetry

QUIET = {
    # What a task says is shown in our own words; the server gets Prefect's.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "modelmint",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # MLflow's progress bars and its remarks on a database that it has just made.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # MLflow looks for git to note a commit that would be that of the working folder, not ours.
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Defaults of this process and its children; what a person has set stays."""


def load_settings() -> Settings:
    """The settings of this machine.

    Raises:
        InputError: names the variable whose value cannot be used.
    """
    from pydantic import ValidationError

    try:
        return Settings()
    except ValidationError as error:
        mistakes = [f"{_variable(str(m['loc'][0]))}={m['input']!r}: {m['msg']}" for m in error.errors()]
        raise InputError("the environment cannot be used: " + "; ".join(mistakes)) from None


def prepare(settings: Settings) -> None:
    """Set the environment for a command that works with Prefect and MLflow; to be called before they are imported."""
    silence_telemetry()
    reach_loopback_directly()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if settings.prefect_api_url is None:
        # The local server's own folder: no profile of the user's points the client elsewhere.
        os.environ["PREFECT_HOME"] = str(settings.home.absolute() / ".modelmint" / "prefect")


def _variable(field: str) -> str:
    """The environment variable of a setting."""
    alias = Settings.model_fields[field].validation_alias if field in Settings.model_fields else field
    return str(alias or f"MODELMINT_{field.upper()}")
