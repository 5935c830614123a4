#!/usr/bin/env python3
"""Builds llama-quantize, llama-perplexity and llama-bench to compare with: same source, same instruction-set flags.

Source and flags are those of the installed binding, read from the converter's source.json, so both sides of a
comparison run the same kernels. The three programs and their libraries land in `.cache/llama_tools/<key>/`, where the
key is the hash of what decides their content; nothing else of llama.cpp is built.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

TOOLS = ("llama-quantize", "llama-perplexity", "llama-bench")
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "llama_tools"
SOURCE_RECORD = Path(sys.prefix) / "share" / "modelmint" / "llama.cpp" / "source.json"


class BuildError(Exception):
    """What went wrong and the way out."""


def build(jobs: int) -> dict[str, Path]:
    """Returns the path of each tool by its name, built if the cache has none.

    Raises:
        BuildError: the binding is not installed, cmake is missing, or the build failed.
    """
    if not SOURCE_RECORD.exists():
        raise BuildError(f"{SOURCE_RECORD} is missing: run `make install` first.")
    record = json.loads(SOURCE_RECORD.read_text())
    flags = _flags(record["cmake_args"])
    key = hashlib.sha256(json.dumps([record["sdist_sha256"], flags]).encode()).hexdigest()[:32]
    final = CACHE / key
    if not final.exists():
        _build_into(final, flags, jobs)
    return {name: final / name for name in TOOLS}


def _flags(binding: list[str]) -> list[str]:
    """The binding's instruction-set flags, and the parts of llama.cpp that the three tools need."""
    return [
        *(flag for flag in binding if flag.startswith("-DGGML_")),
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        # Programs find their libraries beside themselves, also after the folder was renamed into the cache.
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
        "-DLLAMA_BUILD_COMMON=ON",
        "-DLLAMA_BUILD_TOOLS=ON",
        *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("APP", "EXAMPLES", "SERVER", "TESTS", "UI")),
        "-DLLAMA_OPENSSL=OFF",
    ]


def _build_into(final: Path, flags: list[str], jobs: int) -> None:
    if not shutil.which("cmake"):
        raise BuildError("cmake is not on the PATH: install it, on Debian or Ubuntu with `apt-get install cmake`.")
    CACHE.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="work-", dir=CACHE) as name:
        work = Path(name)
        with tarfile.open(_sdist()) as archive:
            archive.extractall(work / "source", filter="data")
        (source,) = (work / "source").glob("*/vendor/llama.cpp")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _run("cmake", *generator, "-S", str(source), "-B", str(work / "build"), *flags)
        print(f"building {', '.join(TOOLS)} with {jobs} jobs (minutes)", file=sys.stderr, flush=True)
        _run("cmake", "--build", str(work / "build"), "--parallel", str(jobs), "--target", *TOOLS)
        (work / "build" / "bin").replace(final)
    print(f"built in {time.monotonic() - started:.0f} s", file=sys.stderr)


def _sdist() -> Path:
    command = [sys.executable, str(ROOT / "infra" / "llama_cpp.py"), "--sdist"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise BuildError("infra/llama_cpp.py could not get the source; its message is above.")
    return Path(done.stdout.strip())


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(f"`{' '.join(command)}` failed:\n{done.stdout[-4000:].rstrip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build llama.cpp's own tools and print their paths.")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at once (%(default)s)"
    )
    try:
        tools = build(parser.parse_args().jobs)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*tools.values(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
