"""The door from MLflow to the store: by its classes, by its command line, and through a real server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from recorded import MLFLOW_WARNS, contents, context_in, stored_release

from modelmint.release import ReleaseReport
from modelmint.step import Context
from modelmint.store import Store
from tasks import track
from tasks.artifact_repository import StoreArtifactRepository, artifact_uri

pytestmark = [pytest.mark.flows, MLFLOW_WARNS]

NAME = "SmolLM2-135M-Instruct-Q4_K_M.gguf"
FILES = {"model.onnx": b"graph", "tokenizer/tokenizer.json": b"{}", "tokenizer/merges/merges.txt": b"a b"}


@pytest.fixture
def digest(context: Context, tmp_path: Path) -> str:
    """An artifact with folders inside."""
    for path, content in FILES.items():
        (tmp_path / "made" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / path).write_bytes(content)
    return context.store.add_folder(tmp_path / "made").digest


def opened(uri: str, context: Context) -> StoreArtifactRepository:
    return StoreArtifactRepository(uri, settings=context.settings)


def listed(repository: StoreArtifactRepository, path: str | None = None) -> list[tuple[str, bool, int | None]]:
    return [(info.path, info.is_dir, info.file_size) for info in repository.list_artifacts(path)]


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(store: Store, digest: str, path: str) -> None:
    blob = store.blob(store.artifact(digest).file(path))
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[::-1])


# --- an artifact of the store ----------------------------------------------------------------------------------------


def test_mlflow_finds_the_repository_by_its_scheme() -> None:
    assert isinstance(get_artifact_repository("modelmint:///experiments/anything"), StoreArtifactRepository)


def test_an_artifact_is_listed_folder_by_folder(context: Context, digest: str) -> None:
    repository = opened(artifact_uri(digest), context)
    assert listed(repository) == [("model.onnx", False, 5), ("tokenizer", True, None)]
    assert listed(repository, "tokenizer") == [
        ("tokenizer/merges", True, None),
        ("tokenizer/tokenizer.json", False, 2),
    ]
    assert listed(repository, "tokenizer/merges") == [("tokenizer/merges/merges.txt", False, 3)]
    assert listed(repository, "model.onnx") == []
    assert listed(repository, "token") == []
    assert listed(opened(artifact_uri(digest) + "/tokenizer", context), "merges") == [("merges/merges.txt", False, 3)]


def test_an_artifact_is_downloaded_whole_or_in_part(context: Context, digest: str, tmp_path: Path) -> None:
    repository = opened(artifact_uri(digest), context)
    for number, (path, expected) in enumerate(
        [
            ("", FILES),
            ("tokenizer", {name: text for name, text in FILES.items() if name.startswith("tokenizer/")}),
            ("tokenizer/tokenizer.json", {"tokenizer/tokenizer.json": b"{}"}),
        ]
    ):
        folder = tmp_path / f"out-{number}"
        folder.mkdir()
        repository.download_artifacts(path, str(folder))
        assert read(folder) == expected


def test_damaged_bytes_are_not_handed_out(context: Context, digest: str, tmp_path: Path) -> None:
    repository = opened(artifact_uri(digest), context)
    damage(context.store, digest, "model.onnx")
    with pytest.raises(MlflowException, match=r"missing or damaged \(sha256:"):
        repository.get_local_path("model.onnx")
    with pytest.raises(MlflowException, match=r"model\.onnx of artifact sha256:\w+ is damaged"):
        repository.download_artifacts("model.onnx", str(tmp_path))
    assert not (tmp_path / "model.onnx").exists()


def test_a_server_sends_a_sound_file_from_where_it_lies(context: Context, digest: str) -> None:
    entry = context.store.artifact(digest).file("model.onnx")
    path = opened(artifact_uri(digest), context).get_local_path("model.onnx")
    assert path == str(context.store.blob(entry))


def test_an_artifact_of_the_store_is_read_only(context: Context, digest: str, tmp_path: Path) -> None:
    repository = opened(artifact_uri(digest), context)
    (tmp_path / "new").write_text("new")
    for act in (
        lambda: repository.log_artifact(str(tmp_path / "new")),
        lambda: repository.log_artifacts(str(tmp_path / "made")),
        lambda: repository.delete_artifacts("model.onnx"),
        lambda: opened("modelmint:///", context).delete_artifacts(),
    ):
        with pytest.raises(MlflowException, match="is read-only: an artifact of the store never changes"):
            act()
    assert context.store.holds(context.store.artifact(digest))


def test_what_is_not_there_is_said(context: Context, digest: str, tmp_path: Path) -> None:
    with pytest.raises(MlflowException, match=f"has no artifact sha256:{'0' * 64}"):
        opened(f"modelmint:///sha256-{'0' * 64}", context).list_artifacts()
    with pytest.raises(MlflowException, match=r"no such file: modelmint:///sha256-\w+/model\.bin"):
        opened(artifact_uri(digest), context).download_artifacts("model.bin", str(tmp_path))
    with pytest.raises(MlflowException, match="MODELMINT_HOME is the folder where releases are made"):
        opened("modelmint:///experiments/unknown", context).list_artifacts()


@pytest.mark.parametrize("uri", ["modelmint://host/sha256-00", "file:///etc", "modelmint:///experiments/../../etc"])
def test_an_address_outside_is_refused(context: Context, uri: str) -> None:
    with pytest.raises(MlflowException, match=r"not an address in the store|not a path inside the store"):
        opened(uri, context)


@pytest.mark.parametrize("path", ["../other", "a/../../..", "..", "a\\..\\b"])
def test_a_path_outside_is_refused(context: Context, tmp_path: Path, path: str) -> None:
    repository = opened("modelmint:///experiments/one", context)
    (tmp_path / "file").write_text("x")
    repository.log_artifact(str(tmp_path / "file"))
    for act in (
        lambda: repository.list_artifacts(path),
        lambda: repository.get_local_path(path),
        lambda: repository.log_artifact(str(tmp_path / "file"), path),
        lambda: repository.delete_artifacts(path),
    ):
        with pytest.raises(MlflowException, match="not a path inside the store"):
            act()


def test_files_of_a_run_are_kept_listed_and_removed(context: Context, tmp_path: Path) -> None:
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "report.html").write_text("<h1>")
    repository = opened("modelmint:///experiments/one/run-1/artifacts", context)
    repository.log_artifacts(str(tmp_path / "logged"), "documents")
    assert listed(repository) == [("documents", True, None)]
    assert listed(repository, "documents") == [("documents/report.html", False, 4)]
    assert Path(str(repository.get_local_path("documents/report.html"))).read_text() == "<h1>"
    repository.delete_artifacts("documents")
    assert listed(repository) == []


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "metadata: text",
        "metadata: {modelmint.artifact: 'sha256:../../etc', modelmint.files: {a: b}}",
        "metadata: {modelmint.artifact: 7}",
        "metadata: {modelmint.artifact: 'DIGEST', modelmint.files: [a]}",
        "metadata: {modelmint.artifact: 'DIGEST', modelmint.files: {../../stolen: model.onnx, 7: model.onnx, a: none}}",
    ],
)
def test_an_mlmodel_file_that_is_not_ours_is_a_file_like_others(
    context: Context, digest: str, tmp_path: Path, text: str
) -> None:
    (tmp_path / "MLmodel").write_text(text.replace("DIGEST", digest))
    repository = opened(f"modelmint:///experiments/one/models/m-{'0' * 32}/artifacts", context)
    repository.log_artifact(str(tmp_path / "MLmodel"))
    assert [path for path, _, _ in listed(repository)] == ["MLmodel"]


# --- models of a release ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, ReleaseReport, track.TrackedVariant, str]:
    """A recorded release, one of its variants, and the id of its run."""
    context = context_in(tmp_path_factory.mktemp("released"))
    report = stored_release(context, "released")
    with track.tracked(report.recipe, report.release, context) as opened:
        variants = track.record(opened, report, context)
    return context, report, next(it for it in variants if it.variant == "gguf:Q4_K_M"), opened.run_id


def client_environment(home: Path | None, tracking: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("MODELMINT_HOME", "MODELMINT_STORE")}
    return {**kept, "MLFLOW_TRACKING_URI": tracking, **({"MODELMINT_HOME": str(home)} if home else {})}


def download(folder: Path, environment: dict[str, str], *arguments: str) -> dict[str, bytes]:
    """What MLflow's own command brings, working in a folder that has nothing to do with the project."""
    command = [sys.executable, "-m", "mlflow", "artifacts", "download", *arguments, "--dst-path", str(folder / "out")]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return read(folder / "out")


