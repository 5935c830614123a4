"""The child's side of `modelmint.isolate`: a supervisor, and under it the worker that runs one function.

::

    caller (thread in isolate.call)
    └── supervisor   a bare interpreter: holds the limits, ends everything, is never busy
        └── worker   runs the function: may crash, hang, hold the interpreter's lock, start processes of its own

The supervisor exists because nobody else can keep the promise "no survivors, no zombies" when the caller itself is
killed: it is the subreaper of all that the worker starts, so that even a process that left the group falls to it. It
holds the inherited file descriptors too, so a lock among them is free only when the last descendant is gone. The worker
is a fork of it, taken while the process is single-threaded and has imported next to nothing; no state of the caller is
ever forked.

Each dies with its parent by PR_SET_PDEATHSIG, which the kernel delivers whatever the process does, also inside native
code that holds the interpreter's lock. The signal is sent when the parent's *thread* ends; that is right here, because
the thread that starts a child stays in `isolate.call` until the child is gone, in a thread pool as anywhere.

Only light modules of the standard library are imported: what this file loads is added to the peak memory of every tool.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

ALLOWED_PREFIXES = ("modelmint.", "tests.")
PROGRESS_SECONDS = 0.1
MEMORY_POLL_SECONDS = 0.05
TREE_POLL_SECONDS = 1.0
QUIET_SECONDS = 60.0
KILL_SECONDS = 10.0

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

_answer_fd = -1
_answer_lock = threading.Lock()
_progress_sent = 0.0


def progress(done: float, total: float, unit: str) -> None:
    """Tell the caller how far the running function is; at most ten times a second, and always at the end.

    Outside a child process this does nothing, so that the same function can be called directly.

    Args:
        done: how much is done, in `unit`.
        total: how much there is to do, in `unit`; 0 where nobody knows.
        unit: what is counted, such as ``tensors`` or ``bytes``.
    """
    global _progress_sent
    now = time.monotonic()
    if _answer_fd < 0 or (now - _progress_sent < PROGRESS_SECONDS and done != total):
        return
    _progress_sent = now
    _send({"kind": "progress", "done": done, "total": total, "unit": unit})


def main() -> NoReturn:
    """Be the supervisor of one call: start the worker, watch it, end everything, report how it ended."""
    global _answer_fd
    plan = json.loads(sys.argv[1])
    _answer_fd = plan["answer_fd"]
    os.set_inheritable(_answer_fd, False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _WATCHED)
    isolated = not plan["network"] and _leave_network()
    if plan["require_isolation"] and not isolated:
        _send({"kind": "refused"})
        os._exit(0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # After the namespaces: a change of credentials clears the signal.
    _die_with_parent(plan["parent"], signal.SIGTERM)
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        _work(plan, supervisor)
    # Here as well as in the worker: whoever comes first, the group exists before anybody kills it.
    os.setpgid(worker, worker)
    end = _supervise(worker, plan)
    _send({"kind": "end", "network_isolated": isolated} | end)
    os._exit(0)


# The supervisor ------------------------------------------------------------------------------------------------------


def _supervise(worker: int, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Wait for the worker to end, a limit to be passed or a signal to stop; then leave nothing alive."""
    started = time.monotonic()
    tree, tree_at, used = [worker], started, 0
    limit, measured, status = "", 0.0, None
    while status is None and not limit:
        elapsed = time.monotonic() - started
        pause = MEMORY_POLL_SECONDS if plan["memory_bytes"] else QUIET_SECONDS
        received = signal.sigtimedwait(_WATCHED, max(0.0, min(pause, plan["wall_seconds"] - elapsed)))
        status = _reap().get(worker)
        elapsed = time.monotonic() - started
        if status is not None:
            break
        if received is not None and received.si_signo != signal.SIGCHLD:
            limit = "stopped"
        elif elapsed >= plan["wall_seconds"]:
            limit, measured = "wall_seconds", elapsed
        elif plan["memory_bytes"]:
            if elapsed - (tree_at - started) > TREE_POLL_SECONDS:
                tree, tree_at = [worker, *(pid for pid in _descendants() if pid != worker)], time.monotonic()
            used = sum(_memory_of(pid) for pid in tree)
            if used > plan["memory_bytes"]:
                limit, measured = "memory_bytes", float(used)
    survivors, status = _end_all(worker, status)
    exit_code = None if status is None else os.waitstatus_to_exitcode(status)
    return {"exit_code": exit_code, "limit": limit, "measured": measured, "survivors": survivors}


def _end_all(worker: int, status: int | None) -> tuple[list[int], int | None]:
    """Kill and reap every descendant; return those that the kernel did not let go, and the worker's status."""
    deadline = time.monotonic() + KILL_SECONDS
    if status is None:
        os.killpg(worker, signal.SIGKILL)
    while True:
        reaped = _reap()
        status = reaped.get(worker, status)
        if _childless():
            return [], status
        remaining = _descendants()
        for pid in remaining:
            _kill(pid)
        if time.monotonic() > deadline:
            return remaining, status
        signal.sigtimedwait((signal.SIGCHLD,), 0.02)


