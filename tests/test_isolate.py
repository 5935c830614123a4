"""What comes back from a child process: answers, errors in their own class, progress, and nothing else."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from isolated_calls import LIMITS, ROOT, appears, gone_within, nothing_left, run

from modelmint import errors, isolated_child
from modelmint.isolate import Limits, Progress, call

pytestmark = pytest.mark.pure


@pytest.fixture(autouse=True)
def check_that_nothing_is_left():
    with nothing_left():
        yield


class TestAnswer:
    def test_json_goes_in_and_comes_out(self):
        values = {
            "text": "Grüße, 世界 \U0001f980\n\u2028",
            "numbers": [1, -2.5, 1e300],
            "none": None,
            "nested": {"a": [True]},
        }
        outcome = run("echo", **values)
        assert outcome.value == values
        assert outcome.stderr_tail == ""
        assert 0 < outcome.seconds < 30

    def test_arguments_larger_than_a_pipe(self):
        assert run("echo", text="x" * 3_000_000).value == {"text": "x" * 3_000_000}

    def test_an_answer_of_five_megabytes(self):
        assert run("big", size=2_500_000).value == "ß" * 2_500_000

    def test_prints_never_meet_the_answer(self, tmp_path):
        outcome = run("prints_and_answers", options={"log": tmp_path / "log"})
        assert outcome.value == "fine"
        assert sorted(outcome.stderr_tail.splitlines()) == [
            "native print on stderr",
            "native print on stdout",
            "python print",
        ]
        assert (tmp_path / "log").read_text() == outcome.stderr_tail

    def test_the_tail_is_bounded_and_the_log_is_whole(self, tmp_path):
        outcome = run("prints", count=50_000, options={"log": tmp_path / "log"})
        assert len(outcome.stderr_tail) == 64 * 1024
        assert outcome.stderr_tail.endswith("000049999\n")
        assert (tmp_path / "log").stat().st_size == 500_000

    def test_a_child_starts_small(self):
        outcome = run("modules")
        heavy = {"numpy", "pydantic", "torch", "yaml", "subprocess", "modelmint.isolate", "modelmint.settings"}
        # `subprocess` comes from the test's own functions; the child's side must not need it.
        assert heavy & set(outcome.value) == {"subprocess"}
        assert outcome.peak_memory_bytes < 24_000_000

    def test_peak_memory_is_the_childs_own(self):
        ballast = bytearray(b"x") * 150_000_000
        assert run("allocates", megabytes=10, seconds=0).peak_memory_bytes < 40_000_000
        assert 60_000_000 < run("allocates", megabytes=60, seconds=0).peak_memory_bytes < 90_000_000
        assert len(ballast) == 150_000_000

    def test_twenty_at_once_from_threads(self):
        with ThreadPoolExecutor(20) as pool:
            outcomes = list(pool.map(lambda number: run("echo", number=number), range(20)))
        assert [outcome.value["number"] for outcome in outcomes] == list(range(20))

    def test_the_environment_is_clean(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "canary-secret")
        monkeypatch.setenv("PYTHONPATH", "/from/the/caller")
        seen = run("environment", options={"environment": {"OMP_NUM_THREADS": "2"}}).value
        assert "canary-secret" not in str(seen)
        assert seen["PYTHONPATH"] == str(ROOT)
        assert (seen["OMP_NUM_THREADS"], seen["HF_HUB_OFFLINE"], seen["DO_NOT_TRACK"]) == ("2", "1", "true")

    def test_only_our_own_functions_run(self):
        with pytest.raises(ValueError, match=r"os:system: only functions of modelmint\., tests\. run"):
            call("os:system", {"command": "true"}, limits=LIMITS)

    def test_a_limit_must_be_positive(self):
        with pytest.raises(ValueError, match="memory_bytes = 0: a limit is greater than 0"):
            Limits(wall_seconds=1, memory_bytes=0)


class TestFailure:
    def test_abort_names_signal_function_and_last_words(self):
        with pytest.raises(errors.ToolError, match=r"functions:abort .* SIGABRT\n.*\n  GGML_ASSERT") as caught:
            run("abort")
        assert caught.value.signal == "SIGABRT"
        assert caught.value.exit_code_of_tool is None
        assert "isolated_functions.py" in caught.value.stderr_tail  # where in Python it happened

    def test_segmentation_fault(self):
        with pytest.raises(
            errors.ToolError, match="functions:segfault ended without an answer: killed by SIGSEGV"
        ) as caught:
            run("segfault")
        assert caught.value.signal == "SIGSEGV"

    def test_killed_by_the_kernel_is_said_to_be_so(self):
        with pytest.raises(errors.ToolError, match=r"SIGKILL .not by us: the kernel does so when memory runs out"):
            run("kills_itself")

    def test_exit_is_no_answer(self):
        with pytest.raises(errors.ToolError, match="raised SystemExit: 0"):
            run("exits", code=0)
        with pytest.raises(errors.ToolError, match="ended without an answer: exit code 0") as caught:
            run("exits_at_once", code=0)
        assert caught.value.exit_code_of_tool == 0

    def test_garbage_on_the_answer_pipe(self):
        with pytest.raises(errors.ToolError, match="sent something that is no message"):
            run("writes_garbage")

    @pytest.mark.parametrize(
        "name", ["SourceError", "UnsafeSourceError", "UnsupportedError", "ResourceError", "CorruptError"]
    )
    def test_our_errors_keep_their_class(self, name):
        with pytest.raises(errors.ModelMintError, match="wrong: Ünicode") as caught:
            run("raises", kind=name, message="wrong: Ünicode")
        assert type(caught.value) is getattr(errors, name)
        assert str(caught.value) == "wrong: Ünicode"
        assert "isolated_functions.py" in caught.value.__notes__[0]

    def test_our_errors_keep_their_fields(self):
        with pytest.raises(errors.ToolError, match="the converter stopped") as caught:
            run("raises_tool_error")
        error = caught.value
        assert (error.signal, error.exit_code_of_tool, error.stderr_tail) == ("SIGABRT", 3, "last Ünicode line")

    def test_an_error_derived_elsewhere_comes_as_its_known_base(self):
        with pytest.raises(errors.SourceError, match="derived elsewhere") as caught:
            run("raises_private")
        assert type(caught.value) is errors.SourceError

    def test_other_errors_are_wrapped(self):
        with pytest.raises(errors.ToolError, match="raised KeyError: 'no such tensor'") as caught:
            run("raises_foreign")
        assert "in raises_foreign" in caught.value.__notes__[0]

    def test_a_full_disk_is_named(self):
        with pytest.raises(
            errors.ResourceError, match=r"No space left on device: '/store/tmp/model.gguf'; free some disk"
        ):
            run("raises_disk_full")

    def test_an_answer_that_is_no_json(self):
        with pytest.raises(errors.ToolError, match="raised TypeError: Object of type object is not JSON serializable"):
            run("not_json")
        with pytest.raises(errors.ToolError, match="raised ValueError: Out of range float values are not JSON"):
            run("not_a_number")

    def test_an_answer_over_its_limit(self):
        with pytest.raises(errors.ToolError, match="answer_bytes = 1000; return a file's name"):
            run("big", Limits(wall_seconds=60, answer_bytes=1000), size=2000)

    def test_an_unknown_function_or_argument(self):
        with pytest.raises(errors.ToolError, match=r"raised AttributeError: .*no_such_function"):
            run("no_such_function")
        with pytest.raises(errors.ToolError, match=r"raised TypeError: .*unexpected keyword argument 'sise'"):
            run("big", sise=1)

    def test_an_interpreter_that_does_not_exist(self):
        with pytest.raises(errors.ToolError, match="could not be started with /nowhere/python"):
            run("echo", options={"python": Path("/nowhere/python")})

    def test_an_interpreter_that_lacks_modelmint(self, tmp_path):
        with pytest.raises(errors.ToolError, match=r"exit code 1(.|\n)*No module named .?modelmint"):
            call("tests.isolated_functions:echo", {}, limits=LIMITS, python=bare_python(tmp_path))

    def test_the_supervisor_is_told_to_stop(self):
        with pytest.raises(errors.ToolError, match="was stopped from outside by a signal to its supervising process"):
            run("has_its_supervisor_stopped")

    def test_the_supervisor_is_killed(self, tmp_path):
        pid_file = tmp_path / "pid"
        with pytest.raises(errors.ToolError, match=r"lost its supervising process .killed by SIGKILL"):
            run("kills_its_supervisor", pid_file=str(pid_file))
        assert gone_within([int(pid_file.read_text())], 2) == []


def bare_python(folder: Path) -> Path:
    """An interpreter that sees the standard library and nothing else."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    script.chmod(0o755)
    return script