def test_a_models_files_are_listed_under_the_names_that_people_know(
    released: tuple[Context, ReleaseReport, track.TrackedVariant, str],
) -> None:
    context, report, variant, _ = released
    repository = opened(f"modelmint:///experiments/released/models/{variant.model_id}/artifacts", context)
    files = {path: (is_dir, size) for path, is_dir, size in listed(repository)}
    assert set(files) == {"MLmodel", NAME}
    assert files[NAME] == (False, context.store.artifact(variant.digest).size)
    assert repository.get_local_path(NAME) == str(context.store.blob(context.store.artifact(variant.digest).files[0]))
    assert str(repository.get_local_path("MLmodel")).startswith(str(context.settings.home / "mlruns" / "artifacts"))
    assert report.variant("gguf:Q4_K_M").files == (NAME,)


def test_mlflows_command_downloads_from_the_store(
    released: tuple[Context, ReleaseReport, track.TrackedVariant, str], tmp_path: Path
) -> None:
    context, _, variant, _ = released
    environment = client_environment(context.settings.home, context.settings.tracking_uri)
    wanted = contents("gguf:Q4_K_M") + b"released"
    found = download(tmp_path, environment, "--artifact-uri", f"models:/{variant.model_id}")
    assert found[NAME] == wanted
    found = download(tmp_path, environment, "--artifact-uri", artifact_uri(variant.digest))
    assert found[f"{variant.digest.replace(':', '-')}/model.gguf"] == wanted


