"""Run one function of ours in a child process, so that native code never kills, hangs or bloats a worker.

`call` starts `python -P -m modelmint.isolated_child` by exec; nothing of the caller's state is forked. The arguments go
in as JSON on standard input, the answer comes back as JSON on a pipe of its own, so that libraries may print what they
like.
`modelmint.isolated_child` says how the child is built and why.
"""

import errno
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from modelmint import errors
from modelmint.errors import ModelMintError, ResourceError, ToolError, UnsupportedError
from modelmint.isolated_child import ALLOWED_PREFIXES, KILL_SECONDS, progress

__all__ = ["JSON", "Limits", "Outcome", "Progress", "call", "progress"]

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

TAIL_BYTES = 64 * 1024
# Exceptions set by an orchestrator to cancel this thread are delivered between two waits.
_WAIT_SECONDS = 0.25
# How much later than the supervisor's own deadline the caller stops believing in it.
_PATIENCE_SECONDS = KILL_SECONDS + 5.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_ALWAYS = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The order of sets is part of what tools write; the same inputs give the same bytes.
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True)
class Limits:
    """What a child may use; past any of it the child and all it started are killed.

    Args:
        wall_seconds: time from start to answer.
        memory_bytes: memory of the child and its descendants that cannot be dropped (private, shared and swapped;
            pages of mapped files do not count), looked at twenty times a second.
        cpu_seconds: processor time of each single process.
        address_space_bytes: hard bound on virtual memory of each process; wrong for mapped models, right for templates.
        answer_bytes: size of the answer as JSON.
        way_out: how a person raises these limits; ends the message of the error.
    """

    wall_seconds: float
    memory_bytes: int | None = None
    cpu_seconds: int | None = None
    address_space_bytes: int | None = None
    answer_bytes: int = 64 * 1024 * 1024
    way_out: str = "if the work is sound, raise MODELMINT_STEP_SECONDS or MODELMINT_STEP_MEMORY_BYTES"

    def __post_init__(self) -> None:
        """Refuse limits that nothing can keep."""
        for name in ("wall_seconds", "memory_bytes", "cpu_seconds", "address_space_bytes", "answer_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: a limit is greater than 0")


@dataclass(frozen=True)
class Progress:
    """How far a child is: `done` of `total` (0 if unknown) in `unit`, units per second, and the seconds that remain."""

    done: float
    total: float
    unit: str
    rate: float | None
    remaining_seconds: float | None


@dataclass(frozen=True)
class Outcome:
    """What a call gave and what it took.

    `peak_memory_bytes` is VmHWM read inside the child, without processes that it started itself; `stderr_tail` the last
    64 KiB that it printed to standard output and standard error; `network_isolated` whether it ran in a network
    namespace of its own.
    """

    value: Any
    seconds: float
    peak_memory_bytes: int
    network_isolated: bool
    stderr_tail: str


