"""Whole releases as a person types them: answers, exit codes, files, the server of their own, and the pages."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from homes import COMMAND, MLFLOW_WARNS, OWN_SETTINGS, Home, stop_keeper

pytestmark = [pytest.mark.flows, MLFLOW_WARNS]

TASK_RUNS = 16
"""Of the shipped fake recipe: 16 steps, of which 4 benchmarks are one run, and besides resolve, preview and report."""


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that was left alone."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def answer(home: Home) -> tuple[int, str, str]:
    """What a release of the shipped fake recipe answers in JSON."""
    return finish(home.start("release", "fake", "--json", "--name", "first", "--output", "models"))


def test_a_release_prints_one_object_and_shows_its_stages_beside_it(home: Home, answer: tuple[int, str, str]) -> None:
    code, out, err = answer
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"release", "lock", "report", "steps", "variants", "files"}
    assert found["steps"] == {"executed": 16, "reused": 0}
    assert {v["variant"]: v["verdict"] for v in found["variants"]} == {
        "fake:Q8": "passed",
        "fake:Q4": "passed",
        "fake:Q2": "failed",
    }
    for variant in found["variants"]:
        assert set(variant) == {"variant", "digest", "size_bytes", "verdict", "reasons", "measurements"}
        assert set(variant["measurements"]["kl_divergence"]) >= {"value", "unit", "better", "trials", "spread"}
    assert "above the gate's 0.15" in found["variants"][2]["reasons"][0]
    assert Path(found["lock"]).is_file()
    assert json.loads(Path(found["report"]).read_text())["release"] == "first"
    lines = err.splitlines()
    for stage in (
        "acquire fake:tiny",
        "convert fake",
        "quantize fake:Q4",
        "evaluate fake:Q4",
        "benchmark side by side",
    ):
        assert any(line.startswith(f"✓ {stage}") for line in lines), err
    assert not any("prefect" in line.lower() or "alembic" in line for line in lines)


def test_what_passed_is_exported_under_its_own_name(home: Home, answer: tuple[int, str, str]) -> None:
    files = {Path(file).name for file in json.loads(answer[1])["files"]}
    assert files == {path.name for path in (home.folder / "models").iterdir()}
    assert {"tiny-Q8-model.safetensors", "tiny-Q4-model.safetensors"} <= files
    assert not any("Q2" in name for name in files)


def test_the_second_release_executes_nothing_and_prints_a_table(home: Home, answer: tuple[int, str, str]) -> None:
    code, out, err = finish(home.start("release", "fake", "--output", "all", "--all"))
    assert code == 0, err
    assert "0 executed, 16 reused" in out
    assert "2 of 3 variants passed" in out
    assert str(home.store.root / "releases") in out
    assert "· convert fake  reused" in err
    assert any("Q2" in path.name for path in (home.folder / "all").iterdir())


def test_a_required_variant_that_fails_a_gate_gives_3_and_a_failed_stage_4_beats_it(home: Home) -> None:
    gate = home.recipe(["fake:Q8", "fake:Q2"], name="gate")
    code, out, err = finish(home.start("release", gate, "--json"))
    assert code == 3, err
    assert [v["verdict"] for v in json.loads(out)["variants"]] == ["passed", "failed"]

    broken = {"variant": "fake:Q4", "options": {"fail": "quantize"}}
    both = home.recipe(["fake:Q8", "fake:Q2", broken], name="both")
    code, out, err = finish(home.start("release", both, "--json"))
    assert code == 4, err
    reasons = {v["variant"]: v["reasons"] for v in json.loads(out)["variants"]}
    assert reasons["fake:Q8"] == []
    assert reasons["fake:Q4"][0].startswith("quantize failed: ")
    assert "✗ quantize fake:Q4" in err
    assert "- evaluate fake:Q4" in err
    assert "left out: what it needs has failed" in err
    assert "Traceback" not in err


def test_what_the_flow_refuses_is_bad_input(home: Home) -> None:
    recipe = home.recipe(["fake:Q8"], name="licence", licenses=["mit"])
    code, out, err = finish(home.start("release", recipe, "--json"))
    assert code == 1
    assert json.loads(out)["error"]["kind"] == "SourceError"
    assert "the recipe allows mit" in json.loads(out)["error"]["message"]
    assert "Traceback" not in err
    assert home.runs(recipe="licence")[-1].info.status == "FAILED"


def test_stored_variants_are_measured_again_without_the_orchestrator(home: Home, answer: tuple[int, str, str]) -> None:
    code, out, err = finish(home.start("evaluate", "first", "--variant", "fake:Q4", "--windows", "9", "--json"))
    assert code == 0, err
    (measured,) = json.loads(out)["variants"]
    figures = {m["measure"]: m for m in measured["measurements"]}
    assert (measured["variant"], measured["reused"]) == ("fake:Q4", False)
    assert figures["kl_divergence"]["trials"] == 9 * 31
    digest = {v["variant"]: v["digest"] for v in json.loads(answer[1])["variants"]}["fake:Q4"]
    code, out, err = finish(home.start("evaluate", digest, "--reference", "base", "--json"))
    assert code == 0, err
    assert json.loads(out)["variants"][0]["variant"] == "fake:Q4"


def test_stored_variants_are_benchmarked_again_when_asked_to(home: Home, answer: tuple[int, str, str]) -> None:
    def benchmark(*arguments: str) -> dict[str, Any]:
        code, out, err = finish(home.start("benchmark", "fake:Q8", "--release", "first", "--json", *arguments))
        assert code == 0, err
        (measured,) = json.loads(out)["variants"]
        return dict(measured)

    before = home.store.step_keys()
    kept = benchmark()
    assert kept["reused"] is True
    anew = benchmark("--anew")
    assert anew["reused"] is False
    assert anew["measurements"] != kept["measurements"]
    assert benchmark() == kept
    assert home.store.step_keys() == before
    assert benchmark("--trials", "2")["measurements"][0]["trials"] == 2
    assert len(home.store.step_keys()) == len(before) + 1


def test_ctrl_c_gives_130_and_closes_the_runs(home: Home) -> None:
    many = [{"variant": f"fake:Q8@v{number}", "options": {"group": 4 + number}} for number in range(200)]
    process = home.start("release", home.recipe(many, name="many", benchmark=None), "--json")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("✓ quantize"):
            break
    process.send_signal(signal.SIGINT)
    told = time.monotonic()
    code, out, err = finish(process)
    assert time.monotonic() - told < 10
    assert (code, out) == (130, "")
    assert "stopped; steps that are done are kept" in err
    assert "Traceback" not in err
    assert [run.info.status for run in home.runs(recipe="many")] == ["KILLED"]
    assert home.processes() == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A home without a configured server: commands start one of their own there."""
    folder = tmp_path_factory.mktemp("alone")
    yield folder
    stop_keeper(folder)


