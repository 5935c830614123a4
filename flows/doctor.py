"""Checks the set-up: what is installed, what the machine offers, and which servers answer; names what is missing."""

import importlib.metadata
import shutil
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from modelmint.errors import ModelMintError, UnsupportedError
from modelmint.settings import Settings

ROOM_BYTES = 5 * 10**9
"""A small model with a handful of variants takes about as much disk."""

MEMORY_BYTES = 2 * 10**9
"""Less than the smallest models take while they are measured."""

ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was checked.
        level: ``ok``, ``note`` for what works but could be better, or ``problem`` for what does not.
        text: what was found.
        way_out: what to do about it; empty for nothing.
    """

    check: str
    level: Literal["ok", "note", "problem"]
    text: str
    way_out: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check in turn, each as soon as it is done."""
    for check in CHECKS:
        yield from check(settings)


BOUNDS: Sequence[tuple[str, tuple[int, ...], tuple[int, ...], str]] = (
    ("prefect", (3, 8, 8), (3, 9), "3.9 is not tested"),
    ("fastapi", (0, 139), (0, 151), "from 0.151 on Prefect's server answers 422, from 0.155 on it does not start"),
    ("mlflow", (3, 17, 2), (3, 18), "3.18 is not tested"),
    ("transformers", (5, 23), (6,), "the reference and the converter are tested with transformers 5"),
    ("huggingface_hub", (2, 4), (3,), "downloads are tested with version 2"),
    ("torch", (2, 13), (2, 14), "references are compared across machines, so their arithmetic is pinned"),
    ("gguf", (0, 19), (0, 20), "0.19 is tested"),
)
"""Packages with the first version that works, the first that does not, and why."""


def _packages(settings: Settings) -> Iterator[Finding]:
    found = []
    for name, first, beyond, why in BOUNDS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "problem", "not installed", "run make install")
            continue
        found.append(f"{name} {version}")
        if not first <= _numbers(version) < beyond:
            bounds = f">={_dotted(first)},<{_dotted(beyond)}"
            yield Finding(name, "problem", f"{version} is installed: {why}", f"pip install '{name}{bounds}'")
    yield Finding("packages", "ok", ", ".join(found))


def _torchvision(settings: Settings) -> Iterator[Finding]:
    """A torchvision of another build than torch breaks the import of transformers' image models."""
    try:
        theirs, ours = importlib.metadata.version("torchvision"), importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if theirs.partition("+")[2] != ours.partition("+")[2]:
        text = f"torchvision {theirs} is not of the same build as torch {ours}, and transformers imports both"
        yield Finding("torchvision", "problem", text, "pip uninstall torchvision: nothing here needs it")


def _formats(settings: Settings) -> Iterator[Finding]:
    """Every format's tools, with the hashes of what was installed from source."""
    from modelmint import formats

    for name in formats.FORMATS:
        try:
            tools = formats.load(name).tools("convert")
        except UnsupportedError as error:
            yield Finding(f"format {name}", "problem", str(error))
        else:
            yield Finding(f"format {name}", "ok", ", ".join(f"{tool.name} {tool.version}" for tool in tools))


def _machine(settings: Settings) -> Iterator[Finding]:
    from modelmint.host import free_disk_bytes, free_memory_bytes, hardware_class, host

    yield Finding("processor", "ok", f"{host().cpu}, {hardware_class(settings.tool_threads())}")
    disk = free_disk_bytes(settings.store)
    text = f"{disk / 1e9:.1f} GB free for {settings.store}"
    way_out = "free some, or point MODELMINT_STORE at a larger disk; modelmint store gc frees what no release needs"
    yield Finding("disk", "ok", text) if disk >= ROOM_BYTES else Finding("disk", "problem", text, way_out)
    memory = free_memory_bytes()
    text = f"{memory / 1e9:.1f} GB free of {host().memory_bytes / 1e9:.1f} GB"
    way_out = "close what takes memory, or use a larger machine"
    yield Finding("memory", "ok", text) if memory >= MEMORY_BYTES else Finding("memory", "problem", text, way_out)


