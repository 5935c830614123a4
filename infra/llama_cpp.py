#!/usr/bin/env python3
"""Installs llama.cpp as one pinned unit: the Python binding, its native library and the converter that belongs to it.

The source distribution of llama-cpp-python carries all of llama.cpp at the commit the binding was written for. From
that one file, checked by SHA-256 before anything in it runs, this script

1. builds the wheel, with fixed instruction-set flags instead of "native", so that the same inputs give the same bytes
   on another machine of the same architecture;
2. installs it into the virtual environment whose Python runs this script;
3. unpacks the converter, which the wheel leaves out, into that environment:

       <venv>/share/modelmint/llama.cpp/
           convert_hf_to_gguf.py  conversion/  gguf-py/  LICENSE
           source.json             version, sdist hash, build flags, hash of every file: the tool's identity

The wheel stays in `.cache/llama_cpp/<key>/`, where the key is the hash of everything that decides its content; a second
environment reuses it. Each result appears by one rename, so an interrupted run leaves nothing half-made. Only the
standard library is used, because this runs before anything else is installed.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# The package asks for "0.9.2 or newer"; an exact build back end keeps today's build repeatable tomorrow.
BUILD_CONSTRAINTS = ["scikit-build-core==1.1.2"]

INSTRUCTION_SETS = {
    "x86_64": ["-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON"],
}
CPU_FLAGS = {"x86_64": {"avx", "avx2", "fma", "f16c", "bmi2"}}
NOT_NEEDED = [
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
]
# The package forces llama.cpp's library for command-line programs on: half of the compile time for code that the
# binding never loads. CMake reads this file at the start of the inner project, the last moment to switch it off again.
CMAKE_INCLUDE = 'set(LLAMA_BUILD_COMMON OFF CACHE BOOL "not needed by the binding" FORCE)\n'

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "llama_cpp"
SOURCE_PREFIX = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE", "LICENSE")


class SetupError(Exception):
    """What went wrong, which value, and the way out."""


def main() -> int:
    arguments = _arguments()
    try:
        with _lock(arguments.cache):
            if arguments.sdist:
                print(sdist(arguments.cache))
            elif arguments.wheel:
                print(wheel(arguments.cache))
            else:
                install(arguments.cache)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def install(cache: Path) -> None:
    """Brings binding and converter into this Python's virtual environment; does nothing when both are there."""
    if sys.prefix == sys.base_prefix:
        raise SetupError(
            f"{sys.executable} is not in a virtual environment, and this script installs into one. "
            "Run `make install`, or `.venv/bin/python infra/llama_cpp.py`."
        )
    home = Path(sys.prefix) / "share" / "modelmint" / "llama.cpp"
    if _binding_is_installed() and _converter_is_intact(home):
        return
    built = wheel(cache)
    _say(f"installing {built.name}")
    _pip("install", "--no-deps", "--force-reinstall", str(built))
    _unpack_converter(sdist(cache), home)