def run_alone(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith((*OWN_SETTINGS, "PREFECT_"))}
    own = {"MODELMINT_HOME": str(folder), "MODELMINT_HOST_LOCK": str(folder / "host")}
    # A proxy that is not for this machine, as many companies have one.
    own |= dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    return subprocess.Popen(
        [COMMAND, *arguments],
        env=clean | own,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def task_runs(api: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(f"{api}/task_runs/filter", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return list(json.load(answer))


def test_without_a_configured_server_a_release_starts_one_that_keeps_every_task_run(alone: Path) -> None:
    code, out, err = finish(run_alone(alone, "release", "fake", "--json"))
    assert code == 0, err
    api = json.loads((alone / ".modelmint" / "server.json").read_text())["api"]
    runs = task_runs(api)
    steps = json.loads(out)["steps"]
    assert steps == {"executed": 16, "reused": 0}
    assert {run["state"]["type"] for run in runs} == {"COMPLETED"}
    names = [run["name"] for run in runs]
    assert len(names) == TASK_RUNS
    for stage in ("resolve fake:tiny", "quantize fake:Q2", "evaluate fake:F32", "benchmark side by side"):
        assert names.count(stage) == 1


def test_the_pages_of_both_servers_answer_until_ctrl_c(alone: Path) -> None:
    process = run_alone(alone, "ui", "--json")
    assert process.stdout is not None
    pages = json.loads(process.stdout.readline())
    assert pages["mlflow"].endswith("/?workflowType=machine_learning")
    for address in pages.values():
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.status == 200
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (0, "")
    assert "Traceback" not in err
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(pages["mlflow"], timeout=5)
