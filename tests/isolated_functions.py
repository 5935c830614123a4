"""Functions that `test_isolate.py` has run in child processes."""

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from modelmint import errors
from modelmint.isolated_child import progress


def echo(**values: Any) -> dict[str, Any]:
    return values


def modules() -> list[str]:
    return sorted(sys.modules)


def environment() -> dict[str, str]:
    return dict(os.environ)


def prints_and_answers() -> str:
    os.write(1, b"native print on stdout\n")
    os.write(2, b"native print on stderr\n")
    sys.stdout.write("python print")
    return "fine"


def prints(count: int) -> None:
    for number in range(count):
        os.write(2, b"%09d\n" % number)


def big(size: int) -> str:
    return "ß" * size


def not_json() -> object:
    return object()


def not_a_number() -> float:
    return float("nan")


def abort() -> None:
    os.write(2, b"GGML_ASSERT(n_vocab > 0) failed\n")
    os.abort()


def segfault() -> None:
    ctypes.string_at(0)


def exits(code: int) -> None:
    sys.exit(code)


def exits_at_once(code: int) -> None:
    os._exit(code)


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kills_its_supervisor(pid_file: str) -> None:
    Path(pid_file).write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def has_its_supervisor_stopped() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def writes_garbage() -> None:
    """What a native library could do that closes or writes descriptors it does not own."""
    for descriptor in Path("/proc/self/fd").iterdir():
        if int(descriptor.name) > 2 and descriptor.is_fifo():
            os.write(int(descriptor.name), b"\n\xff no message\n")


def raises(kind: str, message: str) -> None:
    raise getattr(errors, kind)(message)


def raises_tool_error() -> None:
    raise errors.ToolError(
        "the converter stopped", signal="SIGABRT", exit_code_of_tool=3, stderr_tail="last Ünicode line"
    )


class PrivateError(errors.SourceError):
    pass


def raises_private() -> None:
    raise PrivateError("derived elsewhere")


def raises_foreign() -> None:
    raise KeyError("no such tensor")


def raises_disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/store/tmp/model.gguf")


def hangs_with_family(pid_file: str, escape: bool) -> None:
    """Hang, with a child and a grandchild that hang too; with `escape` they leave session and process group."""
    script = (
        "import os, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "inner = subprocess.Popen(sleep, start_new_session=bool(sys.argv[1]))\n"
        "print(os.getpid(), inner.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, "yes" if escape else ""], stdout=subprocess.PIPE, start_new_session=escape
    )
    assert child.stdout is not None
    pids = [os.getpid(), os.getppid(), *map(int, child.stdout.readline().split())]
    _publish(pid_file, pids)
    time.sleep(60)


def leaves_family(pid_file: str) -> str:
    """Answer, but leave a process behind that holds every descriptor open."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True, close_fds=False
    )
    _publish(pid_file, [os.getpid(), os.getppid(), child.pid])
    return "done"


def hangs_in_native_code(pid_file: str) -> None:
    """Sit in a C call that holds the interpreter's lock."""
    _publish(pid_file, [os.getpid(), os.getppid()])
    ctypes.PyDLL(None).sleep(60)


def hangs_in_python(pid_file: str) -> None:
    _publish(pid_file, [os.getpid(), os.getppid()])
    while True:
        time.sleep(1)


def burns() -> None:
    while True:
        pass


def allocates(megabytes: int, seconds: float) -> int:
    block = bytearray(megabytes * 1_000_000)
    for index in range(0, len(block), 4096):
        block[index] = 1
    time.sleep(seconds)
    return len(block)


def allocates_in_child(megabytes: int, seconds: float) -> None:
    script = f"b = bytearray(b'x') * {megabytes * 1_000_000}; import time; time.sleep({seconds})"
    subprocess.run([sys.executable, "-c", script], check=True)


def maps(path: str) -> int:
    """Touch every page of a mapped file, as a tool does that maps a model."""
    import mmap

    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        total = sum(mapped[index] for index in range(0, len(mapped), 4096))
        time.sleep(0.3)
        return total


def counts(total: int, pause: float) -> int:
    for done in range(total + 1):
        progress(done, total, "tensors")
        time.sleep(pause)
    return total


def counts_in_threads(total: int) -> str:
    threads = [threading.Thread(target=counts, args=(total, 0.0)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "x" * 1_000_000


def connects(port: int) -> str:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError as error:
        return type(error).__name__ + ": " + str(error)
    return "connected"


def uses_files(readable: str, writable: str) -> dict[str, Any]:
    Path(writable).write_text(Path(readable).read_text() + " and written")
    return {"uid": os.getuid(), "owner": Path(writable).stat().st_uid, "cwd": str(Path.cwd())}


def holds_lock(fd: int, pid_file: str, seconds: float) -> bool:
    _publish(pid_file, [os.getpid(), os.getppid()])
    time.sleep(seconds)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _publish(path: str, pids: list[int]) -> None:
    temporary = Path(path + ".new")
    temporary.write_text(json.dumps(pids))
    temporary.rename(path)
