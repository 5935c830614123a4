"""MLflow's door to the store: what a release keeps is listed and downloaded by MLflow's own commands and pages.

MLflow loads `StoreArtifactRepository` for every ``modelmint:`` URI (an entry point of this distribution). All of them
together are one tree::

    modelmint:///sha256-<hex>/                an artifact of the store by its digest; read-only
    modelmint:///experiments/<name>/...       the artifacts of an experiment's runs and models

An experiment's small files, such as a release's report, lie in ``<home>/mlruns/artifacts/<name>/``. A model's large
files lie in the store only: its ``MLmodel`` file names their digest, and they are listed beside it under the names that
people know. So one experiment location serves both, and it holds no path of this machine. A tracking server that
carries the files of its clients does the same with ``--artifacts-destination modelmint:///experiments``.
"""

import posixpath
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from modelmint.artifact import FileEntry, digest_of_file
from modelmint.errors import ModelMintError
from modelmint.settings import Settings
from modelmint.store import Store

EXPERIMENTS = "experiments"
"""The branch of the tree that holds the artifacts of runs and models."""

ARTIFACT_KEY = "modelmint.artifact"
"""Key in the metadata of an ``MLmodel`` file: the digest of the artifact that it stands for."""

FILES_KEY = "modelmint.files"
"""Key in the metadata of an ``MLmodel`` file: the path in the artifact by the name that people know."""

STORED = re.compile(r"sha256-([0-9a-f]{64})(?:/(.+))?")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MODEL = re.compile(r"(.+/models/m-[0-9a-f]{32}/artifacts)(?:/(.+))?")


def artifact_uri(digest: str) -> str:
    """The URI by which MLflow finds an artifact of the store."""
    return f"modelmint:///{digest.replace(':', '-')}"


def experiment_uri(name: str) -> str:
    """The artifact location of the experiment of that name."""
    return f"modelmint:///{EXPERIMENTS}/{name}"


@dataclass(frozen=True)
class Shown:
    """An artifact of the store as it appears in the tree.

    Attributes:
        folder: where in the tree its files appear.
        digest: of the artifact.
        files: the artifact's entries by the path under which each appears in the folder.
    """

    folder: str
    digest: str
    files: dict[str, FileEntry]

    def below(self, path: str) -> list[FileInfo]:
        """What lies directly in a folder of the tree."""
        inside = path[len(self.folder) :].strip("/")
        infos: dict[str, FileInfo] = {}
        for name, entry in self.files.items():
            if inside and not name.startswith(inside + "/"):
                continue
            first, slash, _ = name[len(inside) :].lstrip("/").partition("/")
            where = posixpath.join(path, first)
            infos[where] = FileInfo(where, bool(slash), None if slash else entry.size)
        return list(infos.values())

    def entry(self, path: str) -> FileEntry | None:
        """The file at a path of the tree; None if it is no file of this artifact."""
        return self.files.get(path[len(self.folder) :].strip("/"))


