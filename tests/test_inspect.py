"""Inspecting: what a checkpoint is, and what is refused before any heavy work."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer, hub
from tiny_checkpoints import CARD, safetensors_of, tokenizer_json, weights, write_checkpoint

from modelmint.acquire import acquire, resolve
from modelmint.errors import ResourceError, SourceError, UnsafeSourceError, UnsupportedError
from modelmint.examine import examine
from modelmint.inspect import inspect, inspect_source, needs, preview, read_inspection, refuse
from modelmint.inspection import Inspection, size_class
from modelmint.recipe import ModelRef, Recipe
from modelmint.settings import Settings
from modelmint.step import Context

__all__ = ["hub"]
pytestmark = pytest.mark.pure
WEIGHTS = "model.safetensors"


def inspected(folder: Path) -> Inspection:
    """What the child process would find, found here: a child costs half a second."""
    return Inspection.model_validate(examine(str(folder), scan=False))


def stored(folder: Path, context: Context) -> Inspection:
    pinned = resolve(ModelRef.parse(f"file:{folder}"), context.settings)
    return read_inspection(inspect(acquire(pinned, context).record.output, context), context.store, pinned)


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({"schema": 1, "name": "r", "source": "fake:x", "variants": ["fake:Q4"]} | fields)


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_facts_of_a_checkpoint(tmp_path: Path, context: Context) -> None:
    found = stored(write_checkpoint(tmp_path / "tiny"), context)
    assert found.architecture == "LlamaForCausalLM"
    assert found.parameters == 16 * 8 + 8 + 2 * 8 * 8 + 2 * 4 * 8
    assert found.dtypes == {"F16": found.parameters}
    assert found.weight_bytes == 2 * found.parameters
    assert (found.license, found.context_length, found.chat_template) == ("apache-2.0", 64, True)
    assert (found.tokenizer, found.tokens, found.vocabulary) == ("BPE", 16, 16)
    # Two numbers (key, value), one layer, one head of width 4, two bytes.
    assert found.cache_bytes_per_token == 16
    assert found.memory_bytes(64) == found.weight_bytes + 64 * 16
    assert found.quantized_source == ""
    assert len(found.tensors) == 6


def test_the_preview_finds_what_the_inspection_finds(tmp_path: Path, context: Context) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    assert inspect_source(ModelRef.parse(f"file:{folder}"), context.settings) == stored(folder, context)


def test_an_inspection_is_reused_for_equal_files_under_another_name(tmp_path: Path, context: Context) -> None:
    stored(write_checkpoint(tmp_path / "one"), context)
    pinned = resolve(ModelRef.parse(f"file:{write_checkpoint(tmp_path / 'two')}"), context.settings)
    result = inspect(acquire(pinned, context).record.output, context)
    assert result.reused
    assert read_inspection(result, context.store, pinned).source == f"file:two@{pinned.revision}"


def test_the_hub_is_asked_for_headers_only(tmp_path: Path, hub: HubServer) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    wide = weights() | {"model.layers.0.mlp.up_proj.weight": np.zeros((1000, 1000), np.float32)}
    (folder / WEIGHTS).write_bytes(safetensors_of(wide))
    hub.publish("acme/Tiny", folder)
    settings = Settings.model_validate({"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": None})
    found = inspect_source(ModelRef.parse("hf:acme/Tiny"), settings)
    assert found.parameters > 1_000_000
    assert found.source == f"hf:acme/Tiny@{found.revision}"
    assert hub.sent_bytes < 10_000


def test_a_made_up_checkpoint_is_inspected_too(context: Context) -> None:
    found = inspect_source(ModelRef.parse("fake:tiny"), context.settings)
    assert (found.architecture, found.license) == ("FakeForCausalLM", "apache-2.0")
    assert found.vocabulary > 256


@pytest.mark.parametrize(
    ("billions", "name"),
    [
        (0.0999, "below micro"),
        (0.135, "micro"),
        (1.4, "micro"),
        (1.5, "small"),
        (13.9, "small"),
        (14.0, "medium"),
        (30.0, "medium"),
        (70.0, "large"),
    ],
)
def test_size_classes(billions: float, name: str) -> None:
    assert size_class(int(billions * 1e9)) == name


def test_a_tied_output_matrix_counts_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    alone = inspected(folder).parameters
    (folder / WEIGHTS).write_bytes(safetensors_of(weights() | {"lm_head.weight": np.zeros((16, 8), np.float16)}))
    assert inspected(folder).parameters == alone
    change_json(folder / "config.json", tie_word_embeddings=False)
    assert inspected(folder).parameters == alone + 16 * 8


def test_a_model_that_also_sees_is_described_by_its_text_part(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    change_json(folder / "config.json", text_config={"max_position_embeddings": 4096}, max_position_embeddings=None)
    assert inspected(folder).context_length == 4096


# Vocabulary ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"vocab_size": 17}, "vocab_size 17, but the embedding has 16 rows"),
        ("config.json", {"bos_token_id": 2**31 - 1}, "bos_token_id 2147483647, but the model has tokens 0 to 15"),
        ("config.json", {"eos_token_id": [2, 999999]}, "eos_token_id 999999, but the model has tokens 0 to 15"),
        ("config.json", {"eos_token_id": "2"}, "eos_token_id 2, but the model has tokens"),
        ("config.json", {"pad_token_id": -2}, "pad_token_id -2, but the model has tokens"),
        ("generation_config.json", {"eos_token_id": 16}, r"generation_config\.json says eos_token_id 16"),
    ],
)
def test_token_ids_that_the_model_does_not_have_are_refused(
    tmp_path: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    change_json(folder / file, **fields)
    with pytest.raises(SourceError, match=message):
        inspected(folder)


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    tokenizer = tokenizer_json()
    tokenizer["model"]["vocab"]["zz"] = 16
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SourceError, match="a token with id 16, but the embedding has 16 rows"):
        inspected(folder)


def test_a_special_token_without_a_row_is_only_noted(tmp_path: Path) -> None:
    """As in text-only models cut from ones that also see, whose image token stays in the tokenizer."""
    folder = write_checkpoint(tmp_path / "tiny")
    tokenizer = tokenizer_json()
    tokenizer["added_tokens"].append({"id": 16, "content": "<image>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert inspected(folder).notes == (
        "1 special tokens of the tokenizer have no row in the embedding and cannot be used.",
    )


def test_padding_of_the_embedding_is_only_noted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    tokenizer = tokenizer_json()
    del tokenizer["model"]["vocab"]["m"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert inspected(folder).notes == ("The embedding has 16 rows for 15 tokens: the rest is padding.",)


def test_a_sentencepiece_model_is_counted_without_its_library(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    piece = b"\x0a\x01a\x15\x00\x00\x00\x00"
    (folder / "tokenizer.model").write_bytes(b"".join(b"\x0a" + bytes([len(piece)]) + piece for _ in range(14)))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 14}))
    found = inspected(folder)
    assert (found.tokenizer, found.tokens) == ("SentencePiece", 15)
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(SourceError, match=r"tokenizer\.model is no SentencePiece model"):
        inspected(folder)


# Weights -------------------------------------------------------------------------------------------------------------


def to_bfloat16(array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_weights_that_are_not_finite_are_refused_with_their_place_and_number(
    tmp_path: Path, context: Context, value: float, dtype: str
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = weights("float32" if dtype == "bfloat16" else dtype)
    tensors["model.norm.weight"][[1, 5]] = value
    types = {}
    if dtype == "bfloat16":
        tensors = {name: to_bfloat16(array) for name, array in tensors.items()}
        types = dict.fromkeys(tensors, "BF16")
    (folder / WEIGHTS).write_bytes(safetensors_of(tensors, types))
    with pytest.raises(SourceError, match=r"NaN or infinite: model\.norm\.weight in model\.safetensors has 2;"):
        stored(folder, context)
    assert [record.step.stage for record in context.store.records()] == ["acquire"]


def test_the_largest_finite_numbers_are_not_mistaken_for_infinities(tmp_path: Path, context: Context) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = weights()
    tensors["model.norm.weight"][:] = np.finfo(np.float16).max
    (folder / WEIGHTS).write_bytes(safetensors_of(tensors))
    assert stored(folder, context).parameters


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two shards with an index; returns its map."""
    tensors = list(weights().items())
    (folder / WEIGHTS).unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / names[0]).write_bytes(safetensors_of(dict(tensors[:3])))
    (folder / names[1]).write_bytes(safetensors_of(dict(tensors[3:])))
    where = {name: names[position // 3] for position, (name, _) in enumerate(tensors)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_shards_are_one_checkpoint(tmp_path: Path, context: Context) -> None:
    whole = inspected(write_checkpoint(tmp_path / "whole"))
    folder = write_checkpoint(tmp_path / "tiny")
    shard(folder)
    found = stored(folder, context)
    assert found.parameters == whole.parameters
    assert found.tensors == whole.tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda where: where | {"ghost": "model-00001-of-00002.safetensors"},
            "puts ghost into .*, but it is in no file",
        ),
        (lambda where: where | {"x": "model-00003-of-00002.safetensors"}, "into 'model-00003-.*', which is not there"),
        (lambda where: where | {"x": "../../etc/passwd"}, r"into '\.\./\.\./etc/passwd', which is not there"),
        (
            lambda where: where | {"model.norm.weight": "model-00002-of-00002.safetensors"},
            r"puts model\.norm\.weight into model-00002.*, but it is in model-00001",
        ),
        (
            lambda where: {name: path for name, path in where.items() if name != "model.norm.weight"},
            r"model-00001-of-00002\.safetensors has model\.norm\.weight, which .* does not name",
        ),
        (lambda where: None, "has no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, change: Callable[[dict[str, str]], Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    where = shard(folder)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": change(where)}))
    with pytest.raises(SourceError, match=message):
        inspected(folder)


