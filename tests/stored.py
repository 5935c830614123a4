"""Small artifacts and records, and how to damage what is stored."""

from pathlib import Path
from typing import Any

from modelmint.artifact import Artifact, Step, StepRecord, digest_of_bytes
from modelmint.store import Store

NOBODY = digest_of_bytes(b"nobody")


def folder_of(path: Path, **contents: bytes) -> Path:
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def kept(store: Store, tmp_path: Path, **contents: bytes) -> Artifact:
    return store.add_folder(folder_of(tmp_path / f"made-{len(list(tmp_path.iterdir()))}", **contents))


def record_of(what: Step, output: Artifact, **fields: Any) -> StepRecord:
    values = {"seconds": 1.0, "finished": "2026-01-01T00:00:00.000+00:00", "host": "here", **fields}
    return StepRecord(key=what.key, step=what, output=output.digest, **values)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
