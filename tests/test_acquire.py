"""Acquiring from folders and from the Hub: what comes is what was pinned."""

import os
import socket
from pathlib import Path

import pytest
from tiny_checkpoints import write_checkpoint

from modelmint.acquire import acquire, resolve
from modelmint.errors import ResourceError, SourceError, UnsafeSourceError, UnsupportedError
from modelmint.isolate import Progress
from modelmint.recipe import ModelRef
from modelmint.step import Context

pytestmark = pytest.mark.pure


def file_ref(folder: Path) -> ModelRef:
    return ModelRef.parse(f"file:{folder}")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "Tiny-1M")


def test_a_folder_becomes_an_artifact_with_the_same_bytes(checkpoint: Path, context: Context, tmp_path: Path) -> None:
    pinned = resolve(file_ref(checkpoint), context.settings)
    result = acquire(pinned, context)
    assert not result.reused
    assert result.record.output == pinned.revision
    copied = context.store.materialize(result.record.output, tmp_path / "copied")
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == {p.name: p.read_bytes() for p in checkpoint.iterdir()}


def test_acquiring_again_does_nothing_wherever_the_folder_lies(
    checkpoint: Path, context: Context, tmp_path: Path
) -> None:
    acquire(resolve(file_ref(checkpoint), context.settings), context)
    moved = checkpoint.rename(tmp_path / "elsewhere")
    assert acquire(resolve(file_ref(moved), context.settings), context).reused


def test_no_local_path_is_in_the_key(checkpoint: Path, context: Context) -> None:
    pinned = resolve(file_ref(checkpoint), context.settings)
    record = acquire(pinned, context).record
    assert str(checkpoint.parent) not in record.model_dump_json()
    assert str(pinned) == f"file:Tiny-1M@{pinned.revision}"


def test_only_what_is_needed_is_taken(checkpoint: Path, context: Context) -> None:
    for name in ("pytorch_model.bin", "model-q4.gguf", "modeling_tiny.py", "onnx/model.onnx", ".git/config"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"x")
    pinned = resolve(file_ref(checkpoint), context.settings)
    assert pinned.left_out == ("model-q4.gguf", "modeling_tiny.py", "onnx/model.onnx", "pytorch_model.bin")
    assert [file.path for file in pinned.files] == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_single_file_of_weights_is_preferred_to_shards_and_other_layouts(checkpoint: Path, context: Context) -> None:
    for name in ("consolidated.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"):
        (checkpoint / name).write_bytes(b"x")
    pinned = resolve(file_ref(checkpoint), context.settings)
    assert [f.path for f in pinned.files if "safetensors" in f.path] == ["model.safetensors"]


@pytest.mark.parametrize("shard", ["model-00001-of-00001.safetensors", "model-00001-of-000001.safetensors"])
def test_shards_come_with_their_index_and_without_the_same_weights_in_another_layout(
    checkpoint: Path, context: Context, shard: str
) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / shard)
    for name in ("consolidated.safetensors", "model.fp32.safetensors", "model.safetensors.index.json"):
        (checkpoint / name).write_bytes(b"{}")
    pinned = resolve(file_ref(checkpoint), context.settings)
    assert [f.path for f in pinned.files if "safetensors" in f.path] == [shard, "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("config.json", "sub/config.json", "no config.json; there is one in 'sub'"),
        ("model.safetensors", "pytorch_model.bin", "only pickles such as pytorch_model.bin, .* can run code"),
        ("model.safetensors", "model.gguf", "only GGUF such as model.gguf: .* original checkpoint"),
        ("model.safetensors", "adapter_config.json", "is an adapter, not a model: merge it"),
        ("model.safetensors", "notes.txt", "no safetensors weights; it has README.md"),
    ],
)
def test_a_folder_without_a_usable_checkpoint_says_what_it_has_instead(
    checkpoint: Path, context: Context, remove: str, add: str, message: str
) -> None:
    (checkpoint / remove).unlink()
    (checkpoint / add).parent.mkdir(exist_ok=True)
    (checkpoint / add).write_bytes(b"x")
    with pytest.raises((SourceError, UnsupportedError), match=message):
        resolve(file_ref(checkpoint), context.settings)


def test_a_missing_folder_is_named(context: Context, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere does not exist; name the folder of a checkpoint"):
        resolve(file_ref(tmp_path / "nowhere"), context.settings)


def test_a_link_out_of_the_folder_is_refused(checkpoint: Path, context: Context, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (checkpoint / "LICENSE").symlink_to(secret)
    with pytest.raises(UnsafeSourceError, match=r"LICENSE is a link to .*secret, which is not a file of the folder"):
        resolve(file_ref(checkpoint), context.settings)


def test_a_link_inside_the_folder_is_followed(checkpoint: Path, context: Context, tmp_path: Path) -> None:
    (checkpoint / "LICENSE").symlink_to("README.md")
    result = acquire(resolve(file_ref(checkpoint), context.settings), context)
    assert context.store.read(result.record.output, "LICENSE") == (checkpoint / "README.md").read_bytes()


def test_a_socket_is_refused(checkpoint: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("LICENSE")
        with pytest.raises(UnsafeSourceError, match="LICENSE is neither a file nor a folder"):
            resolve(file_ref(checkpoint), context.settings)


def test_a_pipe_put_in_place_of_a_file_is_refused_at_once(checkpoint: Path, context: Context) -> None:
    pinned = resolve(file_ref(checkpoint), context.settings)
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    with pytest.raises(UnsafeSourceError, match=r"config\.json is no plain file"):
        acquire(pinned, context)


def test_a_file_changed_after_pinning_is_refused(checkpoint: Path, context: Context) -> None:
    pinned = resolve(file_ref(checkpoint), context.settings)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"config\.json has changed since the run began"):
        acquire(pinned, context)
    assert list(context.store.records()) == []


def test_too_little_disk_is_refused_before_the_first_byte(
    checkpoint: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = resolve(file_ref(checkpoint), context.settings)
    monkeypatch.setattr("modelmint.acquire.free_disk_bytes", lambda folder: 10)
    with pytest.raises(ResourceError, match=r"needs 0\.00 GB more, but the disk .* point MODELMINT_STORE at a larger"):
        acquire(pinned, context)
    assert not list(context.settings.store.rglob("config.json"))


def test_progress_counts_every_byte(checkpoint: Path, context: Context) -> None:
    heard: list[Progress] = []
    told = Context(context.store, context.settings, on_progress=heard.append)
    pinned = resolve(file_ref(checkpoint), context.settings)
    acquire(pinned, told)
    assert (heard[-1].done, heard[-1].total, heard[-1].unit) == (pinned.size, pinned.size, "bytes")


def test_a_made_up_checkpoint_follows_from_its_name(context: Context) -> None:
    pinned = resolve(ModelRef.parse("fake:tiny"), context.settings)
    first = acquire(pinned, context)
    assert first.record.output == pinned.revision
    assert acquire(resolve(ModelRef.parse("fake:tiny"), context.settings), context).reused
    assert resolve(ModelRef.parse("fake:other"), context.settings).revision != pinned.revision