def test_mlflows_functions_download_documents_and_a_runs_model(
    released: tuple[Context, ReleaseReport, track.TrackedVariant, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, report, variant, run_id = released
    tracking = context.settings.tracking_uri
    monkeypatch.setenv("MODELMINT_HOME", str(context.settings.home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    download_artifacts(run_id=run_id, dst_path=str(tmp_path / "run"), tracking_uri=tracking)
    assert (tmp_path / "run" / "report.json").read_bytes() == report.to_json()
    uri = f"runs:/{variant.run_id}/gguf-Q4_K_M"
    download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "model"), tracking_uri=tracking)
    assert (tmp_path / "model" / "gguf-Q4_K_M" / NAME).read_bytes() == contents("gguf:Q4_K_M") + b"released"


# --- through a server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(released: tuple[Context, ReleaseReport, track.TrackedVariant, str]) -> Iterator[str]:
    """MLflow's server over the record of `released`, carrying the files of its clients too."""
    context = released[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", "modelmint:///experiments"]
    environment = client_environment(context.settings.home, "")
    environment["MLFLOW_BACKEND_STORE_URI"] = context.settings.tracking_uri
    with subprocess.Popen(
        command,
        cwd=context.settings.home.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_healthy(url, process)
            yield url
        finally:
            os.killpg(process.pid, 9)


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError("the server is not healthy after 90 s")


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def test_the_pages_of_a_model_and_a_run_fetch_files_from_the_store(
    released: tuple[Context, ReleaseReport, track.TrackedVariant, str], server: str
) -> None:
    _, report, variant, run_id = released
    model = f"{server}/ajax-api/2.0/mlflow/logged-models/{variant.model_id}/artifacts"
    listing: dict[str, Any] = json.loads(fetched(f"{model}/directories"))
    assert [file["path"] for file in listing["files"]] == ["MLmodel", NAME]
    assert fetched(f"{model}/files?artifact_file_path={quote(NAME)}") == contents("gguf:Q4_K_M") + b"released"
    assert fetched(f"{server}/get-artifact?run_uuid={run_id}&path=report.json") == report.to_json()
    for stolen in ("../../../../mlflow.db", "..%2F..%2Fmlflow.db", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            fetched(f"{model}/files?artifact_file_path={stolen}")


def test_a_client_of_the_server_needs_no_store_of_its_own(
    released: tuple[Context, ReleaseReport, track.TrackedVariant, str],
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = released[0].settings.home
    context = context_in(home, server)
    report = stored_release(context, "served", "served-1")
    with track.tracked(report.recipe, report.release, context) as opened:
        variants = track.record(opened, report, context)
    assert opened.artifact_uri.startswith("mlflow-artifacts:")
    assert opened.links().tracking_url.startswith(f"{server}/#/experiments/")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELMINT_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    variant = next(it for it in variants if it.variant == "gguf:Q4_K_M")
    model = tmp_path / "model"
    download_artifacts(artifact_uri=f"models:/{variant.model_id}", dst_path=str(model), tracking_uri=server)
    assert (model / NAME).read_bytes() == contents("gguf:Q4_K_M") + b"served"
    documents = tmp_path / "documents"
    download_artifacts(run_id=opened.run_id, dst_path=str(documents), tracking_uri=server)
    assert (documents / "report.json").read_bytes() == report.to_json()
