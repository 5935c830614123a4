"""Unsupported checkpoints are told from their small files, in seconds; the tools are checked before they are used."""

import hashlib
import importlib.metadata
import inspect
import json
import shutil
import time
from pathlib import Path

import pytest
import tiny
from gguf_calls import SANDBOX, scratch, source

from modelmint.errors import SourceError, UnsupportedError
from modelmint.formats import Format, Session
from modelmint.formats.gguf import converter, library
from modelmint.formats.gguf import format as gguf
from modelmint.formats.gguf.session import GgufSession
from modelmint.formats.gguf.types import FILE_TYPES, TENSOR_TYPES
from modelmint.recipe import Variant

pytestmark = pytest.mark.tools


def small_files(architecture: str = "llama", **config: object) -> Path:
    """The files that are there before a download: no weights."""
    folder = scratch()
    for path in source(architecture).iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def with_byte_level_tokenizer(folder: Path) -> Path:
    """Replace the tokenizer by a byte-level BPE one that no other model has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 10, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


class TestCheckpoints:
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_the_shipped_architectures_are_supported(self, architecture):
        gguf.refuse_unsupported(small_files(architecture))

    def test_an_unknown_architecture_is_refused_with_the_nearest_known(self):
        folder = small_files(architectures=["LlamaForCasualLM"])
        with pytest.raises(
            UnsupportedError, match=r"'LlamaForCasualLM' \(model_type llama\); did you mean 'LlamaForCausalLM'"
        ):
            gguf.refuse_unsupported(folder)

    def test_no_architecture_is_refused(self):
        with pytest.raises(UnsupportedError, match="names no architecture"):
            gguf.refuse_unsupported(small_files(architectures=None))

    def test_the_text_model_counts_where_there_are_several(self):
        text = {"architectures": ["Gemma3ForCausalLM"]}
        gguf.refuse_unsupported(small_files(architectures=["SomethingNewForConditionalGeneration"], text_config=text))

    def test_an_unknown_pre_tokenizer_is_refused_in_seconds(self):
        folder = with_byte_level_tokenizer(small_files())
        started = time.monotonic()
        with pytest.raises(
            UnsupportedError, match=r"hash [0-9a-f]{64} \(tokenizer_class PreTrained.*model_type llama\)"
        ):
            gguf.refuse_unsupported(folder)
        assert time.monotonic() - started < 20

    def test_the_hash_is_that_of_the_ids_that_transformers_gives(self):
        from transformers import AutoTokenizer

        folder = with_byte_level_tokenizer(small_files())
        ids = AutoTokenizer.from_pretrained(folder).encode(converter.pre_tokenizers().text)
        with pytest.raises(UnsupportedError, match=hashlib.sha256(str(ids).encode()).hexdigest()):
            gguf.refuse_unsupported(folder)

    def test_the_converter_refuses_it_too(self, tmp_path):
        folder = with_byte_level_tokenizer(shutil.copytree(source(vocab_size=400), tmp_path / "source"))
        with pytest.raises(UnsupportedError, match="BPE pre-tokenizer was not recognized"):
            gguf.convert(folder, scratch(), {}, SANDBOX)

    def test_a_known_pre_tokenizer_is_taken(self, monkeypatch):
        folder = with_byte_level_tokenizer(small_files())
        with pytest.raises(UnsupportedError, match="hash") as refused:
            gguf.refuse_unsupported(folder)
        found = str(refused.value).partition("the hash ")[2][:64]
        known = converter.pre_tokenizers()
        monkeypatch.setattr(converter, "pre_tokenizers", lambda: converter.PreTokenizers(known.text, {found: "mine"}))
        gguf.refuse_unsupported(folder)

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("config.json", None, r"has no config\.json"),
            ("config.json", "{", r"config\.json is no JSON"),
            ("config.json", "[]", "holds list"),
            ("tokenizer.json", '{"model": {"type": "BPE"}}', r"tokenizer\.json is no tokenizer"),
        ],
    )
    def test_broken_files_are_named(self, name, content, reason):
        folder = small_files()
        (folder / "tokenizer.model").unlink()
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        with pytest.raises(SourceError, match=reason):
            gguf.refuse_unsupported(folder)


class TestTools:
    def test_every_tool_that_decides_the_bytes_is_named(self):
        names = {tool.name: tool for tool in gguf.tools("convert")}
        assert set(names) == {"llama-cpp-python", *gguf.CONVERTER_PACKAGES}
        llama = names["llama-cpp-python"]
        assert llama.version == importlib.metadata.version("llama-cpp-python")
        assert llama.source is not None
        assert "-DGGML_NATIVE=OFF" in llama.flags
        assert gguf.tools("quantize") == gguf.tools("benchmark") == (llama,)

    @pytest.fixture
    def copy(self, tmp_path, monkeypatch):
        folder = shutil.copytree(converter.home(), tmp_path / "llama.cpp")
        monkeypatch.setattr(converter, "home", lambda: folder)
        converter.source.cache_clear()
        yield folder
        converter.source.cache_clear()

    def test_a_changed_file_of_the_converter_is_found(self, copy):
        assert converter.source().version
        converter.source.cache_clear()
        with (copy / "conversion" / "base.py").open("a") as file:
            file.write("\n")
        with pytest.raises(UnsupportedError, match=r"base\.py has SHA-256 .*make install"):
            gguf.tools()

    def test_a_missing_file_of_the_converter_is_found(self, copy):
        (copy / "conversion" / "llama.py").unlink()
        with pytest.raises(UnsupportedError, match=r"llama\.py has SHA-256 missing.*make install"):
            gguf.tools("quantize")

    def test_a_converter_of_another_version_is_found(self, copy):
        record = json.loads((copy / "source.json").read_text())
        (copy / "source.json").write_text(json.dumps(record | {"version": "0.3.35"}))
        with pytest.raises(UnsupportedError, match=r"belongs to llama-cpp-python 0\.3\.35, but .* is installed"):
            gguf.tools()

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (None, "not installed"),
            ("{", "cannot be read"),
            ('{"schema": 2}', "has schema 2"),
            ('{"schema": 1}', "files"),
        ],
    )
    def test_a_broken_record_is_found(self, copy, content, reason):
        if content is None:
            (copy / "source.json").unlink()
        else:
            (copy / "source.json").write_text(content)
        with pytest.raises(UnsupportedError, match=f"{reason}.*make install"):
            gguf.tools()


class TestTables:
    def test_tensor_types_are_the_librarys(self):
        import ctypes

        ggml = library.tensor_library()
        ggml.ggml_type_name.restype = ctypes.c_char_p
        ggml.ggml_blck_size.restype = ctypes.c_int64
        ggml.ggml_type_size.restype = ctypes.c_size_t
        for name, kind in TENSOR_TYPES.items():
            assert ggml.ggml_type_name(kind.id) == name.encode()
            assert (ggml.ggml_blck_size(kind.id), ggml.ggml_type_size(kind.id)) == (kind.block, kind.size)

    def test_file_types_are_the_librarys(self):
        llama = library.load()
        for name, kind in FILE_TYPES.items():
            if name not in ("F32", "COPY"):
                assert getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}") == kind.id

    def test_recognized_pre_tokenizers_are_read_from_the_converter(self):
        known = converter.pre_tokenizers()
        assert {"smollm", "qwen2", "llama-bpe", "gpt-4o"} <= set(known.names.values())
        assert known.text.startswith("\n \n\n")
        lines = (converter.home() / "conversion" / "base.py").read_text().splitlines()
        # Two hashes stand there twice.
        assert len(known.names) == len({line.strip() for line in lines if line.strip().startswith("if chkhsh ==")})

    def test_architectures_are_read_from_the_converter(self):
        known = converter.architectures()
        assert known["LlamaForCausalLM"] == "llama"
        assert len(known) > 150


@pytest.mark.parametrize(
    ("type_name", "label", "name"),
    [
        ("Q4_K_M", "", "SmolLM2-135M-Q4_K_M.gguf"),
        ("Q4_K_M", "small-head", "SmolLM2-135M-Q4_K_M-small-head.gguf"),
        ("f16", "", "SmolLM2-135M-F16.gguf"),
    ],
)
def test_files_are_named_as_llama_cpps_users_name_them(type_name, label, name):
    assert gguf.file_name("SmolLM2-135M", type_name, label, "model.gguf") == name


def test_every_type_has_a_line_for_lists():
    for name, kind in gguf.types().items():
        assert kind.name == name
        assert kind.summary
        assert 1 < kind.bits <= 32
        assert kind.needs_calibration == FILE_TYPES[name].needs_imatrix
    assert gguf.base_type({}) == "f16"
    assert gguf.base_type({"type": "bf16"}) == "bf16"
    assert gguf.parameters(Variant.parse("gguf:Q8_0")) == gguf.VariantOptions().model_dump(mode="json")


@pytest.mark.parametrize("protocol", [(Format, gguf), (Session, GgufSession)])
def test_the_protocol_is_met(protocol):
    wanted, offered = protocol
    for name, member in vars(wanted).items():
        if name.startswith("_"):
            continue
        found = getattr(offered, name)
        if inspect.isfunction(member):
            assert list(inspect.signature(found).parameters) == [
                parameter
                for parameter in inspect.signature(member).parameters
                if offered is not gguf or parameter != "self"
            ]
    assert all(hasattr(offered, name) for name in wanted.__annotations__)
