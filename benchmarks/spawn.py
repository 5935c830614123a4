"""Runs one command and writes down its seconds, peak memory and exit code: the small parent of a tool that is measured.

The kernel counts what a process held before `exec` towards its peak, so the parent of a tool has to be smaller than the
tool; a Python that has imported numpy is not.
"""

import os
import sys
import time


def main() -> None:
    descriptor, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(descriptor, False)
    started = time.monotonic()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started
    os.write(descriptor, f"{seconds!r} {usage.ru_maxrss * 1024} {os.waitstatus_to_exitcode(status)}".encode())


if __name__ == "__main__":
    main()
