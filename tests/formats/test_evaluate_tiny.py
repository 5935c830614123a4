"""The ruler on real conversions of tiny checkpoints: source under PyTorch against GGUF under llama.cpp."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tiny

from modelmint import reference
from modelmint.convert import convert
from modelmint.errors import SourceError, ToolError
from modelmint.evaluate import evaluate, read
from modelmint.isolate import Progress
from modelmint.quantize import quantize
from modelmint.recipe import Evaluation, Variant
from modelmint.report import Measurements
from modelmint.settings import Settings
from modelmint.step import Context
from modelmint.store import Store

pytestmark = pytest.mark.tools

SMALL = Evaluation(window=64, windows=4, top=64, sample=32, answer_tokens=6, prompts=("Hello?",))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """One store for all, so that each conversion and reference is made once."""
    folder = tmp_path_factory.mktemp("home")
    return Context(Store(folder / "store"), Settings(home=folder, host_lock=folder / "host"))


@pytest.fixture(scope="module")
def text(context: Context, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(topics["assert"] * 4)
    return context.store.add_folder(folder).digest


def sources(context: Context, folder: Path, architecture: str = "llama") -> tuple[str, str]:
    """Digests of a tiny checkpoint and of its GGUF base."""
    source = context.store.add_folder(tiny.checkpoint(folder / architecture, architecture)).digest
    return source, convert(source, "gguf", {}, context).record.output


def measured(context: Context, variant: str, held_against: str) -> tuple[dict[str, float], Measurements]:
    step = evaluate("gguf", variant, held_against, SMALL, 1, context)
    found = read(context.store, step.record.output)
    return {m.measure: m.value for m in found.measurements}, found


def changed(context: Context, digest: str, folder: Path, change: Callable[[Path], None]) -> str:
    """A stored GGUF file with something changed in it."""
    context.store.materialize(digest, folder)
    [path] = folder.glob("*.gguf")
    path.chmod(0o644)
    change(path)
    return context.store.add_folder(folder).digest


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_conversion_loses_next_to_nothing_and_quantization_more_with_fewer_bits(
    context: Context, tmp_path: Path, text: str, architecture: str
) -> None:
    source, base = sources(context, tmp_path, architecture)
    result = reference.reference(source, text, SMALL, context)
    assert result.record.network_isolated
    held_against = result.record.output
    q8, q4 = (quantize(base, Variant.parse(f"gguf:{name}"), context).record.output for name in ("Q8_0", "Q4_K_M"))
    conversion, found = measured(context, base, held_against)
    eight, four = (measured(context, digest, held_against)[0] for digest in (q8, q4))
    # Two float16 roundings of each weight; llama.cpp computes some products in float16.
    assert 0 <= conversion["kl_divergence"] < 1e-4
    assert 5 * conversion["kl_divergence"] < eight["kl_divergence"] < 0.005
    assert 10 * eight["kl_divergence"] < four["kl_divergence"] < 0.5
    assert conversion["perplexity_ratio"] == pytest.approx(1, abs=2e-3)
    for sound in ("loads", "finite_logits", "tokenizer_parity", "template_parity", "special_tokens_parity"):
        assert conversion[sound] == eight[sound] == four[sound] == 1
    assert len(found.answers) == 1
    # Two numbers of one reference and one tool: the variant's perplexity over their ratio is the reference's.
    [perplexity] = result.record.measurements
    assert eight["perplexity"] / eight["perplexity_ratio"] == pytest.approx(perplexity.value, rel=1e-5)


def test_reference_of_the_base_is_the_base(context: Context, tmp_path: Path, text: str) -> None:
    source, base = sources(context, tmp_path)
    held_against = reference.reference(source, text, SMALL, context, base=("gguf", base)).record
    assert {tool.name for tool in held_against.step.tools} >= {"llama-cpp-python", "tokenizers", "numpy"}
    found, _ = measured(context, base, held_against.output)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert found["top_1_agreement"] == 1
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-6)


def test_progress_counts_windows(context: Context, tmp_path: Path, text: str) -> None:
    source, _ = sources(context, tmp_path)
    heard: list[Progress] = []
    other = SMALL.model_copy(update={"seed": 1})
    reference.reference(source, text, other, dataclasses.replace(context, on_progress=heard.append))
    assert (heard[-1].done, heard[-1].total, heard[-1].unit) == (4, 4, "windows")


def test_error_of_the_child_keeps_its_class(context: Context, tmp_path: Path) -> None:
    source, _ = sources(context, tmp_path)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "text.txt").write_text("too short")
    short = context.store.add_folder(tmp_path / "short").digest
    with pytest.raises(SourceError, match="gives 0 windows of 64 tokens"):
        reference.reference(source, short, SMALL, context)


def test_weight_that_is_not_a_number_is_seen(context: Context, tmp_path: Path, text: str) -> None:
    source, base = sources(context, tmp_path)
    held_against = reference.reference(source, text, SMALL, context).record.output

    def damage(path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path, "r+")
        [norm] = [tensor for tensor in reader.tensors if tensor.name == "output_norm.weight"]
        norm.data[3] = float("nan")
        reader.data.flush()

    found, document = measured(context, changed(context, base, tmp_path / "x", damage), held_against)
    assert found["finite_logits"] == 0
    assert "kl_divergence" not in found
    assert "divergence is left out: 100.00% of the logits of window 1 are not finite" in document.notes


def test_tokenizer_that_kills_llama_cpp_is_named(context: Context, tmp_path: Path, text: str) -> None:
    """Without tokens for single bytes, llama.cpp ends the process at the first character it does not know."""
    source, base = sources(context, tmp_path)
    held_against = reference.reference(source, text, SMALL, context).record.output

    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"<0x", b"<0y"))

    broken = changed(context, base, tmp_path / "x", damage)
    with pytest.raises(ToolError, match="failed while tokenizing texts, where its tokenizer should do as") as crash:
        evaluate("gguf", broken, held_against, SMALL, 1, context)
    assert crash.value.signal == "SIGABRT"


def test_file_that_does_not_load_is_named(context: Context, tmp_path: Path, text: str) -> None:
    source, base = sources(context, tmp_path)
    held_against = reference.reference(source, text, SMALL, context).record.output

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-10_000])

    broken = changed(context, base, tmp_path / "x", cut)
    with pytest.raises(ToolError, match="failed while loading the model: "):
        evaluate("gguf", broken, held_against, SMALL, 1, context)
