"""A checkpoint in S3, with a real server."""

import contextlib
import socket
import threading
from pathlib import Path

import pytest
from s3_server import S3Server
from tiny_checkpoints import write_checkpoint

from modelmint.acquire import acquire, resolve
from modelmint.errors import NetworkError, SourceError, UnsafeSourceError
from modelmint.inspect import inspect_source
from modelmint.recipe import DatasetRef, ModelRef
from modelmint.settings import Settings
from modelmint.sources import s3
from modelmint.step import Context
from modelmint.store import Store
from modelmint.text import FILE, acquire_text

pytestmark = pytest.mark.services
WEIGHTS = "model.safetensors"


@pytest.fixture
def context(s3_server: S3Server, bucket: str, tmp_path: Path) -> Context:
    settings = Settings.model_validate(
        {"home": tmp_path, "host_lock": tmp_path / "host", "AWS_ENDPOINT_URL": s3_server.endpoint}
    )
    return Context(Store(settings.store), settings)


@pytest.fixture
def ref(bucket: str) -> ModelRef:
    return ModelRef.parse(f"s3://{bucket}/models/tiny")


@pytest.fixture
def checkpoint(s3_server: S3Server, bucket: str, tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / "LICENSE").write_text("A licence. " * 100_000)
    for path in folder.iterdir():
        s3_server.client.upload_file(str(path), bucket, f"models/tiny/{path.name}")
    s3_server.client.put_object(Bucket=bucket, Key="models/tiny/", Body=b"")
    s3_server.client.put_object(Bucket=bucket, Key="models/tiny2/config.json", Body=b"{}")
    s3_server.client.put_object(Bucket=bucket, Key="models/tiny/pytorch_model.bin", Body=b"x")
    return folder


def put(server: S3Server, ref: ModelRef, path: str, content: bytes) -> None:
    bucket, _, prefix = ref.location.partition("/")
    server.client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=content)


def test_a_prefix_is_pinned_and_its_objects_arrive(checkpoint: Path, ref: ModelRef, context: Context) -> None:
    pinned = resolve(ref, context.settings)
    assert pinned.left_out == ("pytorch_model.bin",)
    assert str(pinned) == f"{ref}@{pinned.revision}"
    output = acquire(pinned, context).record.output
    assert {file.path for file in context.store.artifact(output).files} == {p.name for p in checkpoint.iterdir()}
    for path in checkpoint.iterdir():
        assert context.store.read(output, path.name) == path.read_bytes()
    assert acquire(resolve(ref, context.settings), context).reused


def test_the_preview_reads_headers_by_range(checkpoint: Path, ref: ModelRef, context: Context) -> None:
    assert inspect_source(ref, context.settings).architecture == "LlamaForCausalLM"


def test_an_object_that_changes_after_pinning_is_refused(
    checkpoint: Path, ref: ModelRef, context: Context, s3_server: S3Server
) -> None:
    pinned = resolve(ref, context.settings)
    put(s3_server, ref, WEIGHTS, b"x" * pinned.file(WEIGHTS).size)
    with pytest.raises(SourceError, match=r"model\.safetensors: the object has changed since it was pinned"):
        acquire(pinned, context)
    assert list(context.store.records()) == []
    assert resolve(ref, context.settings).revision != pinned.revision


def test_a_download_is_continued(checkpoint: Path, ref: ModelRef, context: Context, tmp_path: Path) -> None:
    pinned = resolve(ref, context.settings)
    file = pinned.file("LICENSE")
    target = tmp_path / "partial"
    target.write_bytes((checkpoint / "LICENSE").read_bytes()[:500_000])
    came: list[int] = []
    s3.fetch(pinned, file, target, context.settings, came.append)
    assert sum(came) == file.size - 500_000
    assert target.read_bytes() == (checkpoint / "LICENSE").read_bytes()