def _isolation(settings: Settings) -> Iterator[Finding]:
    from modelmint.isolate import Limits, call

    try:
        outcome = call("modelmint.host:free_memory_bytes", {}, limits=Limits(wall_seconds=60))
    except ModelMintError as error:
        yield Finding("child processes", "problem", str(error))
        return
    if outcome.network_isolated:
        yield Finding("child processes", "ok", f"start in {outcome.seconds:.2f} s and have no network")
        return
    way_out = "allow user namespaces: sysctl user.max_user_namespaces, the container's seccomp profile"
    text = "tools cannot be cut off from the network; every record says so"
    level: Literal["problem", "note"] = "problem" if settings.require_isolation else "note"
    yield Finding("child processes", level, text, way_out)


def _store(settings: Settings) -> Iterator[Finding]:
    from modelmint.store import Store

    if not settings.store.exists():
        yield Finding("store", "ok", f"{settings.store} is made by the first release")
        return
    store = Store(settings.store)
    try:
        with store.in_use("doctor"):
            count, conflicts = sum(1 for _ in store.records()), len(list(store.conflicts()))
    except (ModelMintError, OSError) as error:
        yield Finding("store", "problem", str(error), "set MODELMINT_STORE to a folder of yours")
        return
    if conflicts:
        way_out = f"compare the records in {store.root / 'conflicts'}, then remove one"
        yield Finding("store", "problem", f"{conflicts} steps gave two different outputs", way_out)
    yield Finding("store", "ok", f"{count} results in {store.root}; modelmint store verify hashes them all")


def _mlflow(settings: Settings) -> Iterator[Finding]:
    uri = settings.tracking_uri
    if uri.startswith("sqlite:///"):
        yield _database(uri.removeprefix("sqlite:///"))
    elif not uri.startswith(("http://", "https://")):
        yield Finding("mlflow", "note", f"{urlsplit(uri).scheme}: is not checked here")


def _database(path: str) -> Finding:
    from pathlib import Path

    if not Path(path).exists():
        return Finding("mlflow", "ok", f"{path} is made by the first release")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            count = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    except sqlite3.Error as error:
        return Finding("mlflow", "problem", f"{path}: {error}", "move the file away; the next release makes a new one")
    return Finding("mlflow", "ok", f"{count} runs in {path}")


def _prefect(settings: Settings) -> Iterator[Finding]:
    if settings.prefect_api_url is None:
        yield Finding("prefect", "ok", "a server on loopback is started for each command, and stopped after it")


def servers(settings: Settings) -> Iterator[Finding]:
    """Whether the servers that are configured answer."""
    if settings.tracking_uri.startswith(("http://", "https://")):
        way_out = "start it, or unset MLFLOW_TRACKING_URI to keep records in a file"
        yield _answers("mlflow", settings.tracking_uri, "/health", way_out)
    if settings.prefect_api_url is not None:
        way_out = "start it, or unset PREFECT_API_URL to use one that is started here"
        yield _answers("prefect", settings.prefect_api_url, "/health", way_out)


def _answers(name: str, address: str, path: str, way_out: str) -> Finding:
    """Whether a server answers; its address is shown without what could be a password."""
    parts = urlsplit(address)
    shown = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "") + parts.path
    try:
        with urllib.request.urlopen(address.rstrip("/") + path, timeout=ANSWER_SECONDS) as answer:
            return Finding(name, "ok", f"{shown} answers {answer.status}")
    except urllib.error.HTTPError as error:
        level: Literal["ok", "problem"] = "ok" if error.code in (401, 403) else "problem"
        return Finding(name, level, f"{shown} answers {error.code}", "" if level == "ok" else way_out)
    except (OSError, ValueError) as error:
        return Finding(name, "problem", f"{shown} does not answer: {error}", way_out)


def _programs(settings: Settings) -> Iterator[Finding]:
    """Programs that only building needs."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        yield Finding("compiler", "note", "no C++ compiler, which make install needs", "apt-get install g++")


CHECKS: Sequence[Callable[[Settings], Iterator[Finding]]] = (
    _packages,
    _torchvision,
    _formats,
    _machine,
    _isolation,
    _store,
    _mlflow,
    _prefect,
    servers,
    _programs,
)
"""In the order shown."""


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, up to the first part that is none."""
    found = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)