def test_shards_without_an_index_and_a_tensor_in_two_shards_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    (folder / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(SourceError, match="there are 2 weight files but no"):
        inspected(folder)
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(UnsafeSourceError, match=r"model\.embed_tokens\.weight is both in .*00001.* and in .*00002"):
        inspected(folder)


# What a recipe and a machine allow -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "card", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, CARD, r"a quantization_config \(method gptq\)"),
        ({}, "---\nbase_model: a/b\nbase_model_relation: quantized\n---\n", r"relation: quantized \(of a/b\)"),
        ({}, "---\ntags: [llama, awq, 4-bit]\n---\n", "its card is tagged awq, 4-bit"),
        ({}, "---\ntags:\n- dequantized-from-Q4_1\n---\n", "tagged dequantized-from-Q4_1"),
    ],
)
def test_a_source_that_was_quantized_is_refused_unless_the_recipe_accepts_it(
    tmp_path: Path, config: dict[str, Any], card: str, message: str
) -> None:
    found = inspected(write_checkpoint(tmp_path / "tiny", config=config, card=card))
    with pytest.raises(SourceError, match=f"The source was quantized before: .*{message}.*quantized_source: accept"):
        refuse(found, recipe(), Settings())
    refuse(found, recipe(quantized_source="accept"), Settings())


