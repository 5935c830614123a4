"""The whole command under fire: killed, told to end, and started eight times at once."""

import itertools
import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from homes import MLFLOW_WARNS, Home, Server

from modelmint import locks
from modelmint.recipe import Recipe
from modelmint.verify import verify

pytestmark = [pytest.mark.flows, MLFLOW_WARNS]

STEPS = 16
"""Of the shipped fake recipe: 5 of the checkpoint, the text and the base, 3 quantized, 4 evaluated, 4 benchmarked."""

LAST_BEFORE_BENCHMARK = 12
"""The benchmark records its four steps at once."""

CHILD = "modelmint.isolated_child"
"""The module that runs in every child process with native code."""


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a command answered that was left alone."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return dict(json.loads(out))


def wait_for(process: "subprocess.Popen[str]", moment: Callable[[], bool]) -> None:
    """Wait for a moment in the life of a command."""
    while not moment():
        assert process.poll() is None, f"the command ended before: {process.communicate()}"
        time.sleep(0.002)


def assert_nothing_runs(home: Home, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while left := home.processes():
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.05)


def assert_locks_are_free(home: Home) -> None:
    folders = [home.store.root / "locks", home.folder / "host", home.folder / "mlruns"]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix != ".db" and file.is_file()]
    assert home.store.root / "locks" / "in-use" in files
    assert [file.name for file in files if not locks.is_free(file)] == []


@pytest.fixture(scope="module")
def undisturbed(home: Home) -> dict[str, str]:
    """The digests of the shipped fake recipe's variants."""
    return {variant.variant: variant.digest for variant in home.release("fake").judged}


def test_a_release_killed_again_and_again_completes_with_the_same_bytes_and_reuses_what_was_done(
    own_home: Home, undisturbed: dict[str, str]
) -> None:
    home, draw = own_home, random.Random(0)
    # At the last one all steps are done, and the release is being recorded.
    moments = [*sorted(draw.sample(range(LAST_BEFORE_BENCHMARK + 1), 3)), STEPS]
    names = [f"killed-{number}" for number in range(len(moments))]
    for name, moment in zip(names, moments, strict=True):
        done = {record.key: record for record in home.records()}
        process = home.start("release", "fake", "--json", "--name", name)
        wait_for(process, lambda: (home.store.root / "locks").exists())
        wait_for(process, lambda moment=moment: len(home.store.step_keys()) >= moment)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert_nothing_runs(home)
        assert_locks_are_free(home)
        assert {record.key: record for record in home.records() if record.key in done} == done

    answer = finish(home.start("release", "fake", "--json", "--name", "whole"))

    assert {it["variant"]: it["digest"] for it in answer["variants"]} == undisturbed
    assert answer["steps"] == {"executed": 0, "reused": STEPS}
    assert {record.invocation.release for record in home.records()} <= set(names)
    found = verify(home.store)
    assert (found.damaged, found.conflicts, found.incomplete) == ((), (), ())
    runs = {run.info.run_name: run for run in home.runs()}
    opened = [name for name in [*names, "whole"] if name in runs]
    assert len(opened) >= 4, "only one that was killed at once may be unknown"
    statuses = dict.fromkeys(opened, "KILLED") | {"whole": "FINISHED"}
    assert {name: runs[name].info.status for name in opened} == statuses
    for before, after in itertools.pairwise(opened):
        assert runs[after].data.tags["modelmint.continues"] == before
    assert {model.status for model in home.models()} == {"READY"}
    assert len(home.models()) == 4


def test_eight_commands_at_once_do_each_step_once_and_all_succeed(own_home: Home) -> None:
    home = own_home
    recipe = home.recipe(["fake:Q8"])
    processes = [home.start("release", recipe, "--json", "--name", f"command-{number}") for number in range(8)]
    answers = [finish(process) for process in processes]
    records = home.records()
    assert Counter(record.step.stage for record in records) == {
        **dict.fromkeys(("acquire", "inspect", "text", "convert", "reference", "quantize"), 1),
        "evaluate": 2,
        "benchmark": 2,
    }
    executed = {answer["release"]: answer["steps"]["executed"] for answer in answers if answer["steps"]["executed"]}
    assert Counter(record.invocation.release for record in records) == executed
    assert {sum(answer["steps"].values()) for answer in answers} == {len(records)}
    assert len({answer["variants"][0]["digest"] for answer in answers}) == 1
    assert {answer["variants"][0]["verdict"] for answer in answers} == {"passed"}
    assert Counter(model.tags["modelmint.variant"] for model in home.models()) == {"fake:F32": 1, "fake:Q8": 1}
    assert [run.info.status for run in home.runs()] == ["FINISHED"] * 8
    assert_nothing_runs(home)
    assert_locks_are_free(home)


def test_native_work_ends_with_the_command_which_goes_on_where_it_was(own_home: Home, server: Server) -> None:
    """Killed while llama.cpp's converter runs, told to end while PyTorch does, and left alone at last."""
    home = own_home
    checkpoint = tiny.checkpoint(home.folder / "Tiny")
    recipe = home.write(
        Recipe.model_validate(
            {
                "schema": 1,
                "name": "fake",
                "source": f"file:{checkpoint}",
                "variants": ["gguf:Q8_0"],
                "evaluation": {"window": 64, "windows": 2, "answer_tokens": 4},
                "benchmark": None,
            }
        )
    )

    def started(name: str, done: str, begun: str) -> "subprocess.Popen[str]":
        """A release whose step of one stage is done, and which has begun with the child of another."""
        process = home.start("release", recipe, "--json", "--name", name)
        wait_for(process, lambda: done in {record.step.stage for record in home.records()})
        wait_for(process, lambda: any(CHILD in it.cmdline() for it in home.processes()))
        assert begun not in {record.step.stage for record in home.records()}
        return process

    process = started("killed", "text", "convert")
    process.kill()
    process.communicate()
    assert_nothing_runs(home)
    assert_locks_are_free(home)

    process = started("told", "convert", "reference")
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - told < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert_nothing_runs(home)
    assert_locks_are_free(home)
    killed, ended = home.runs()
    assert [run.info.status for run in (killed, ended)] == ["KILLED", "KILLED"]
    assert ended.data.tags["modelmint.continues"] == "killed"
    flow_run = {"flow_runs": {"id": {"any_": [ended.data.tags["modelmint.flow_run"]]}}}
    assert [run["state"]["type"] for run in server.post("flow_runs/filter", flow_run)] == ["CRASHED"]

    kept = len(home.records())
    answer = finish(home.start("release", recipe, "--json", "--name", "whole"))
    assert answer["steps"]["reused"] == kept
    assert home.runs()[-1].data.tags["modelmint.continues"] == "told"
    assert_nothing_runs(home)