def test_a_cut_connection_is_taken_up_again(
    checkpoint: Path, ref: ModelRef, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelmint.sources.resume.RETRY_SECONDS", 0.0)
    with CuttingProxy(s3_server.endpoint, after=400_000) as proxy:
        settings = Settings.model_validate({"home": tmp_path, "AWS_ENDPOINT_URL": proxy.endpoint})
        pinned = resolve(ref, settings)
        target = tmp_path / "partial"
        s3.fetch(pinned, pinned.file("LICENSE"), target, settings, lambda count: None)
    assert target.read_bytes() == (checkpoint / "LICENSE").read_bytes()
    assert proxy.cuts == 2


def test_versions_are_pinned_where_the_bucket_keeps_them(
    checkpoint: Path, ref: ModelRef, context: Context, s3_server: S3Server
) -> None:
    s3_server.client.put_bucket_versioning(
        Bucket=ref.location.partition("/")[0], VersioningConfiguration={"Status": "Enabled"}
    )
    put(s3_server, ref, "README.md", b"# first")
    pinned = resolve(ref, context.settings)
    assert pinned.file("README.md").version
    put(s3_server, ref, "README.md", b"# other")
    output = acquire(pinned, context).record.output
    assert context.store.read(output, "README.md") == b"# first"


@pytest.mark.parametrize("key", ["../evil.json", "a//b.json", "a/../../b.json", "/abs.json"])
def test_keys_that_leave_the_folder_are_refused(
    ref: ModelRef, context: Context, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This server cleans such keys itself; others do not, so the listing is made up."""

    class Client:
        def get_paginator(self, name: str) -> "Client":
            return self

        def paginate(self, **asked: str) -> list[dict[str, list[dict[str, object]]]]:
            return [{"Contents": [{"Key": asked["Prefix"] + key, "Size": 1}]}]

    monkeypatch.setattr(s3, "_client", lambda settings: Client())
    with pytest.raises(UnsafeSourceError, match="could be written outside of its folder; nothing was read"):
        resolve(ref, context.settings)


def test_what_is_missing_or_closed_is_named(
    checkpoint: Path, ref: ModelRef, bucket: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match="there is no such bucket; check its name and AWS_ENDPOINT_URL"):
        resolve(ModelRef.parse("s3://no-such-bucket/x"), context.settings)
    with pytest.raises(SourceError, match="is empty: there is no object below 'nothing/'"):
        resolve(ModelRef.parse(f"s3://{bucket}/nothing"), context.settings)
    with pytest.raises(SourceError, match=r"no config\.json; there is one in 'tiny'"):
        resolve(ModelRef.parse(f"s3://{bucket}/models"), context.settings)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SourceError, match="the secret key does not fit the access key; check AWS_ACCESS_KEY_ID"):
        resolve(ref, context.settings)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(SourceError, match="the access key is not known"):
        resolve(ref, context.settings)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(SourceError, match="there are no credentials; set AWS_ACCESS_KEY_ID"):
        resolve(ref, context.settings)


def test_an_unreachable_server_is_a_network_error(bucket: str, ref: ModelRef, tmp_path: Path) -> None:
    settings = Settings.model_validate({"home": tmp_path, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    with pytest.raises(NetworkError, match="EndpointConnectionError; check the network and AWS_ENDPOINT_URL"):
        resolve(ref, settings)


def test_a_text_is_an_object(bucket: str, context: Context, s3_server: S3Server) -> None:
    s3_server.client.put_object(Bucket=bucket, Key="texts/a.txt", Body="Zwölf\r\nBoxkämpfer\n".encode())
    ref = DatasetRef(source=f"s3://{bucket}/texts/a.txt")
    result = acquire_text(ref, context)
    assert context.store.read(result.record.output, FILE).decode() == "Zwölf\nBoxkämpfer\n"
    assert acquire_text(ref, context).reused
    s3_server.client.put_object(Bucket=bucket, Key="texts/a.txt", Body=b"another")
    assert not acquire_text(ref, context).reused
    with pytest.raises(SourceError, match="there is no such object; check the"):
        acquire_text(DatasetRef(source=f"s3://{bucket}/texts/b.txt"), context)
    with pytest.raises(SourceError, match="names a bucket, not an object; write s3://bucket/key"):
        acquire_text(DatasetRef(source=f"s3://{bucket}"), context)


class CuttingProxy:
    """Passes connections on to a server and cuts each after so many bytes of its answers."""

    def __init__(self, endpoint: str, after: int) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._server = (host, int(port))
        self._after = after
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "CuttingProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server:
            there = threading.Thread(target=self._pass_on, args=(client, server, None), daemon=True)
            there.start()
            self._pass_on(server, client, self._after)
            there.join()

    def _pass_on(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if limit is not None and passed > limit:
                    target.sendall(data[: len(data) - (passed - limit)])
                    self.cuts += 1
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
