"""A child process contains whatever native code does: crash, hang, bloat, chatter, orphans, the network."""

import ctypes
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modelmint import errors, isolated_child
from modelmint.isolate import Limits, Outcome, Progress, call

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[1]
LIMITS = Limits(wall_seconds=60)


def run(name: str, limits: Limits = LIMITS, options: dict[str, Any] | None = None, **arguments: Any) -> Outcome:
    return call(f"tests.isolated_functions:{name}", arguments, limits=limits, python_path=[ROOT], **(options or {}))


def alive(pid: int) -> bool:
    """Whether a process runs; one that init has not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def appears(path: Path, seconds: float = 20) -> list[int]:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
    pids: list[int] = json.loads(path.read_text())
    return pids


def gone_within(pids: list[int], seconds: float) -> list[int]:
    """The processes that are still there after the time; empty as soon as all have gone."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [pid for pid in pids if alive(pid)]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No descriptor and no process, running or zombie, outlives any call."""

    def held() -> tuple[set[str], set[int]]:
        children = {pid for pid, parent in isolated_child._parents() if parent == os.getpid()}
        return {path.name for path in Path("/proc/self/fd").iterdir()}, children

    before = held()
    yield
    descriptors, children = held()
    assert len(descriptors) <= len(before[0])
    assert children <= before[1]


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


class TestLimits:
    @pytest.mark.parametrize("escape", [False, True])
    def test_a_hanging_family_is_killed_to_the_last(self, tmp_path, escape):
        pid_file = tmp_path / "pids"
        with pytest.raises(
            errors.ResourceError, match=r"had not ended after 2\.\d s, and wall_seconds is 2; .*MODELMINT_STEP"
        ):
            run("hangs_with_family", Limits(wall_seconds=2), pid_file=str(pid_file), escape=escape)
        pids = json.loads(pid_file.read_text())
        assert len(pids) == 4
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []

    def test_native_code_that_holds_the_interpreter_is_killed(self, tmp_path):
        with pytest.raises(errors.ResourceError, match="wall_seconds is 1; give it more"):
            run("hangs_in_native_code", Limits(1, way_out="give it more"), pid_file=str(tmp_path / "pids"))

    def test_what_an_answer_leaves_behind_is_killed(self, tmp_path):
        pid_file = tmp_path / "pids"
        started = time.monotonic()
        assert run("leaves_family", pid_file=str(pid_file)).value == "done"
        assert time.monotonic() - started < 20
        assert [pid for pid in json.loads(pid_file.read_text()) if Path(f"/proc/{pid}").exists()] == []

    def test_time_without_end(self):
        assert run("echo", Limits(wall_seconds=float("inf")), a=1).value == {"a": 1}

    def test_memory(self):
        with pytest.raises(errors.ResourceError, match=r"it held \d+ MB, and memory_bytes is 100000000; if the work"):
            run("allocates", Limits(60, memory_bytes=100_000_000), megabytes=300, seconds=60)

    def test_memory_of_a_grandchild(self):
        with pytest.raises(errors.ResourceError, match="memory_bytes is 100000000"):
            run("allocates_in_child", Limits(60, memory_bytes=100_000_000), megabytes=200, seconds=60)

    def test_a_mapped_file_is_no_memory(self, tmp_path):
        path = tmp_path / "model"
        path.write_bytes(b"\1" * 120_000_000)
        outcome = run("maps", Limits(60, memory_bytes=60_000_000), path=str(path))
        assert outcome.value == len(range(0, 120_000_000, 4096))
        assert outcome.peak_memory_bytes > 120_000_000

    def test_address_space(self):
        with pytest.raises(errors.ResourceError, match="ran out of memory; if the work"):
            run("allocates", Limits(60, address_space_bytes=400_000_000), megabytes=1000, seconds=0)

    def test_processor_time(self):
        with pytest.raises(errors.ResourceError, match="used its processor time, and cpu_seconds is 1"):
            run("burns", Limits(60, cpu_seconds=1))


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


