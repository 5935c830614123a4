"""What this machine is: the host of a figure, and the hardware class it holds for."""

import os
import platform
import shutil
import socket
from functools import cache
from pathlib import Path

from modelmint.report import HardwareClass, Host

DECISIVE_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)
"""The flags by which kernels of the tools are chosen: other flags of a processor do not change a result."""


@cache
def host() -> Host:
    """This machine: processor, cores that may be used, instruction-set flags, memory, system and name."""
    cpu, flags = _processor(Path("/proc/cpuinfo"))
    return Host(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        flags=flags,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        name=socket.gethostname(),
    )


def hardware_class(threads: int, provider: str = "cpu") -> HardwareClass:
    """The class that a figure taken here holds for.

    Args:
        threads: the number of threads the tool was given.
        provider: what computes.
    """
    flags = set(host().flags)
    instructions = " ".join([platform.machine(), *(flag for flag in DECISIVE_FLAGS if flag in flags)])
    return HardwareClass(instructions=instructions, provider=provider, threads=threads)


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory_bytes() -> int:
    """Memory that could be used without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable; a Linux kernel of 3.14 or newer is needed")


def _processor(cpuinfo: Path) -> tuple[str, tuple[str, ...]]:
    """Model name and flags of the first processor."""
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or "unknown processor", tuple(sorted(flags.split()))
