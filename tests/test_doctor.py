"""What the doctor finds: each check by itself, sound and not."""

import importlib.metadata
import sqlite3
from pathlib import Path

import pytest
from cli import CommandLine, command

from flows import doctor
from flows.doctor import Finding
from modelmint.errors import UnsupportedError
from modelmint.formats import fake
from modelmint.settings import Settings

__all__ = ["command"]
pytestmark = pytest.mark.pure


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that packages have these versions; None for not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if (found := versions[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def problems(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.level == "problem"}


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("fastapi", "0.155.0", "from 0.155 on it does not start"),
        ("fastapi", "0.151.0", "answers 422"),
        ("transformers", "4.57.6", "tested with transformers 5"),
        ("mlflow", "3.18.0", "not tested"),
        ("torch", "2.12.1+cpu", "pinned"),
    ],
)
def test_a_version_that_does_not_work_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: str, says: str
) -> None:
    installed(monkeypatch, **{package: version})
    found = problems(list(doctor._packages(Settings(home=tmp_path))))
    assert list(found) == [package]
    assert says in found[package].text
    assert found[package].way_out.startswith(f"pip install '{package}>=")


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, gguf=None)
    assert problems(list(doctor._packages(Settings(home=tmp_path))))["gguf"].way_out == "run make install"


@pytest.mark.parametrize(("theirs", "is_problem"), [("0.28.0", True), ("0.28.0+cpu", False), (None, False)])
def test_a_torchvision_of_another_build_than_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str | None, is_problem: bool
) -> None:
    installed(monkeypatch, torchvision=theirs, torch="2.13.0+cpu")
    assert bool(problems(list(doctor._torchvision(Settings(home=tmp_path))))) is is_problem


def test_a_format_whose_tools_are_not_as_recorded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(stage: str) -> None:
        raise UnsupportedError("convert_hf_to_gguf.py has another SHA-256; run `make install`")

    monkeypatch.setattr(fake, "tools", changed)
    assert "run `make install`" in problems(list(doctor._formats(Settings(home=tmp_path))))["format fake"].text


def test_a_full_disk_and_little_memory_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelmint.host.free_disk_bytes", lambda folder: 10**9)
    monkeypatch.setattr("modelmint.host.free_memory_bytes", lambda: 10**8)
    found = problems(list(doctor._machine(Settings(home=tmp_path))))
    assert set(found) == {"disk", "memory"}
    assert "store gc" in found["disk"].way_out


def test_a_store_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    found = problems(list(doctor._store(Settings(home=tmp_path))))
    assert "MODELMINT_STORE" in found["store"].way_out + found["store"].text


def test_mlflows_database_is_opened(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, tracking="")
    assert [finding.level for finding in doctor._mlflow(settings)] == ["ok"]
    path = tmp_path / "mlruns" / "mlflow.db"
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (run_uuid)")
    assert [finding.text for finding in doctor._mlflow(settings)] == [f"0 runs in {path}"]
    path.write_bytes(b"no database at all, but a text of more than one hundred bytes" * 4)
    assert "move the file away" in problems(list(doctor._mlflow(settings)))["mlflow"].way_out


def test_a_server_that_does_not_answer_is_a_problem_and_its_password_is_not_shown(tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path, prefect_api_url="http://user:secret@127.0.0.1:9/api", tracking="http://127.0.0.1:9"
    )
    found = list(doctor.servers(settings))
    assert set(problems(found)) == {"prefect", "mlflow"}
    assert "http://127.0.0.1:9/api does not answer" in problems(found)["prefect"].text
    assert not any("secret" in finding.text for finding in found)


def test_the_command_leaves_with_4_where_something_is_to_repair(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = command("doctor", "--json")
    assert answer.object["sound"] is (answer.code == 0)
    checks = {check["check"] for check in answer.object["checks"]}
    assert checks >= {"packages", "format fake", "format gguf", "disk", "memory", "child processes", "store", "mlflow"}
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    answer = command("doctor")
    assert answer.code == 4
    assert "✗ prefect" in answer.out
    assert "→ start it, or unset PREFECT_API_URL" in answer.out