DRIVER = """
import os, signal, sys, json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from modelmint.isolate import Limits, call

def run(function, arguments):
    return call(function, arguments, limits=Limits(60), python_path=[Path(sys.argv[1])])

def stop(*_):
    raise SystemExit(7)

function, arguments, how = sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
if how == "pool":
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, function, arguments).result()
if how == "handler":
    signal.signal(signal.SIGTERM, stop)
try:
    run(function, arguments)
except BaseException as error:
    pids = json.loads(Path(arguments["pid_file"]).read_text())
    print(type(error).__name__, [pid for pid in pids if os.path.exists(f"/proc/{pid}")], flush=True)
    raise
"""


def driver(name: str, how: str, **arguments: Any) -> "subprocess.Popen[str]":
    """A process of its own that makes the call and can be killed."""
    command = [sys.executable, "-c", DRIVER, str(ROOT), f"tests.isolated_functions:{name}", json.dumps(arguments), how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestCallerEnds:
    @pytest.mark.parametrize("how", ["pool", "plain"])
    @pytest.mark.parametrize("name", ["hangs_in_python", "hangs_in_native_code"])
    def test_killed_and_the_child_is_gone(self, tmp_path, name, how):
        with driver(name, how, pid_file=str(tmp_path / "pids")) as caller:
            pids = appears(tmp_path / "pids")
            assert all(map(alive, pids))
            caller.kill()
        assert gone_within(pids, 2) == []

    @pytest.mark.parametrize("escape", [False, True])
    def test_killed_and_the_grandchildren_are_gone(self, tmp_path, escape):
        with driver("hangs_with_family", "plain", pid_file=str(tmp_path / "pids"), escape=escape) as caller:
            pids = appears(tmp_path / "pids")
            caller.kill()
        assert gone_within(pids, 2) == []

    def test_terminated_by_default(self, tmp_path):
        with driver("hangs_in_native_code", "plain", pid_file=str(tmp_path / "pids")) as caller:
            pids = appears(tmp_path / "pids")
            caller.terminate()
        assert gone_within(pids, 2) == []

    @pytest.mark.parametrize(
        ("how", "sent", "error", "code"),
        [
            ("handler", signal.SIGTERM, "SystemExit", 7),
            ("plain", signal.SIGINT, "KeyboardInterrupt", -signal.SIGINT),
        ],
    )
    def test_an_exception_goes_on_after_the_child_is_reaped(self, tmp_path, how, sent, error, code):
        with driver("hangs_in_native_code", how, pid_file=str(tmp_path / "pids")) as caller:
            appears(tmp_path / "pids")
            caller.send_signal(sent)
            output, _ = caller.communicate(timeout=10)
        assert output == f"{error} []\n"
        assert caller.returncode == code

    def test_an_exception_set_on_a_waiting_thread_ends_the_call(self, tmp_path):
        raised: list[type[BaseException]] = []

        class CancelledError(Exception):
            pass

        def work() -> None:
            try:
                run("hangs_in_python", pid_file=str(tmp_path / "pids"))
            except CancelledError:
                raised.append(CancelledError)

        thread = threading.Thread(target=work)
        thread.start()
        pids = appears(tmp_path / "pids")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(CancelledError))
        thread.join(5)
        assert raised == [CancelledError]
        assert gone_within(pids, 0) == []

    def test_a_child_started_too_late_leaves_at_once(self):
        plan = {"answer_fd": 1, "network": True, "require_isolation": False, "parent": os.getpid() + 1_000_000}
        command = [sys.executable, "-P", "-m", "modelmint.isolated_child", json.dumps(plan)]
        ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=20)
        assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"", b"")


class TestLock:
    def test_the_child_holds_the_callers_lock_until_all_is_over(self, tmp_path):
        """The lock of a killed caller is free when its child is gone, and not before."""
        path = tmp_path / "lock"
        pid_file = tmp_path / "pids"
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(
                run, "holds_lock", options={"keep_fds": [fd]}, fd=fd, pid_file=str(pid_file), seconds=0.5
            )
            appears(pid_file)
            os.close(fd)
            with path.open() as other:
                with pytest.raises(BlockingIOError, match="temporarily unavailable"):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                assert future.result().value is True
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def can_leave_network() -> bool:
    return subprocess.run(["unshare", "-Un", "true"], capture_output=True).returncode == 0