def test_packed_tensors_show_an_earlier_quantization(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    packed = weights() | {"model.layers.0.mlp.up_proj.weight": np.zeros((4, 4), np.int8)}
    (folder / WEIGHTS).write_bytes(safetensors_of(packed))
    assert "1 packed tensors such as model.layers.0.mlp.up_proj.weight (I8)" in inspected(folder).quantized_source


@pytest.mark.parametrize("tag", ["llama", "8-point", "int", "text-generation", "gptqa", "en"])
def test_harmless_tags_are_no_sign_of_quantization(tmp_path: Path, tag: str) -> None:
    assert inspected(write_checkpoint(tmp_path / "tiny", card=f"---\ntags: ['{tag}']\n---\n")).quantized_source == ""


def test_a_licence_that_the_recipe_does_not_list_is_refused(tmp_path: Path) -> None:
    found = inspected(write_checkpoint(tmp_path / "tiny"))
    refuse(found, recipe(licenses=["mit", "apache-2.0"]), Settings())
    with pytest.raises(SourceError, match=r"has the licence 'apache-2\.0', and the recipe allows mit"):
        refuse(found, recipe(licenses=["mit"]), Settings())


@pytest.mark.parametrize(
    ("card", "text", "name"),
    [
        ("# no front matter", "", ""),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "", "gemma"),
        ("# none", "   Apache License\n      Version 2.0, January 2004", "apache-2.0"),
        (
            "# none",
            "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy",
            "mit",
        ),
        ("---\nlicense: [MIT, apache-2.0]\n---\n", "", "mit and apache-2.0"),
        ("---\nlicense: other\n---\n", "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2"),
    ],
)
def test_the_licence_comes_from_the_card_or_from_its_text(tmp_path: Path, card: str, text: str, name: str) -> None:
    folder = write_checkpoint(tmp_path / "tiny", card=card)
    if text:
        (folder / "LICENSE").write_text(text)
    found = inspected(folder)
    assert found.license == name
    if not name:
        with pytest.raises(SourceError, match="names no licence, and the recipe allows mit"):
            refuse(found, recipe(licenses=["mit"]), Settings())