class TestProgress:
    def test_the_caller_hears_rate_and_remaining_time(self):
        heard: list[Progress] = []
        assert run("counts", total=30, pause=0.02, options={"on_progress": heard.append}).value == 30
        assert 3 <= len(heard) <= 12  # at most ten a second
        assert (heard[0].done, heard[0].total, heard[0].unit, heard[0].rate) == (0, 30, "tensors", None)
        assert (heard[-1].done, heard[-1].remaining_seconds) == (30, 0)
        middle = heard[len(heard) // 2]
        assert middle.rate is not None
        assert 5 < middle.rate <= 55
        assert middle.remaining_seconds == pytest.approx((30 - middle.done) / middle.rate)

    def test_lines_of_many_threads_never_mix(self):
        heard: list[Progress] = []
        outcome = run("counts_in_threads", total=2000, options={"on_progress": heard.append})
        assert outcome.value == "x" * 1_000_000
        assert sum(one.done == 2000 for one in heard) == 8

    def test_an_error_of_the_listener_ends_the_child(self):
        def refuse(progress: Progress) -> None:
            raise RuntimeError(f"no more of {progress.unit}")

        started = time.monotonic()
        with pytest.raises(RuntimeError, match="no more of tensors"):
            run("counts", total=600, pause=0.1, options={"on_progress": refuse})
        assert time.monotonic() - started < 20

    def test_outside_of_a_child_it_does_nothing(self):
        isolated_child.progress(1, 2, "tensors")
        assert isolated_child._answer_fd == -1


def test_a_name_appears_in_the_process_list_but_no_argument(tmp_path):
    """Arguments may hold what is nobody's business; they travel on standard input."""
    pid_file = tmp_path / "canary-pids"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, "holds_lock", fd=99, pid_file=str(pid_file), seconds=0.3)
        lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in appears(pid_file)]
        with pytest.raises(errors.ToolError, match="Bad file descriptor"):
            future.result()
    assert all(re.search("tests.isolated_functions:holds_lock", line) for line in lines)
    assert "canary-pids" not in "".join(lines)