# Root is as powerless here as root of a container without capabilities; for others nothing changes.
POWERLESS = """
import ctypes, json, os, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(28, 0b1111, 0, 0, 0)  # PR_SET_SECUREBITS: root gets no capabilities at exec
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert libc.capset(header, (ctypes.c_uint32 * 6)()) == 0
from modelmint.isolate import Limits, call
results = []
for function, arguments in json.loads(sys.argv[2]):
    outcome = call(function, arguments, limits=Limits(60), python_path=[Path(sys.argv[1])])
    results.append([outcome.network_isolated, outcome.value])
print(json.dumps(results))
"""


REFUSED = """
import sys
from pathlib import Path
from modelmint.isolate import Limits, call

def run(**options):
    options = dict(limits=Limits(60), python_path=[Path(sys.argv[1])]) | options
    return call("tests.isolated_functions:echo", {"a": 1}, **options)

outcome = run()
print(outcome.network_isolated, outcome.value)
try:
    run(require_isolation=True)
except Exception as error:
    print(type(error).__name__, error)
"""


class TestNetwork:
    @pytest.fixture
    def port(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()[1]

    def test_the_child_has_none(self, port):
        outcome = run("connects", port=port)
        assert outcome.network_isolated == can_leave_network()
        assert (outcome.value == "connected") != outcome.network_isolated

    def test_it_keeps_the_network_if_asked_to(self, port):
        outcome = run("connects", port=port, options={"network": True})
        assert (outcome.network_isolated, outcome.value) == (False, "connected")

    def test_without_privileges_too_and_its_files_stay_its_own(self, port, tmp_path):
        private, target = tmp_path / "private", tmp_path / "target"
        private.write_text("read")
        private.chmod(0o600)
        functions = [
            ("tests.isolated_functions:connects", {"port": port}),
            ("tests.isolated_functions:uses_files", {"readable": str(private), "writable": str(target)}),
        ]
        command = [sys.executable, "-c", POWERLESS, str(ROOT), json.dumps(functions)]
        ended = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        (isolated, connected), (_, files) = json.loads(ended.stdout)
        assert isolated == can_leave_network()
        assert (connected == "connected") != isolated
        assert target.read_text() == "read and written"
        assert target.stat().st_uid == os.getuid()
        assert target.stat().st_mode & 0o777 == private.stat().st_mode & 0o777 | 0o044
        # Root without capabilities may not map its own name; everybody else, and root with them, keeps it.
        assert files["uid"] in {os.getuid(), 65534}

    def test_files_and_working_folder(self, tmp_path):
        (tmp_path / "a").write_text("a")
        outcome = run(
            "uses_files", readable=str(tmp_path / "a"), writable=str(tmp_path / "b"), options={"cwd": tmp_path}
        )
        assert outcome.value == {"uid": os.getuid(), "owner": os.getuid(), "cwd": str(tmp_path)}

    def test_where_the_kernel_refuses_it_is_recorded_and_untrusted_input_is_refused(self):
        """In a user namespace that may hold no network namespace the kernel says no; some machines always do."""
        forbid = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"', "sh"]
        command = [*(forbid if can_leave_network() else []), sys.executable, "-c", REFUSED, str(ROOT)]
        ended = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
        assert ended.stdout.splitlines()[0] == "False {'a': 1}", ended.stderr
        assert ended.stdout.splitlines()[1].startswith(
            "UnsupportedError tests.isolated_functions:echo: this machine does"
        )

    def test_network_and_isolation_contradict(self):
        with pytest.raises(ValueError, match="network and require_isolation contradict each other"):
            run("echo", options={"network": True, "require_isolation": True})


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