def call(
    function: str,
    arguments: Mapping[str, JSON],
    *,
    limits: Limits,
    keep_fds: Sequence[int] = (),
    python_path: Sequence[Path] = (),
    python: Path | None = None,
    network: bool = False,
    require_isolation: bool = False,
    environment: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> Outcome:
    """Call a function in a child process and wait for its answer; whatever happens, nothing of the child stays alive.

    Args:
        function: ``package.module:function``, in one of our packages; it is called with `arguments` as keywords.
        arguments: JSON values only.
        limits: time and memory.
        keep_fds: file descriptors that the child inherits, such as a lock: held until the last descendant is gone.
        python_path: folders that come first on the child's ``sys.path``.
        python: interpreter of another environment, in which `modelmint` can be imported; this one if None.
        network: whether the child keeps the network, and libraries may use it.
        require_isolation: refuse to run where the kernel does not let the child leave the network.
        environment: variables added to the child's clean environment, such as thread counts.
        on_progress: called in this thread for each `progress` of the function.
        cwd: working folder of the child.
        log: file to which everything that the child prints is appended.

    Raises:
        ResourceError: a limit was passed, or memory or disk ran out in the child.
        ToolError: the child crashed, exited, raised an error that is not ours, or gave no sound answer.
        UnsupportedError: `require_isolation`, and this machine cannot do it.
        ModelMintError: what the function itself raised, in its own class.
    """
    if not function.startswith(ALLOWED_PREFIXES):
        raise ValueError(f"{function}: only functions of {', '.join(ALLOWED_PREFIXES)} run in a child")
    if network and require_isolation:
        raise ValueError(f"{function}: network and require_isolation contradict each other")
    started = time.monotonic()
    with ExitStack() as stack:
        answer, answer_of_child = _pipe(stack)
        output, output_of_child = _pipe(stack)
        # Sealed in memory: a pipe would block on large arguments while the child starts.
        request = stack.enter_context(os.fdopen(os.memfd_create("request"), "w+b"))
        request.write(json.dumps(arguments, allow_nan=False).encode())
        request.seek(0)
        plan = {
            "function": function,
            "parent": os.getpid(),
            "answer_fd": answer_of_child.fileno(),
            "network": network,
            "require_isolation": require_isolation,
            "wall_seconds": limits.wall_seconds,
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": limits.cpu_seconds,
            "address_space_bytes": limits.address_space_bytes,
            "answer_bytes": limits.answer_bytes,
        }
        try:
            process = subprocess.Popen(
                [python or sys.executable, "-P", "-u", "-m", "modelmint.isolated_child", json.dumps(plan)],
                stdin=request,
                stdout=output_of_child,
                stderr=output_of_child,
                pass_fds=[*keep_fds, answer_of_child.fileno()],
                env=_environment(python_path, network, environment or {}),
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolError(f"{function} could not be started with {python or sys.executable}: {error}") from error
        stack.callback(_end, process, function)
        answer_of_child.close()
        output_of_child.close()
        heard = _Heard(function, limits, on_progress, stack.enter_context(log.open("ab")) if log else None)
        _listen(process, answer, output, heard, started + limits.wall_seconds + _PATIENCE_SECONDS)
        _end(process, function)
        return _outcome(heard, process.returncode, time.monotonic() - started)


@dataclass
class _Heard:
    """What the child has said so far."""

    function: str
    limits: Limits
    on_progress: Callable[[Progress], None] | None
    log: BinaryIO | None
    line: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    first: tuple[float, float] | None = None

    @property
    def tail(self) -> str:
        return self.output[-TAIL_BYTES:].decode(errors="replace")

    def take_output(self, data: bytes) -> None:
        if self.log:
            self.log.write(data)
        self.output += data
        if len(self.output) > 2 * TAIL_BYTES:
            del self.output[:-TAIL_BYTES]

    def take_answer(self, data: bytes) -> None:
        """Add what came on the answer pipe, and act on each line that is complete."""
        *complete, rest = data.split(b"\n")
        for part in complete:
            self.line += part
            self._take_line(bytes(self.line))
            self.line.clear()
        self.line += rest
        if len(self.line) > self.limits.answer_bytes:
            raise ToolError(
                f"{self.function} gave an answer of more than answer_bytes = {self.limits.answer_bytes}; "
                "it should write a file and return its name",
                stderr_tail=self.tail,
            )

    def _take_line(self, line: bytes) -> None:
        if not line:
            return
        try:
            message = json.loads(line)
            kind = message["kind"]
        except (ValueError, KeyError, TypeError):
            kind, message = "garbage", {"text": line[:200].decode(errors="replace")}
        if kind == "progress":
            self._take_progress(message)
        else:
            self.said[kind] = message

    def _take_progress(self, message: Mapping[str, Any]) -> None:
        if self.on_progress is None:
            return
        now, done, total = time.monotonic(), message["done"], message["total"]
        rate = None
        if self.first is None:
            self.first = (now, done)
        elif done > self.first[1] and now > self.first[0]:
            rate = (done - self.first[1]) / (now - self.first[0])
        remaining = (total - done) / rate if rate and total else None
        self.on_progress(Progress(done, total, message["unit"], rate, remaining))


def _listen(process: subprocess.Popen[bytes], answer: BinaryIO, output: BinaryIO, heard: _Heard, until: float) -> None:
    """Hear the child until its supervisor says that all has ended, is gone itself, or is long overdue."""
    with selectors.DefaultSelector() as selector:
        selector.register(answer, selectors.EVENT_READ, heard.take_answer)
        selector.register(output, selectors.EVENT_READ, heard.take_output)
        gone = False
        while not gone and "end" not in heard.said and "refused" not in heard.said and time.monotonic() < until:
            gone = process.poll() is not None
            _hear(selector, 0 if gone else _WAIT_SECONDS)
        # What was written last is still in the pipes, and they hold less than two portions.
        for _ in range(2):
            _hear(selector, 0)


def _hear(selector: selectors.BaseSelector, timeout: float) -> None:
    """Take one portion from each pipe that has some."""
    for key, _ in selector.select(timeout):
        data = os.read(key.fd, 1 << 20)
        if data:
            key.data(data)
        else:
            selector.unregister(key.fileobj)


def _end(process: subprocess.Popen[bytes], function: str) -> None:
    """Have the supervisor end everything, and reap it; as a last resort kill it, and the worker dies with it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ToolError(
                f"{function}: process {process.pid} did not end after SIGKILL; look for a hanging disk or network mount"
            ) from error


def _outcome(heard: _Heard, exit_code: int, seconds: float) -> Outcome:
    """Judge what was heard: the answer, or the error that fits best."""
    said, function = heard.said, heard.function
    end = said.get("end", {})
    if "refused" in said:
        raise UnsupportedError(
            f"{function}: this machine does not let a process leave the network, and the input is not trusted; "
            "allow user namespaces (sysctl user.max_user_namespaces, the container's seccomp profile), or trust it"
        )
    if end.get("survivors"):
        raise ToolError(f"{function}: processes {end['survivors']} did not end after SIGKILL", stderr_tail=heard.tail)
    if "garbage" in said:
        raise _failed(heard, f"sent something that is no message: {said['garbage']['text']!r}")
    if "error" in said:
        raise _raised(heard, said["error"])
    if "answer" in said and end:
        answer = said["answer"]
        return Outcome(answer["value"], seconds, answer["peak_memory_bytes"], end["network_isolated"], heard.tail)
    if not end:
        raise _failed(heard, f"lost its supervising process ({_ending(exit_code)[0]})", exit_code)
    raise _stopped(heard, end)


def _stopped(heard: _Heard, end: Mapping[str, Any]) -> ModelMintError:
    """The error for a worker that ended without a word."""
    limits, limit, exit_code = heard.limits, end["limit"], end["exit_code"]
    if limit == "wall_seconds":
        detail = f"it had not ended after {end['measured']:.1f} s, and wall_seconds is {limits.wall_seconds:g}"
    elif limit == "memory_bytes":
        detail = f"it held {end['measured'] / 1e6:.0f} MB, and memory_bytes is {limits.memory_bytes}"
    elif exit_code == -signal.SIGXCPU:
        detail = f"it used its processor time, and cpu_seconds is {limits.cpu_seconds}"
    elif limit == "stopped":
        return _failed(heard, "was stopped from outside by a signal to its supervising process")
    else:
        text, _ = _ending(exit_code)
        hint = " (not by us: the kernel does so when memory runs out)" if exit_code == -signal.SIGKILL else ""
        return _failed(heard, f"ended without an answer: {text}{hint}", exit_code)
    return ResourceError(f"{heard.function} was killed: {detail}; {limits.way_out}{_last_words(heard.tail)}")


def _raised(heard: _Heard, error: Mapping[str, Any]) -> ModelMintError:
    """Rebuild one of our errors; wrap any other. Only classes of `modelmint.errors` are ever made."""
    kind = getattr(errors, error.get("class", ""), None)
    if isinstance(kind, type) and issubclass(kind, ModelMintError):
        rebuilt = kind.__new__(kind, *error["arguments"])
        vars(rebuilt).update(error["fields"])
        rebuilt.add_note(f"Raised in the child process that ran {heard.function}:\n{error['traceback']}")
        return rebuilt
    if error["type"] == "MemoryError":
        return ResourceError(f"{heard.function} ran out of memory; {heard.limits.way_out}")
    if error["errno"] in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{heard.function}: {error['text']}; free some disk space and run again")
    failed = _failed(heard, f"raised {error['type']}: {error['text']}")
    failed.add_note(error["traceback"])
    return failed


def _failed(heard: _Heard, what: str, exit_code: int | None = None) -> ToolError:
    name = "" if exit_code is None else _ending(exit_code)[1]
    return ToolError(
        f"{heard.function} {what}{_last_words(heard.tail)}",
        signal=name,
        exit_code_of_tool=exit_code if exit_code is not None and exit_code >= 0 else None,
        stderr_tail=heard.tail,
    )


def _ending(exit_code: int) -> tuple[str, str]:
    """How a process ended, in words, and the name of the signal if it was one."""
    if exit_code >= 0:
        return f"exit code {exit_code}", ""
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"killed by {name}", name


def _last_words(tail: str) -> str:
    """The last lines that the tool itself printed, for the message; the interpreter's stack dump comes after them."""
    lines = [line.strip() for line in tail.partition("Fatal Python error:")[0].splitlines() if line.strip()]
    return "\nIt printed last:\n" + "\n".join(f"  {line[:300]}" for line in lines[-3:]) if lines else ""


def _pipe(stack: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """A pipe whose ends close with the stack: to read, to write."""
    reader, writer = os.pipe()
    return (
        stack.enter_context(os.fdopen(reader, "rb", buffering=0)),
        stack.enter_context(os.fdopen(writer, "wb", buffering=0)),
    )


def _environment(python_path: Sequence[Path], network: bool, added: Mapping[str, str]) -> dict[str, str]:
    """A clean environment: no token, no password, no address of a server; nothing that calls home."""
    # Late, because functions in the child import this module for `progress`, and settings bring pydantic.
    from modelmint.settings import child_environment

    path = {"PYTHONPATH": os.pathsep.join(str(folder) for folder in python_path)} if python_path else {}
    return child_environment() | _ALWAYS | ({} if network else _OFFLINE) | path | dict(added)