def test_a_card_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"README\.md has front matter that is no YAML"):
        inspected(write_checkpoint(tmp_path / "tiny", card="---\nlicense: [\n---\n"))


def test_a_repository_that_brings_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", config={"auto_map": {"AutoModelForCausalLM": "modeling_tiny.Tiny"}})
    (folder / "modeling_tiny.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    found = inspected(folder)
    with pytest.raises(UnsafeSourceError, match=r"wants code of its own .*auto_map: modeling_tiny\.Tiny"):
        refuse(found, recipe(), Settings())
    refuse(found, recipe(repository_code="ignore"), Settings())
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_an_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"config\.json names no architecture; add the class"):
        inspected(write_checkpoint(tmp_path / "tiny", config={"architectures": []}))


def test_a_checkpoint_that_a_format_cannot_take_is_refused_before_the_download(tmp_path: Path, hub: HubServer) -> None:
    hub.publish("acme/Tiny", write_checkpoint(tmp_path / "tiny", config={"architectures": ["NobodyKnowsThis"]}))
    settings = Settings.model_validate({"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": None})
    pinned = resolve(ModelRef.parse("hf:acme/Tiny"), settings)
    with pytest.raises(UnsupportedError, match="NobodyKnowsThis"):
        preview(pinned, settings, ["gguf"])


def test_what_does_not_fit_on_the_disk_or_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspected(write_checkpoint(tmp_path / "tiny"))
    assert needs(found, recipe()).memory_bytes == 4 * found.parameters + 2048 * 16
    assert needs(found, recipe(benchmark=None)).memory_bytes == 4 * found.parameters + 512 * 16
    tight = Settings(home=tmp_path, step_memory_bytes=1000)
    with pytest.raises(ResourceError, match=r"of memory to measure.*dtype: bfloat16"):
        refuse(found, recipe(), tight)
    monkeypatch.setattr("modelmint.inspect.free_disk_bytes", lambda folder: 1000)
    with pytest.raises(ResourceError, match="free some, or point MODELMINT_STORE at a larger disk"):
        refuse(found, recipe(), Settings())
    refuse(found, recipe(), Settings(), acquired=True)


def test_inspecting_takes_seconds(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    many = {f"model.layers.{i}.weight": np.zeros((1, 1), np.float16) for i in range(20_000)}
    (folder / WEIGHTS).write_bytes(safetensors_of(weights() | many))
    started = time.monotonic()
    assert len(inspected(folder).tensors) == 20_006
    assert time.monotonic() - started < 10
