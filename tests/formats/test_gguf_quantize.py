"""Variants: every type, options as llama-quantize has them, fallbacks counted exactly, failures with their reason."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from gguf_calls import SANDBOX, base, scratch, source, variant

from modelmint.errors import RecipeError, ResourceError, ToolError, UnsupportedError
from modelmint.formats.gguf import format as gguf
from modelmint.formats.gguf import predict
from modelmint.formats.gguf import quantize as stage
from modelmint.formats.gguf.header import read_header
from modelmint.formats.gguf.types import FILE_TYPES
from modelmint.isolate import Progress
from modelmint.recipe import Variant
from modelmint.sandbox import Sandbox
from modelmint.step import Work

pytestmark = pytest.mark.tools

PLAIN = gguf.parameters(Variant.parse("gguf:Q8_0"))
SLIM = {"hidden_size": 192, "intermediate_size": 512}
WITHOUT_IMATRIX = [name for name, kind in FILE_TYPES.items() if not kind.needs_imatrix]
WITH_IMATRIX = [name for name, kind in FILE_TYPES.items() if kind.needs_imatrix]


def made(type_name: str, folder: Path | None = None, **options: object) -> tuple[Work, dict[str, str]]:
    """What a quantization says, and the type of each tensor."""
    wanted = Variant(format="gguf", type=type_name, options=options)
    work = gguf.quantize(folder or base(), out := scratch(), wanted, SANDBOX)
    return work, {tensor.name: tensor.type.name for tensor in read_header(out / "model.gguf").tensors}


def measured(work: Work) -> dict[str, float]:
    return {measurement.measure: measurement.value for measurement in work.measurements}


class TestTypes:
    @pytest.mark.parametrize("type_name", WITHOUT_IMATRIX)
    def test_every_type_is_made_and_its_bits_are_those_of_the_file(self, type_name):
        work = gguf.quantize(base(), out := scratch(), Variant.parse(f"gguf:{type_name}"), SANDBOX)
        header = read_header(out / "model.gguf")
        bits = 8 * sum(tensor.size for tensor in header.tensors) / sum(tensor.elements for tensor in header.tensors)
        assert measured(work) == {"bits_per_weight": bits, "fallback_tensors": 0}
        assert not work.notes
        assert work.network_isolated
        kind = FILE_TYPES[type_name]
        stored = Counter(tensor.type.name for tensor in header.tensors if len(tensor.shape) > 1)
        assert stored[kind.tensors if type_name != "MXFP4_MOE" else "q8_0"] > 0
        assert header.number("general.file_type") == (kind.id if type_name != "COPY" else FILE_TYPES["F16"].id)

    @pytest.mark.parametrize("type_name", WITH_IMATRIX)
    def test_the_library_itself_wants_an_importance_matrix(self, type_name):
        with pytest.raises(RecipeError, match=f"{type_name} cannot be made without an importance matrix"):
            gguf.check(Variant.parse(f"gguf:{type_name}"))
        with pytest.raises(ToolError, match="this quantization requires an imatrix"):
            stage.quantize(base(), scratch(), type_name, PLAIN, SANDBOX)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_fewer_bits_lose_more(self, architecture):
        # Real text is not needed: random weights give every token a say.
        tokens = list(range(6, 134))
        reference = log_probabilities(base(architecture), tokens)
        lost = {}
        for type_name in ("Q8_0", "Q4_K_M"):
            found = log_probabilities(variant(type_name, architecture), tokens)
            lost[type_name] = float((np.exp(reference) * (reference - found)).sum(axis=-1).mean())
        assert 0 < lost["Q8_0"] < 0.002 < lost["Q4_K_M"] < 0.1

    def test_the_bytes_do_not_depend_on_the_number_of_threads(self):
        two = Sandbox(threads=2, limits=SANDBOX.limits)
        gguf.quantize(base(), out := scratch(), Variant.parse("gguf:Q4_K_M"), two)
        assert (out / "model.gguf").read_bytes() == (variant("Q4_K_M") / "model.gguf").read_bytes()

    def test_says_how_far_it_is(self):
        heard: list[Progress] = []
        sandbox = Sandbox(threads=1, limits=SANDBOX.limits, on_progress=heard.append)
        gguf.quantize(base(), scratch(), Variant.parse("gguf:Q8_0"), sandbox)
        tensors = len(read_header(base() / "model.gguf").tensors)
        assert (heard[-1].done, heard[-1].total, heard[-1].unit) == (tensors, tensors, "tensors")

    def test_needs_little_besides_the_library(self):
        arguments = {
            "base": str(base() / "model.gguf"),
            "out": str(scratch() / "model.gguf"),
            "type_name": "Q8_0",
            "options": PLAIN,
            "threads": 1,
        }
        outcome = SANDBOX.call("modelmint.formats.gguf.quantize:run", arguments)
        # llama-quantize takes 21 MB for this file; pydantic or numpy would take this over the 40 MB allowed besides.
        assert outcome.peak_memory_bytes < 45e6


class TestOptions:
    def test_pure_stores_every_matrix_in_one_type(self):
        _, types = made("Q4_K_M", pure=True)
        assert {kind for name, kind in types.items() if not name.endswith("norm.weight")} == {"q4_K"}

    def test_the_first_pattern_that_is_found_in_a_name_wins(self):
        _, types = made("Q4_K_M", tensor_types=["blk.1.attn_v=Q8_0", "attn_(q|v)=q5_k"])
        assert types["blk.1.attn_v.weight"] == "q8_0"
        assert types["blk.0.attn_v.weight"] == types["blk.1.attn_q.weight"] == "q5_K"
        assert types["blk.0.attn_k.weight"] == "q4_K"

    def test_a_mapping_is_a_list_of_patterns(self):
        given = Variant(format="gguf", type="Q4_0", options={"tensor_types": {"attn_v": "q8_0", "attn_.*": "F16"}})
        assert gguf.parameters(given)["tensor_types"] == ["attn_v=q8_0", "attn_.*=f16"]

    def test_output_and_embedding_have_options_of_their_own(self):
        _, types = made("Q4_K_M", output_tensor_type="q8_0", token_embedding_type="f16")
        assert (types["output.weight"], types["token_embd.weight"]) == ("q8_0", "f16")

    def test_the_output_can_be_left_alone(self):
        _, types = made("Q4_K_M", leave_output_tensor=True)
        assert types["output.weight"] == "f16"

    @pytest.mark.parametrize(
        ("type_name", "options", "reason"),
        [
            ("Q4_K_N", {}, "unknown type 'Q4_K_N'; did you mean 'Q4_K_"),
            ("q4_k_m", {}, "did you mean 'Q4_K_M'"),
            ("Q4_K", {}, "another name of Q4_K_M"),
            ("Q4_K_M", {"puer": True}, "unknown option 'puer'; did you mean 'pure'"),
            ("Q4_K_M", {"pure": "maybe"}, "option pure"),
            ("Q4_K_M", {"tensor_types": ["attn_v"]}, "write pattern=type"),
            ("Q4_K_M", {"tensor_types": ["attn_(=q8_0"]}, "not a regular expression"),
            ("Q4_K_M", {"tensor_types": {"attn_v": "q9_0"}}, "unknown tensor type 'q9_0'; did you mean 'q"),
            ("Q4_K_M", {"tensor_types": {"attn_v": "iq2_xxs"}}, "iq2_xxs needs an importance matrix"),
            ("Q4_K_M", {"output_tensor_type": "i32"}, "unknown tensor type 'i32'"),
            ("F16", {"pure": True}, "pure has no effect on F16"),
            ("COPY", {"output_tensor_type": "q8_0"}, "output_tensor_type has no effect on COPY"),
            ("MXFP4_MOE", {"pure": True}, "leave it out"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, type_name, options, reason):
        with pytest.raises(RecipeError, match=reason):
            gguf.check(Variant(format="gguf", type=type_name, options=options))


class TestFallbacks:
    """Rows of 192 numbers hold no whole block of 256: all but Q4_0 and its like have to fall back."""

    def slim(self, architecture: str = "llama") -> Path:
        return base(architecture, **SLIM)

    def test_each_is_counted_and_each_kind_is_noted(self):
        work, types = made("Q4_K_M", self.slim())
        # In each layer q, k, output, gate and up fall from q4_K; v does in the first, and in the last from q6_K. The
        # embedding falls from q4_K and, without a word of the library's, the output from q6_K. Rows of ffn_down fit.
        assert measured(work)["fallback_tensors"] == 14
        assert work.notes == (
            "12 of 21 tensors fell back from q4_K to q5_0, because rows of 192 are not whole blocks",
            "2 of 21 tensors fell back from q6_K to q8_0, because rows of 192 are not whole blocks",
        )
        assert Counter(types.values()) == {"q5_0": 12, "q8_0": 2, "q4_K": 1, "q6_K": 1, "f32": 5}

    def test_a_tied_embedding_counts_as_the_output(self):
        # Rows of attn_output are 256 wide here, four heads of 64, and fit.
        work, types = made("Q4_K_M", self.slim("qwen3"))
        assert types["token_embd.weight"] == "q8_0"
        assert measured(work)["fallback_tensors"] == 11

    def test_what_options_ask_for_is_no_fallback(self):
        work, _ = made("Q4_K_M", self.slim(), output_tensor_type="q8_0", token_embedding_type="q8_0")
        assert measured(work)["fallback_tensors"] == 12

    def test_blocks_of_32_fit(self):
        work, types = made("Q4_0", self.slim())
        assert measured(work)["fallback_tensors"] == 1
        assert work.notes == ("1 of 21 tensors fell back from q6_K to q8_0, because rows of 192 are not whole blocks",)
        assert types["output.weight"] == "q8_0"

    def test_a_type_that_the_rows_do_not_fit_is_refused(self):
        with pytest.raises(
            UnsupportedError, match=r"q4_K stores blocks of 256, and the rows of token_embd\.weight have 192"
        ):
            made("Q8_0", self.slim(), token_embedding_type="q4_K")
        with pytest.raises(UnsupportedError, match=r"q1_0 stores blocks of 128, and the rows of \S+ have 192"):
            made("Q1_0", self.slim())


class TestFailures:
    def test_a_full_disk_is_named(self):
        out = scratch()
        (out / "model.gguf").symlink_to("/dev/full")
        with pytest.raises(ResourceError, match="No space left on device"):
            gguf.quantize(base(), out, Variant.parse("gguf:Q8_0"), SANDBOX)

    def test_a_quantized_base_is_refused_by_the_library(self):
        with pytest.raises(ToolError, match="requantizing from type q8_0 is disabled"):
            gguf.quantize(variant("Q8_0"), scratch(), Variant.parse("gguf:Q4_0"), SANDBOX)

    def test_a_weight_that_is_no_number_stops_it(self):
        header = read_header(base() / "model.gguf")
        content = bytearray((base() / "model.gguf").read_bytes())
        at = next(tensor.start for tensor in header.tensors if tensor.name == "blk.1.ffn_up.weight")
        content[at + 64 : at + 66] = b"\x00\x7e"
        (damaged := scratch() / "model.gguf").write_bytes(content)
        with pytest.raises(ToolError, match=r"blk\.1\.ffn_up\.weight"):
            gguf.quantize(damaged.parent, scratch(), Variant.parse("gguf:Q4_0"), SANDBOX)


class TestPrediction:
    @pytest.mark.parametrize("slim", [False, True])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_follows_the_librarys_rules(self, architecture, slim):
        config = SLIM if slim else {}
        shapes = tiny.shapes(source(architecture, **config))
        estimated = set()
        for type_name in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"):
            predicted = gguf.predict_size(shapes, Variant.parse(f"gguf:{type_name}"))
            exact = predict.size_of_base(base(architecture, **config), type_name, PLAIN, SANDBOX)
            assert predicted == pytest.approx(exact, rel=0.03)
            estimated.add(predicted - exact)
        # Only the vocabulary is estimated; it is the same in all.
        assert len(estimated) == 1

    @pytest.mark.parametrize(
        "options", [{}, {"pure": True}, {"tensor_types": ["ffn_up=q8_0"], "output_tensor_type": "f16"}]
    )
    def test_with_a_base_it_is_exact(self, options):
        wanted = Variant(format="gguf", type="Q4_K_M", options=options)
        gguf.quantize(base(), out := scratch(), wanted, SANDBOX)
        found = predict.size_of_base(base(), "Q4_K_M", gguf.parameters(wanted), SANDBOX)
        assert found == (out / "model.gguf").stat().st_size

    def test_options_count(self):
        shapes = tiny.shapes(source())
        options = {"tensor_types": ["ffn_up=q8_0"], "output_tensor_type": "f16", "token_embedding_type": "q8_0"}
        wanted = Variant(format="gguf", type="Q4_K_M", options=options)
        exact = predict.size_of_base(base(), "Q4_K_M", gguf.parameters(wanted), SANDBOX)
        assert gguf.predict_size(shapes, wanted) == pytest.approx(exact, rel=0.03)


def log_probabilities(folder: Path, tokens: list[int]) -> np.ndarray:
    session = gguf.open_session(folder, 1, 256)
    logits = session.logits(tokens).astype(np.float64)
    session.close()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