class StoreArtifactRepository(ArtifactRepository):
    """The tree behind ``modelmint:`` URIs, seen from one of its folders.

    Args:
        artifact_uri: the folder that all paths are relative to.
        tracking_uri: handed on to MLflow's base class.
        registry_uri: handed on to MLflow's base class.
        settings: where the store and the experiments lie; by default read from the environment.

    Raises:
        MlflowException: if the URI has a host or leaves the tree.
    """

    def __init__(
        self,
        artifact_uri: str,
        tracking_uri: str | None = None,
        registry_uri: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        settings = settings or Settings()
        self._root = _clean(_path_of(artifact_uri))
        self._store = Store(settings.store)
        folder = settings.home.absolute() / "mlruns" / "artifacts"
        # MLflow's own methods carry no types.
        self._plain: Any = LocalArtifactRepository(folder.as_uri(), tracking_uri, registry_uri)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Keep a file among those of a run or a model.

        Raises:
            MlflowException: for a URI that names an artifact of the store, which never changes.
        """
        self._plain.log_artifact(local_file, self._writable(artifact_path))

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Keep the files of a folder among those of a run or a model.

        Raises:
            MlflowException: for a URI that names an artifact of the store, which never changes.
        """
        self._plain.log_artifacts(local_dir, self._writable(artifact_path))

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Remove files of a run or a model; what lies in the store stays there.

        Raises:
            MlflowException: for a URI that names an artifact of the store, which never changes.
        """
        self._plain.delete_artifacts(self._writable(artifact_path))

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """What lies directly in a folder; nothing for a file and for a folder that does not exist.

        Raises:
            MlflowException: if the artifact of that digest is not in the store.
        """
        where = self._resolve(path)
        infos = {info.path: info for info in self._plain_below(where)}
        shown = self._shown(where)
        if shown is not None:
            infos |= {info.path: info for info in shown.below(where)}
        return [self._relative(infos[name]) for name in sorted(infos)]

    def get_local_path(self, artifact_path: str) -> str | None:
        """Where a file lies on this machine, so that a server sends it without a copy; store files are hashed first.

        Raises:
            MlflowException: if there is no such file, or its bytes are not what its digest promises.
        """
        where = self._resolve(artifact_path)
        entry = self._stored_file(where)
        if entry is None:
            return str(self._plain.get_local_path(_plain_path(where)))
        path = self._store.blob(entry)
        if not path.is_file() or digest_of_file(path) != entry.digest:
            raise MlflowException(
                f"the store's copy of {artifact_path} is missing or damaged ({entry.digest}); "
                "`modelmint store verify` finds what else is, and the next release makes it again"
            )
        return str(path)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        where = self._resolve(remote_file_path)
        entry = self._stored_file(where)
        if entry is None:
            self._plain._download_file(_plain_path(where), local_path)
            return
        shown = self._shown(where)
        assert shown is not None, "a stored file is part of an artifact that is shown"
        target = Path(local_path)
        # Written next to its final place, so that what appears under the name asked for is whole.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".modelmint-") as scratch:
            try:
                folder = self._store.materialize(shown.digest, Path(scratch) / "files", only=(entry.path,))
            except ModelMintError as error:
                raise MlflowException(str(error)) from error
            shutil.move(folder / entry.path, target)

    def _resolve(self, path: str | None) -> str:
        return _clean(posixpath.join(self._root, path or ""))

    def _relative(self, info: FileInfo) -> FileInfo:
        return FileInfo(posixpath.relpath(info.path, self._root or "."), info.is_dir, info.file_size)

    def _writable(self, path: str | None) -> str:
        where = self._resolve(path)
        if where != EXPERIMENTS and not where.startswith(EXPERIMENTS + "/"):
            raise MlflowException(
                f"modelmint:///{where} is read-only: an artifact of the store never changes; "
                f"what a run logs goes to modelmint:///{EXPERIMENTS}/<name>",
                error_code=PERMISSION_DENIED,
            )
        return _plain_path(where)

    def _plain_below(self, where: str) -> list[FileInfo]:
        if where != EXPERIMENTS and not where.startswith(EXPERIMENTS + "/"):
            return []
        if not Path(self._plain.artifact_dir).is_dir():
            raise MlflowException(
                f"no artifacts in {self._plain.artifact_dir}; MODELMINT_HOME is the folder where releases are made",
                error_code=RESOURCE_DOES_NOT_EXIST,
            )
        infos = self._plain.list_artifacts(_plain_path(where))
        return [FileInfo(posixpath.join(EXPERIMENTS, i.path), i.is_dir, i.file_size) for i in infos]

    def _stored_file(self, where: str) -> FileEntry | None:
        shown = self._shown(where)
        entry = None if shown is None else shown.entry(where)
        if entry is None and not where.startswith(EXPERIMENTS + "/"):
            raise MlflowException(f"no such file: modelmint:///{where}", error_code=RESOURCE_DOES_NOT_EXIST)
        return entry

    def _shown(self, where: str) -> Shown | None:
        """The artifact of the store that appears at a place in the tree or around it; None where there is none."""
        stored = STORED.fullmatch(where)
        if stored is not None:
            digest = f"sha256:{stored[1]}"
            return Shown(f"sha256-{stored[1]}", digest, {entry.path: entry for entry in self._entries(digest).values()})
        model = MODEL.fullmatch(where)
        pointer = None if model is None else self._pointer(model[1])
        if model is None or pointer is None:
            return None
        digest, names = pointer
        entries = self._entries(digest)
        return Shown(model[1], digest, {name: entries[path] for name, path in names.items() if path in entries})

    def _entries(self, digest: str) -> dict[str, FileEntry]:
        try:
            return {entry.path: entry for entry in self._store.artifact(digest).files}
        except ModelMintError as error:
            raise MlflowException(str(error), error_code=RESOURCE_DOES_NOT_EXIST) from error

    def _pointer(self, folder: str) -> tuple[str, dict[str, str]] | None:
        path = Path(self._plain.artifact_dir) / _plain_path(folder) / "MLmodel"
        if not path.is_file():
            return None
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        metadata = document.get("metadata") if isinstance(document, dict) else None
        digest = metadata.get(ARTIFACT_KEY) if isinstance(metadata, dict) else None
        files = metadata.get(FILES_KEY) if isinstance(metadata, dict) else None
        # Any client of a server can write such a file: what does not look like ours is left alone.
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest) or not isinstance(files, dict):
            return None
        return digest, {name: path for name, path in files.items() if isinstance(name, str) and _is_clean(name)}


def _path_of(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.scheme != "modelmint" or parts.netloc:
        raise MlflowException(
            f"not an address in the store: {uri!r}; write modelmint:///sha256-<hex> or modelmint:///{EXPERIMENTS}/<name>",
            error_code=INVALID_PARAMETER_VALUE,
        )
    return unquote(parts.path)


def _clean(path: str) -> str:
    """A path of the tree without slashes around it; refuses one that leaves the tree."""
    path = "/".join(PurePosixPath(path.strip("/")).parts)
    if path and not _is_clean(path):
        raise MlflowException(f"not a path inside the store: {path!r}", error_code=INVALID_PARAMETER_VALUE)
    return path


def _is_clean(path: str) -> bool:
    """Whether a path names something inside of the folder that it is relative to."""
    parts = path.split("/")
    return not {"", ".", ".."} & set(parts) and "\\" not in path and "\0" not in path


def _plain_path(where: str) -> str:
    return where[len(EXPERIMENTS) :].strip("/")