def sdist(cache: Path) -> Path:
    """Returns the source distribution, fetched if need be, its content checked either way."""
    path = cache / "sdist" / f"llama_cpp_python-{VERSION}.tar.gz"
    if path.exists():
        _check_sdist(path)
        return path
    _say(f"fetching the source of {PACKAGE} {VERSION} (77 MB)")
    with _work_folder(cache) as work:
        # With a hash in the requirement pip checks the file before it runs any code of it.
        pinned = work / "requirements.txt"
        pinned.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
        _pip(
            *("download", "--no-deps", "--no-binary", PACKAGE, "--require-hashes"),
            *("--build-constraint", str(_build_constraints(work)), "--dest", str(work), "--requirement", str(pinned)),
            environment={"TMPDIR": str(work)},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        (work / path.name).replace(path)
    _check_sdist(path)
    return path


def wheel(cache: Path) -> Path:
    """Returns the wheel for this machine's architecture and this Python, built if the cache has none."""
    folder = cache / wheel_key()
    found = sorted(folder.glob("*.whl"))
    if found:
        return found[0]
    _check_machine()
    source = sdist(cache)
    jobs = _cores()
    _say(f"building {PACKAGE} {VERSION} with {jobs} jobs (about 2 minutes on 2 cores)")
    started = time.monotonic()
    with _work_folder(cache) as work:
        output = work / "wheel"
        include = work / "without-common.cmake"
        include.write_text(CMAKE_INCLUDE)
        _pip(
            *("wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", str(output)),
            *("--build-constraint", str(_build_constraints(work)), str(source)),
            environment={
                "CMAKE_ARGS": shlex.join([*cmake_args(), f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={include}"]),
                # Flags from the caller's shell, such as -march=native, would make another library than is recorded.
                "CFLAGS": "",
                "CXXFLAGS": "",
                "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
                "TMPDIR": str(work),
            },
        )
        output.replace(folder)
    _say(f"built in {time.monotonic() - started:.0f} s")
    return next(folder.glob("*.whl"))


def cmake_args() -> list[str]:
    """The build flags of this architecture, in the order they are recorded."""
    return ["-DGGML_NATIVE=OFF", *INSTRUCTION_SETS.get(platform.machine(), []), *NOT_NEEDED]


def wheel_key() -> str:
    """Names the wheel by all that decides its content."""
    parts = {
        "sdist_sha256": SDIST_SHA256,
        "cmake_args": cmake_args(),
        "cmake_include": CMAKE_INCLUDE,
        "build_constraints": BUILD_CONSTRAINTS,
        "python": f"{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def identity(files: dict[str, str]) -> dict[str, object]:
    """The content of source.json: which tool this is, and the SHA-256 of each converter file."""
    return {
        "schema": 1,
        "package": PACKAGE,
        "version": VERSION,
        "sdist_sha256": SDIST_SHA256,
        "cmake_args": cmake_args(),
        "files": files,
    }


def _binding_is_installed() -> bool:
    """True when the installed binding came from the wheel that this script would build."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    # pip notes where a wheel given by path came from; the folder's name is the key.
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return distribution.version == VERSION and wheel_key() in origin.get("url", "")


def _converter_is_intact(home: Path) -> bool:
    try:
        recorded = json.loads((home / "source.json").read_text())
        present = {name: _sha256(home / name) for name in recorded["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(present) and recorded == identity(present)


def _unpack_converter(source: Path, home: Path) -> None:
    _say(f"unpacking the converter into {home}")
    _clear_leftovers(home.parent)
    with _work_folder(home.parent) as work:
        fresh = work / home.name
        with tarfile.open(source) as archive:
            for member in archive:
                name = member.name.removeprefix(SOURCE_PREFIX)
                if name != member.name and member.isfile() and name.startswith(CONVERTER_PARTS):
                    member.name = name
                    archive.extract(member, fresh, filter="data")
        files = {path.relative_to(fresh).as_posix(): _sha256(path) for path in fresh.rglob("*") if path.is_file()}
        if "convert_hf_to_gguf.py" not in files:
            raise SetupError(f"{source} has no {SOURCE_PREFIX}convert_hf_to_gguf.py: its layout changed.")
        record = json.dumps(identity(dict(sorted(files.items()))), indent=1)
        (fresh / "source.json").write_text(record + "\n")
        if home.exists():
            home.replace(work / "old")
        fresh.replace(home)


def _check_sdist(path: Path) -> None:
    found = _sha256(path)
    if found != SDIST_SHA256:
        raise SetupError(
            f"{path} has SHA-256 {found}, expected {SDIST_SHA256}. Delete it and try again; if it comes back the same, "
            "the package index serves another file than the one this project was tested with."
        )


def _check_machine() -> None:
    compiler = os.environ.get("CXX", "c++")
    if not any(shutil.which(name) for name in (compiler.split()[0], "g++", "clang++")):
        raise SetupError(
            f"no C++ compiler: neither {compiler}, g++ nor clang++ is on the PATH. "
            "Install one, on Debian or Ubuntu with `apt-get install g++`."
        )
    missing = CPU_FLAGS.get(platform.machine(), set()) - _cpu_flags()
    if missing and Path("/proc/cpuinfo").exists():
        raise SetupError(
            f"this CPU lacks {', '.join(sorted(missing))}, for which the native library is built; it would crash. "
            "Take a machine that has them (x86-64-v3, any x86 server since 2015), or change INSTRUCTION_SETS in "
            f"{Path(__file__).name}: artifacts then differ from those of other machines."
        )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Runs pip quietly; on failure its whole output is in the error.

    Raises:
        SetupError: pip failed.
    """
    # -qq drops pip's warnings about package locations that do not exist; what fails is still said.
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode == 0:
        return
    hint = ""
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stdout:
        hint = f"\nThe package index serves another {PACKAGE} {VERSION} than the one this project was tested with."
    elif "Failed to establish a new connection" in done.stdout or "No matching distribution" in done.stdout:
        hint = f"\nIs the package index reachable? `pip download --no-deps {PACKAGE}=={VERSION}` must work."
    raise SetupError(f"pip {arguments[0]} failed with exit code {done.returncode}:\n{done.stdout.rstrip()}{hint}")


def _build_constraints(work: Path) -> Path:
    path = work / "build-constraints.txt"
    path.write_text("\n".join(BUILD_CONSTRAINTS) + "\n")
    return path


@contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as its result, so that the result can be renamed into place."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=parent) as name:
        yield Path(name)


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """One run at a time, so that two environments set up together build once. It is free at once after a kill."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _clear_leftovers(cache)
        yield


def _clear_leftovers(parent: Path) -> None:
    for leftover in parent.glob("work-*"):
        shutil.rmtree(leftover)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _say(text: str) -> None:
    print(f"llama.cpp: {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Install llama.cpp's binding and converter into this environment.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where source and wheel are kept (%(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--sdist", action="store_true", help="fetch the source, print its path, install nothing")
    only.add_argument("--wheel", action="store_true", help="build the wheel, print its path, install nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
