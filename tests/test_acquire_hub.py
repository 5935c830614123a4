"""Acquiring from the Hub, with the real client against a local server that can misbehave."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, hub
from tiny_checkpoints import safetensors_of, weights, write_checkpoint

from modelmint.acquire import acquire, resolve
from modelmint.errors import NetworkError, SourceError, UnsafeSourceError
from modelmint.recipe import ModelRef
from modelmint.settings import Settings
from modelmint.step import Context
from modelmint.store import Store

__all__ = ["hub"]
pytestmark = pytest.mark.pure
NAME = "acme/Tiny-1M"
REF = ModelRef.parse(f"hf:{NAME}")
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelmint.sources.resume.RETRY_SECONDS", 0.0)


@pytest.fixture
def checkpoint(tmp_path: Path, hub: HubServer) -> Path:
    """A published checkpoint whose weights take a few pieces to send."""
    folder = write_checkpoint(tmp_path / "published")
    big = weights() | {"model.layers.0.mlp.up_proj.weight": weights()["model.norm.weight"].repeat(100_000)}
    (folder / WEIGHTS).write_bytes(safetensors_of(big))
    hub.publish(NAME, folder)
    return folder


def settings_for(hub: HubServer, tmp_path: Path, **more: Any) -> Settings:
    return Settings.model_validate({"home": tmp_path / "home", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": None} | more)


@pytest.fixture
def context(hub: HubServer, tmp_path: Path) -> Context:
    settings = settings_for(hub, tmp_path)
    return Context(Store(settings.store), settings)


def test_a_branch_becomes_a_commit_and_its_files_arrive(checkpoint: Path, hub: HubServer, context: Context) -> None:
    pinned = resolve(REF, context.settings)
    assert str(pinned) == f"hf:{NAME}@{hub.repositories[NAME].branches['main']}"
    output = acquire(pinned, context).record.output
    for path in checkpoint.iterdir():
        assert context.store.read(output, path.name) == path.read_bytes()
    assert acquire(pinned, context).reused


def test_a_branch_that_moves_after_pinning_changes_nothing(
    checkpoint: Path, hub: HubServer, context: Context, tmp_path: Path
) -> None:
    pinned = resolve(REF, context.settings)
    hub.publish(NAME, write_checkpoint(tmp_path / "newer", card="---\nlicense: mit\n---\n"))
    output = acquire(pinned, context).record.output
    assert context.store.read(output, "README.md") == (checkpoint / "README.md").read_bytes()
    assert resolve(REF, context.settings).revision != pinned.revision


def test_a_commit_that_only_changes_the_card_fetches_only_the_card(
    checkpoint: Path, hub: HubServer, context: Context, tmp_path: Path
) -> None:
    acquire(resolve(REF, context.settings), context)
    newer = write_checkpoint(tmp_path / "newer", card="---\nlicense: mit\n---\n")
    (newer / WEIGHTS).write_bytes((checkpoint / WEIGHTS).read_bytes())
    hub.publish(NAME, newer)
    hub.requests.clear()
    acquire(resolve(REF, context.settings), context)
    assert not hub.asked_for(WEIGHTS)
    assert hub.asked_for("README.md")


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_a_flipped_byte_is_found_and_the_file_fetched_again(
    checkpoint: Path, hub: HubServer, context: Context, path: str
) -> None:
    hub.misbehaviour.flips[path] = 1
    output = acquire(resolve(REF, context.settings), context).record.output
    assert context.store.read(output, path) == (checkpoint / path).read_bytes()
    assert len(hub.asked_for(path)) == 2


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_bytes_that_stay_wrong_are_refused_and_evicted(
    checkpoint: Path, hub: HubServer, context: Context, path: str
) -> None:
    hub.misbehaviour.flips[path] = -1
    pinned = resolve(REF, context.settings)
    with pytest.raises(SourceError, match=f"{path} came twice with other bytes than its source declares"):
        acquire(pinned, context)
    assert not list(context.settings.store.rglob(path))
    assert list(context.store.records()) == []
    hub.misbehaviour.flips[path] = 0
    assert not acquire(pinned, context).reused


def test_the_clients_own_download_does_not_notice_a_flipped_byte(
    checkpoint: Path, hub: HubServer, tmp_path: Path
) -> None:
    """Why files are hashed here; when this fails, the client has learned it."""
    from huggingface_hub import hf_hub_download

    hub.misbehaviour.flips[WEIGHTS] = 1
    got = hf_hub_download(NAME, WEIGHTS, endpoint=hub.endpoint, token=False, cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() != (checkpoint / WEIGHTS).read_bytes()


def test_a_cut_connection_is_taken_up_where_it_ended(checkpoint: Path, hub: HubServer, context: Context) -> None:
    hub.misbehaviour.cuts[WEIGHTS] = (200_000, 3)
    output = acquire(resolve(REF, context.settings), context).record.output
    assert context.store.read(output, WEIGHTS) == (checkpoint / WEIGHTS).read_bytes()
    assert [request.headers.get("range") for request in hub.asked_for(WEIGHTS)] == [
        None,
        "bytes=200000-",
        "bytes=400000-",
        "bytes=600000-",
    ]


def test_a_server_that_cannot_continue_sends_the_file_again(checkpoint: Path, hub: HubServer, context: Context) -> None:
    hub.misbehaviour.cuts[WEIGHTS] = (200_000, 1)
    hub.misbehaviour.ignore_range = True
    output = acquire(resolve(REF, context.settings), context).record.output
    assert context.store.read(output, WEIGHTS) == (checkpoint / WEIGHTS).read_bytes()


def test_a_connection_that_brings_nothing_ends_after_a_few_tries_and_is_continued_by_the_next_run(
    checkpoint: Path, hub: HubServer, context: Context
) -> None:
    hub.misbehaviour.cuts[WEIGHTS] = (300_000, 1)
    pinned = resolve(REF, context.settings)
    hub.misbehaviour.cuts[WEIGHTS] = (1000, -1)
    with pytest.raises(NetworkError, match=r"model\.safetensors.*tried 5 times: run again to continue"):
        acquire(pinned, context)
    assert list(context.store.records()) == []
    hub.misbehaviour.cuts.clear()
    hub.requests.clear()
    acquire(pinned, context)
    assert [request.headers["range"] for request in hub.asked_for(WEIGHTS)] == ["bytes=5000-"]
    assert not hub.asked_for("config.json")


def test_a_killed_download_is_continued_by_the_next_process(
    checkpoint: Path, hub: HubServer, context: Context, tmp_path: Path
) -> None:
    pinned = resolve(REF, context.settings)
    hub.misbehaviour.seconds_per_chunk = 0.2
    code = (
        "import sys; from modelmint.acquire import acquire, resolve; from modelmint.recipe import ModelRef\n"
        "from modelmint.settings import Settings; from modelmint.step import Context\n"
        "from modelmint.store import Store\nsettings = Settings()\n"
        "context = Context(Store(settings.store), settings, on_progress=lambda p: print(p.done))\n"
        f"acquire(resolve(ModelRef.parse('{REF}'), settings), context)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "MODELMINT_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > 300_000:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    hub.misbehaviour.seconds_per_chunk = 0
    hub.requests.clear()
    output = acquire(pinned, context).record.output
    assert context.store.read(output, WEIGHTS) == (checkpoint / WEIGHTS).read_bytes()
    (request,) = hub.asked_for(WEIGHTS)
    assert int(request.headers["range"].removeprefix("bytes=").removesuffix("-")) > 200_000


def test_more_bytes_than_declared_are_refused(checkpoint: Path, hub: HubServer, context: Context) -> None:
    hub.misbehaviour.longer[WEIGHTS] = 10
    with pytest.raises(SourceError, match=r"model\.safetensors is longer than the \d+ bytes that were declared"):
        acquire(resolve(REF, context.settings), context)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_worth_another_try(checkpoint: Path, hub: HubServer, context: Context, status: int) -> None:
    hub.misbehaviour.statuses.append(status)
    with pytest.raises(NetworkError, match=f"answered {status}; run again later"):
        resolve(REF, context.settings)
    pinned = resolve(REF, context.settings)
    hub.misbehaviour.statuses.append(status)
    assert not acquire(pinned, context).reused


def test_an_unreachable_hub_is_a_network_error(tmp_path: Path) -> None:
    settings = Settings.model_validate({"home": tmp_path, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": None})
    with pytest.raises(NetworkError, match=r"no connection to http://127\.0\.0\.1:9 .*check the network"):
        resolve(REF, settings)


@pytest.mark.parametrize(
    ("change", "token", "message"),
    [
        ({"gated": True}, None, r"is gated: accept its conditions on .*/acme/Tiny-1M first; set HF_TOKEN"),
        ({"gated": True}, "hf_other_account", r"is gated: .*; the account of HF_TOKEN has no access"),
        ({"private": True}, None, r"no such repository, or it is private; .*: set HF_TOKEN"),
        ({"private": True}, "hf_other_account", r"or it is private; .*: the account of HF_TOKEN has no access"),
        ({"disabled": True}, None, r"the Hub has disabled this repository"),
        ({}, "hf_wrong", r"does not accept HF_TOKEN; make a new token, or unset it"),
    ],
)
def test_a_refusal_says_what_to_do(
    checkpoint: Path, hub: HubServer, tmp_path: Path, change: dict[str, bool], token: str | None, message: str
) -> None:
    for name, value in change.items():
        setattr(hub.repositories[NAME], name, value)
    with pytest.raises(SourceError, match=message):
        resolve(REF, settings_for(hub, tmp_path, HF_TOKEN=token))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("hf:acme/Nothing", r"no such repository, or it is private; check the spelling"),
        (f"hf:{NAME}@v9", r"acme/Tiny-1M has no revision 'v9'; see .*/acme/Tiny-1M/tree/main"),
    ],
)
def test_what_is_missing_is_named(checkpoint: Path, context: Context, ref: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        resolve(ModelRef.parse(ref), context.settings)


def test_the_token_opens_a_gated_repository_and_goes_to_the_hub_only(
    checkpoint: Path, hub: HubServer, tmp_path: Path
) -> None:
    hub.repositories[NAME].gated = True
    settings = settings_for(hub, tmp_path, HF_TOKEN=hub.token)
    acquire(resolve(REF, settings), Context(Store(settings.store), settings))
    behind = [request for request in hub.requests if request.server == "cdn"]
    assert behind
    assert not [request for request in behind if "authorization" in request.headers]
    assert hub.token not in "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("home/**/*") if path.is_file()
    )


def test_without_a_token_none_is_looked_for(
    checkpoint: Path, hub: HubServer, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_left_on_this_machine")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    acquire(resolve(REF, context.settings), context)
    assert not [request for request in hub.requests if "authorization" in request.headers]


def test_a_token_never_goes_to_another_host(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {"home": tmp_path, "HF_ENDPOINT": "https://hub.example.com", "HF_TOKEN": "hf_canary"}
    )
    with pytest.raises(UnsafeSourceError, match=r"HF_TOKEN would be sent to hub\.example\.com") as caught:
        resolve(REF, settings)
    assert "hf_canary" not in str(caught.value)


@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd", "a/../../config.json", "nul\0.json", "a\\b.json"])
def test_a_name_that_leaves_the_folder_is_refused(
    checkpoint: Path, hub: HubServer, context: Context, name: str
) -> None:
    hub.repositories[NAME].extra_names.append(name)
    with pytest.raises(UnsafeSourceError, match="could be written outside of its folder; nothing was read"):
        resolve(REF, context.settings)


def test_signed_addresses_are_not_in_messages(checkpoint: Path, hub: HubServer, context: Context) -> None:
    pinned = resolve(REF, context.settings)
    hub.misbehaviour.cuts[WEIGHTS] = (0, -1)
    with pytest.raises(NetworkError, match="tried 5 times") as caught:
        acquire(pinned, context)
    assert "secret-signature" not in str(caught.value)