def _reap() -> dict[int, int]:
    """Collect every child that has ended, own or orphaned to us: process id to wait status."""
    reaped: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return reaped
        if pid == 0:
            return reaped
        reaped[pid] = status


def _childless() -> bool:
    """Whether no child is left; as we are the subreaper, that means no descendant at all."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _descendants() -> list[int]:
    """Every process below this one, by the parents named in /proc; not every kernel lists children by itself."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    pending = [os.getpid()]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib would cost every child memory
        if name.isdigit():
            # The command's name stands in parentheses and may hold any character; the parent follows the state.
            fields = _read(f"/proc/{name}/stat").rpartition(")")[2].split()
            if len(fields) > 1:
                yield int(name), int(fields[1])


def _memory_of(pid: int) -> int:
    """Memory that a process holds and cannot drop, in bytes: private, shared and swapped, without mapped files.

    Pages of a memory-mapped model are a cache that the kernel takes back when it must.
    """
    kilobytes = 0
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def _read(path: str) -> str:
    """The text of a file of /proc; empty where its process has just gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


# The worker ----------------------------------------------------------------------------------------------------------


def _work(plan: Mapping[str, Any], supervisor: int) -> NoReturn:
    """Run the function and send its answer or its error.

    The process ends by `_exit`: an answer that is complete must not be spoilt by a native destructor that crashes.
    """
    try:
        _become_worker(plan, supervisor)
        with os.fdopen(os.dup(0), "rb") as stdin:
            arguments = json.loads(stdin.read())
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        value = _function(plan["function"])(**arguments)
        _send({"kind": "answer", "value": value, "peak_memory_bytes": _peak_memory()}, plan["answer_bytes"])
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller raises it
        _send(_described(error))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _become_worker(plan: Mapping[str, Any], supervisor: int) -> None:
    import faulthandler
    import resource

    # A group of its own, so that the supervisor can kill all of it without itself.
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _die_with_parent(supervisor, signal.SIGKILL)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, limit in ((resource.RLIMIT_CPU, plan["cpu_seconds"]), (resource.RLIMIT_AS, plan["address_space_bytes"])):
        if limit:
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    # When the machine runs out of memory, the kernel shall take the tool and not the worker that waits for it.
    with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:  # noqa: PTH123
        if int(file.read()) < 500:
            file.write("500")


def _function(name: str) -> Any:
    """The function behind `package.module:function`; only our own packages are ever imported."""
    import importlib

    module, _, attribute = name.partition(":")
    if not module.startswith(ALLOWED_PREFIXES):
        raise ValueError(f"{name}: only functions of {', '.join(ALLOWED_PREFIXES)} run in a child")
    return getattr(importlib.import_module(module), attribute)


def _peak_memory() -> int:
    """VmHWM in bytes: the most this process held resident. `ru_maxrss` would carry over the caller's."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _described(error: BaseException) -> dict[str, Any]:
    """An error as JSON: type, text and traceback, and class and fields where it is one of `modelmint.errors`."""
    import traceback

    described: dict[str, Any] = {
        "kind": "error",
        "type": type(error).__name__,
        "text": str(error),
        "traceback": "".join(traceback.format_exception(error))[-16384:],
        "errno": error.errno if isinstance(error, OSError) else None,
    }
    known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "modelmint.errors"]
    if known:
        described |= {"class": known[0], "arguments": error.args, "fields": vars(error)}
    return described


# Both ----------------------------------------------------------------------------------------------------------------


def _send(message: Mapping[str, Any], at_most: int | None = None) -> None:
    """Write one message as one line; native code that prints never meets this pipe.

    It starts with a line end too: a worker killed in the middle of a line must not spoil what the supervisor says next.
    """
    line = b"\n" + json.dumps(message, allow_nan=False, default=None if at_most else str).encode() + b"\n"
    if at_most is not None and len(line) > at_most:
        raise ValueError(f"the answer has {len(line)} bytes, more than answer_bytes = {at_most}; return a file's name")
    with _answer_lock:
        view = memoryview(line)
        while view:
            view = view[os.write(_answer_fd, view) :]


def _leave_network() -> bool:
    """Move into a network namespace of its own, where nothing is connected, not even loopback; False if refused.

    A privileged process needs no user namespace for it and keeps its rights on every file. Others get one in which they
    are themselves, so that their files stay theirs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1"), ("uid_map", f"{uid} {uid} 1")):
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(text)
        except PermissionError:
            # Root without capabilities may not map itself: its name is lost, its rights on its files are not.
            continue
    return True


def _die_with_parent(parent: int, with_signal: int) -> None:
    """Have the kernel signal this process when its parent ends; leave at once if that has happened already."""
    _prctl(_PR_SET_PDEATHSIG, with_signal)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


if __name__ == "__main__":
    # By its own name, not as __main__: `progress`, called by the function, must find the pipe of this very module.
    from modelmint import isolated_child

    isolated_child.main()
