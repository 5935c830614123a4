"""A child process ends when it must: at its limits, with its caller, to the last descendant; and it has no network."""

import ctypes
import fcntl
import json
import os
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
from isolated_calls import ROOT, alive, appears, gone_within, nothing_left, run

from modelmint import errors
from modelmint.isolate import Limits

pytestmark = pytest.mark.pure


@pytest.fixture(autouse=True)
def check_that_nothing_is_left():
    with nothing_left():
        yield


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
