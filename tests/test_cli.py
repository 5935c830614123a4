"""The command line by itself: help, answers in JSON, errors with their exit codes, and plans."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli import COMMAND, OWN_SETTINGS, CommandLine, command, program

from flows import console
from flows.commands import complete_recipe, complete_release, complete_variant
from modelmint import __version__
from modelmint.errors import CorruptError, InputError, RecipeError, ToolError
from modelmint.recipe_file import recipe_schema
from modelmint.store import Store

__all__ = ["command"]
pytestmark = pytest.mark.pure

COMMANDS = (
    ("release",),
    ("plan",),
    ("inspect",),
    ("show",),
    ("compare",),
    ("evaluate",),
    ("benchmark",),
    ("store", "ls"),
    ("store", "verify"),
    ("store", "gc"),
    ("store", "path"),
    ("export",),
    ("schema",),
    ("doctor",),
    ("version",),
    ("ui",),
)
FAKE = """\
schema: 1
name: fake-plan
source: fake:tiny
variants:
  - fake:Q8
  - {variant: fake:Q2, required: false}
evaluation: {window: 64, windows: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe of the made-up format."""
    path = tmp_path / "fake-plan.yaml"
    path.write_text(FAKE)
    return str(path)


# Help.


def test_help_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([COMMAND, "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, because the machine may be busy; nothing here waits.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli", "--help"], check=True, capture_output=True, text=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported & {"prefect", "mlflow", "torch", "transformers", "numpy", "pydantic", "yaml", "asyncio"} == set()


def test_help_names_every_command_and_the_exit_codes(command: CommandLine) -> None:
    answer = command("--help")
    assert answer.code == 0
    assert {words[0] for words in COMMANDS} - set(answer.out.split()) == set()
    assert "3 a gate failed" in answer.out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_answers_in_json(command: CommandLine, words: tuple[str, ...]) -> None:
    answer = command(*words, "--help")
    assert answer.code == 0
    assert "--json" in answer.out


def test_no_command_at_all_shows_the_help_as_a_mistake(command: CommandLine) -> None:
    answer = command()
    assert answer.code == 2
    assert "Usage: " in answer.out + answer.err


# Simple answers.


def test_version_names_the_tools_in_json(command: CommandLine) -> None:
    assert command("version").out == f"modelmint {__version__}\n"
    answer = command("version", "--json").object
    assert answer["modelmint"] == __version__
    assert {tool["name"] for tool in answer["tools"]["fake"]} == {"numpy", "safetensors"}


def test_schema_is_that_of_recipes(command: CommandLine) -> None:
    assert command("schema").object == recipe_schema()
    assert command("schema", "--json").object == recipe_schema()


def test_the_schema_beside_the_recipes_is_the_one_that_is_printed(command: CommandLine) -> None:
    kept = Path(__file__).parent.parent / "deployments" / "recipe.schema.json"
    assert json.loads(kept.read_text()) == command("schema").object


def test_inspect_prints_what_is_in_a_checkpoint(command: CommandLine) -> None:
    found = command("inspect", "fake:tiny", "--context", "512", "--json").object
    assert (found["architecture"], found["license"], found["context"]) == ("FakeForCausalLM", "apache-2.0", 512)
    assert found["parameters"] > 0
    assert "FakeForCausalLM" in command("inspect", "fake:tiny").out
    assert not (command.home / "store").exists()


# Mistakes, and how a command ends.


def test_an_unknown_recipe_is_bad_input_with_what_was_meant(command: CommandLine) -> None:
    answer = command("release", "smollm2-135n")
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("error: no recipe is called 'smollm2-135n'")
    assert "did you mean 'smollm2-135m'?" in answer.err
    assert "Traceback" not in answer.err
    assert list(command.home.iterdir()) == []


def test_an_unknown_variant_is_bad_input_before_a_server_starts(command: CommandLine, recipe: str) -> None:
    answer = command("release", recipe, "--variant", "fake:Q9", "--json")
    assert answer.code == 1
    assert answer.object["error"]["kind"] == "RecipeError"
    assert "has no variant 'fake:Q9'" in answer.object["error"]["message"]
    assert not (command.home / ".modelmint").exists()


@pytest.mark.parametrize("setting", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_a_configured_server_that_does_not_answer_is_named_at_once(
    command: CommandLine, recipe: str, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv(setting, "http://127.0.0.1:9")
    answer = command("release", recipe, "--json")
    assert answer.code == 4
    assert answer.object["error"]["kind"] == "NetworkError"
    assert f"unset {setting}" in answer.object["error"]["message"]


@pytest.mark.parametrize("name", ["../out", ".hidden", "a b", "a" * 200])
def test_a_name_that_is_no_folders_is_refused_before_hours_of_work(
    command: CommandLine, recipe: str, name: str
) -> None:
    answer = command("release", recipe, "--name", name)
    assert answer.code == 1
    assert "take letters, digits, dots, dashes and underscores" in answer.err


def test_a_name_that_a_release_has_is_not_given_again(command: CommandLine, recipe: str) -> None:
    Store(command.home / "store").write_release("taken", {"lock.json": b"{}"})
    answer = command("release", recipe, "--name", "taken")
    assert answer.code == 1
    assert "has a release 'taken' already" in answer.err


@pytest.mark.parametrize(
    "arguments", [("releas", "fake"), ("plan",), ("store", "gc", "--keep-last", "-1"), ("plan", "--x")]
)
def test_wrong_usage_gives_2_and_the_error_in_json_as_well(command: CommandLine, arguments: tuple[str, ...]) -> None:
    answer = command(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert "Error" in answer.err
    assert command(*arguments, "--json").object["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("what"), 1), (RecipeError("what"), 1), (ToolError("what"), 4), (CorruptError("what"), 5)],
)
def test_an_error_gives_its_exit_code(
    command: CommandLine, recipe: str, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    monkeypatch.setattr("modelmint.planning.plan_release", _raises(error))
    answer = command("plan", recipe, "--json")
    assert answer.code == code
    assert answer.object == {"error": {"kind": type(error).__name__, "message": "what"}}
    assert answer.err == "error: what\n"


def test_an_error_has_its_traceback_where_that_is_wanted(
    command: CommandLine, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelmint.planning.plan_release", _raises(InputError("what")))
    assert "Traceback" in command("--debug", "plan", recipe).err
    assert "Traceback" not in command("plan", recipe).err
    monkeypatch.setenv("MODELMINT_DEBUG", "1")
    assert "Traceback" in command("plan", recipe).err
    console.show_tracebacks(False)


def test_a_defect_of_ours_says_so_and_shows_where(
    command: CommandLine, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelmint.planning.plan_release", _raises(ZeroDivisionError("ours")))
    answer = command("plan", recipe, "--json")
    assert answer.code == 4
    assert answer.object["error"] == {"kind": "ZeroDivisionError", "message": "ours"}
    assert "Traceback" in answer.err
    assert "this is a bug in modelmint" in answer.err


def test_an_interrupted_command_gives_130(command: CommandLine, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelmint.planning.plan_release", _raises(KeyboardInterrupt()))
    assert command("plan", recipe).code == 130


def test_an_error_cannot_write_to_the_terminal_what_it_was_given(command: CommandLine) -> None:
    answer = command("inspect", "nope:\x1b[2J")
    assert answer.code == 1
    assert "\x1b" not in answer.err


def test_a_setting_that_cannot_be_used_is_named(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMINT_THREADS", "many")
    answer = command("store", "ls")
    assert answer.code == 1
    assert "MODELMINT_THREADS='many'" in answer.err


def test_standard_output_belongs_to_the_object(tmp_path: Path, recipe: str) -> None:
    """Also where a library prints, here one that Python imports at its start."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import atexit, os, sys\natexit.register(lambda: (print('from Python'), os.write(1, b'from C')))\n"
    )
    done = program(tmp_path, "plan", recipe, "--json", environment={"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "fake-plan"
    assert "from C" in done.stderr


@pytest.mark.parametrize("arguments", [("schema",), ("inspect", "fake:tiny"), ("version", "--json")])
def test_a_reader_that_has_had_enough_is_no_error(arguments: tuple[str, ...]) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stream:
        done = subprocess.run([COMMAND, *arguments], stdout=stream, stderr=subprocess.PIPE, env=clean, timeout=60)
    assert done.stderr == b""
    # As any program that SIGPIPE ends.
    assert done.returncode == 141


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [COMMAND, "schema"], stdout=full, stderr=subprocess.PIPE, env=clean, timeout=60, text=True
        )
    assert done.returncode == 4
    assert done.stderr.startswith("error: a disk is full")


# Plans.


def test_a_plan_of_nothing_done_runs_everything_and_makes_nothing(command: CommandLine, recipe: str) -> None:
    plan = command("plan", recipe, "--json").object
    assert plan["step_count"] == {"executed": 13, "reused": 0}
    assert [step["state"] for step in plan["steps"]] == ["runs"] * 4
    assert [variant["variant"] for variant in plan["variants"]] == ["fake:F32", "fake:Q8", "fake:Q2"]
    sizes = [variant["size_bytes"] for variant in plan["variants"]]
    assert sizes == sorted(sizes, reverse=True)
    assert plan["disk_bytes"] > sum(sizes)
    assert plan["seconds"] is None
    assert not list((command.home / "store").rglob("*.json"))


def test_a_dry_run_is_a_plan(command: CommandLine, recipe: str) -> None:
    dry, plan = command("release", recipe, "--dry-run", "--json").object, command("plan", recipe, "--json").object
    # Others write to the same disk meanwhile.
    assert {**dry, "disk_free_bytes": 0} == {**plan, "disk_free_bytes": 0}


def test_a_plan_finds_what_is_done_by_the_keys_of_the_stages(command: CommandLine, recipe: str) -> None:
    from flows.order import RECIPES
    from modelmint import acquire, convert, inspect, quantize
    from modelmint.recipe_file import find_recipe
    from modelmint.settings import Settings
    from modelmint.step import Context
    from modelmint.store import Store

    before = command("plan", recipe, "--json").object
    wanted = find_recipe(recipe, RECIPES)
    context = Context(Store(command.home / "store"), Settings())
    snapshot = acquire.acquire(acquire.resolve(wanted.source, context.settings), context)
    inspect.inspect(snapshot.record.output, context)
    base = convert.convert(snapshot.record.output, "fake", {}, context)
    made = quantize.quantize(base.record.output, wanted.variants[0], context)

    plan = command("plan", recipe, "--json").object

    assert {step["stage"]: step["state"] for step in plan["steps"]} == {
        "acquire": "reused",
        "inspect": "reused",
        "text": "runs",
        "reference": "runs",
    }
    states = {v["variant"]: [step["state"] for step in v["steps"]] for v in plan["variants"]}
    assert states == {
        "fake:F32": ["reused", "runs", "runs"],
        "fake:Q8": ["reused", "runs", "runs"],
        "fake:Q2": ["runs", "runs", "runs"],
    }
    assert plan["step_count"] == {"executed": 9, "reused": 4}
    assert plan["variants"][1]["size_bytes"] == context.store.artifact(made.record.output).size
    assert plan["disk_bytes"] < before["disk_bytes"]


def test_a_plan_shows_what_the_release_would_refuse(command: CommandLine, recipe: str) -> None:
    Path(recipe).write_text(FAKE.replace("fake:Q8", "fake:Q9"))
    answer = command("plan", recipe, "--json")
    assert answer.code == 1
    refusals = {variant["variant"]: variant["refusal"] for variant in answer.object["variants"]}
    assert "unknown type 'Q9'" in refusals["fake:Q9"]
    assert refusals["fake:Q2"] == ""
    assert "unknown type 'Q9'" in command("plan", recipe).out


def test_a_plan_prints_a_table(command: CommandLine, recipe: str) -> None:
    answer = command("plan", recipe)
    assert answer.code == 0
    assert "13 to execute, 0 reused" in answer.out


# Completion in the shell.


def test_the_shell_completes_recipes_variants_and_releases(command: CommandLine, recipe: str) -> None:
    assert complete_recipe("smollm2-135m") == ["smollm2-135m", "smollm2-135m-hub"]
    assert complete_variant(_typed(recipe), "fake:") == ["fake:Q8", "fake:Q2"]
    assert complete_variant(_typed("no-such-recipe"), "fake:") == []
    assert complete_release("fake") == []


def test_the_shell_completes_a_variant_behind_its_option(tmp_path: Path, recipe: str) -> None:
    words = {
        "COMP_WORDS": f"modelmint plan {recipe} -v fake:",
        "COMP_CWORD": "4",
        "_MODELMINT_COMPLETE": "complete_bash",
    }
    assert program(tmp_path, environment=words).stdout.split() == ["fake:Q8", "fake:Q2"]


def _typed(recipe: str) -> Any:
    """What the shell's completion knows of a command line."""
    return SimpleNamespace(params={"recipe": recipe}, args=[])


def _raises(error: BaseException) -> Any:
    def raise_it(*arguments: object) -> None:
        raise error

    return raise_it
