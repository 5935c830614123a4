"""The demo's job on the real model, through the command as a person types it: figures, verdicts, the second time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelmint.recipe import Benchmark
from modelmint.recipe_file import find_recipe, write_recipe
from modelmint.release import ReleaseReport

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("modelmint")
OWN_SETTINGS = ("MODELMINT_", "MLFLOW_TRACKING_URI", "PREFECT_API_URL")

KL_DIVERGENCE = {"gguf:Q8_0": 0.0040, "gguf:Q4_K_M": 0.0573, "gguf:Q4_0": 0.2551}
"""What llama-perplexity says of the same weights on the same 12 windows, against the f16 base."""

SECOND_SECONDS = 60.0
"""Nothing is executed then; a quiet machine of two cores takes 10 s, most of it for imports."""


@dataclass(frozen=True)
class Command:
    """The command in a home of its own, with the local server that it starts for itself."""

    home: Path

    def run(self, *arguments: str) -> dict[str, Any]:
        """What it answers; it must succeed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
        done = subprocess.run(
            [COMMAND, *arguments, "--json"],
            env={**kept, "MODELMINT_HOME": str(self.home)},
            cwd=self.home,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    home = tmp_path_factory.mktemp("home")
    yield Command(home)
    known = home / ".modelmint" / "server.json"
    if known.exists():
        keeper = psutil.Process(json.loads(known.read_text())["keeper"])
        keeper.send_signal(signal.SIGTERM)
        keeper.wait(30)


@pytest.fixture(scope="module")
def arguments(command: Command) -> list[str]:
    """The demo's recipe, narrowed to three variants and one benchmark trial, on the checkpoint that it rebuilds."""
    built = subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    recipe = find_recipe("smollm2-135m", ROOT / "deployments" / "recipes")
    source = recipe.source.model_copy(update={"location": built.stdout.strip()})
    path = command.home / "smollm2-135m.yaml"
    path.write_text(write_recipe(recipe.model_copy(update={"source": source, "benchmark": Benchmark(trials=1)})))
    return ["release", str(path), *(word for name in KL_DIVERGENCE for word in ("--variant", name))]


@pytest.fixture(scope="module")
def first(command: Command, arguments: list[str]) -> dict[str, Any]:
    return command.run(*arguments)


@pytest.fixture(scope="module")
def report(first: dict[str, Any]) -> ReleaseReport:
    return ReleaseReport.model_validate_json(Path(first["report"]).read_bytes())


def test_two_variants_pass_and_the_third_is_refused_with_the_reason(first: dict[str, Any]) -> None:
    verdicts = {it["variant"]: it["verdict"] for it in first["variants"]}
    assert verdicts == {"gguf:Q8_0": "passed", "gguf:Q4_K_M": "passed", "gguf:Q4_0": "failed"}
    (refused,) = [it for it in first["variants"] if it["verdict"] == "failed"]
    assert any("mean KL divergence" in it and "above the gate's 0.15" in it for it in refused["reasons"])


@pytest.mark.parametrize("variant", KL_DIVERGENCE)
def test_divergence_is_what_llama_cpp_measures(first: dict[str, Any], variant: str) -> None:
    (found,) = [it["measurements"] for it in first["variants"] if it["variant"] == variant]
    assert found["kl_divergence"]["value"] == pytest.approx(KL_DIVERGENCE[variant], rel=0.1)
    assert found["conversion_kl"]["value"] < 1e-4
    assert found["decode_rate"]["value"] > 0
    assert found["peak_memory"]["value"] > found["size"]["value"]


def test_the_report_says_that_the_source_was_dequantized(first: dict[str, Any], report: ReleaseReport) -> None:
    assert "dequantized-from-Q4_1" in report.source.notice
    assert "dequantized-from-Q4_1" in Path(first["report"]).with_suffix(".html").read_text()
    assert (report.source.license, report.source.size_class) == ("apache-2.0", "micro")


def test_the_base_answers_and_what_the_variants_say_is_recorded(report: ReleaseReport) -> None:
    said = {answer.prompt: answer.text for answer in report.variant("gguf:f16").answers}
    assert said["What is the capital of France?"] == "The capital of France is Paris."
    for variant in report.variants:
        assert [answer.prompt for answer in variant.answers] == list(report.recipe.evaluation.prompts)
        # Of so small a model some answers come to no end, and with which word they begin turns with a rounding.
        limit = report.recipe.evaluation.answer_tokens
        assert all(answer.text and (answer.stopped or answer.tokens == limit) for answer in variant.answers)


def test_the_second_time_nothing_is_executed(
    command: Command, arguments: list[str], first: dict[str, Any], report: ReleaseReport
) -> None:
    started = time.monotonic()
    second = command.run(*arguments)
    assert second["steps"] == {"executed": 0, "reused": first["steps"]["executed"]}
    assert time.monotonic() - started < SECOND_SECONDS
    assert second["variants"] == first["variants"]
    assert Path(second["lock"]).read_bytes() == Path(first["lock"]).read_bytes()
