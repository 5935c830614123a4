"""A made-up release with measured figures: SmolLM2-135M in seven types, two of which fail the default gates.

``python tests/sample_release.py page.html`` writes its page, to look at.
"""

import sys
from pathlib import Path

from modelmint.artifact import Artifact, FileEntry, Invocation, Step, StepRecord, Tool, digest_of_bytes
from modelmint.recipe import Recipe, Variant
from modelmint.release import (
    EvaluationReport,
    Links,
    ReleaseReport,
    SourceReport,
    StepCount,
    StepReport,
    VariantReport,
)
from modelmint.release_lock import ReleaseLock, build_lock
from modelmint.report import Answer, HardwareClass, Host, Measurement, judge

HARDWARE = HardwareClass(instructions="x86_64 sse4_2 avx avx2 fma f16c bmi2", threads=2)
HOST = Host(
    cpu="AMD EPYC 7B13",
    cores=2,
    flags=("avx", "avx2", "bmi2", "f16c", "fma", "sse4_2"),
    memory_bytes=8_345_000_000,
    system="Linux 6.1.0 x86_64",
    name="forge-1",
)
INVOCATION = Invocation(
    flow_run="0f6dd8a1-1f0e-4f0a-9a3f-6f2f2a7f2a10",
    tracking_run="5b1f6e0c9d3a4b52a1e8f7c6d5b4a392",
    release="smollm2-135m-20260901-100407",
)
LLAMA_CPP = Tool(
    name="llama-cpp-python",
    version="0.3.36",
    source=digest_of_bytes(b"llama-cpp-python source distribution"),
    flags=("-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"),
)
TORCH = Tool(name="torch", version="2.13.0+cpu")
TRANSFORMERS = Tool(name="transformers", version="5.23.0")
NOTICE = "This source was itself quantized: its weights were dequantized from Q4_1, and no figure here can undo that."

# type: MB, bits per weight, fallbacks, mean KL, top-1, perplexity ratio, prefill, decode tokens/s, memory MB
FIGURES = {
    "Q8_0": (145, 8.51, 0, 0.0040, 0.966, 1.0012, 480, 140, 231),
    "Q6_K": (138, 8.14, 180, 0.0085, 0.951, 1.0031, 510, 151, 224),
    "Q5_K_M": (112, 6.60, 180, 0.0699, 0.866, 1.0518, 268, 129, 198),
    "Q4_K_M": (105, 6.17, 180, 0.0573, 0.867, 1.0411, 415, 149, 191),
    "Q4_0": (92, 5.41, 0, 0.2551, 0.745, 1.2296, 591, 197, 178),
    "IQ4_NL": (92, 5.41, 0, 0.1817, 0.771, 1.1573, 586, 189, 178),
    "Q3_K_M": (94, 5.52, 180, 0.1252, 0.818, 1.0977, 573, 204, 180),
}
OPTIONAL = ("Q4_0", "IQ4_NL")

RECIPE = Recipe.model_validate(
    {
        "schema": 1,
        "name": "smollm2-135m",
        "description": "SmolLM2-135M-Instruct for the edge, as GGUF.",
        "source": "file:examples/models/SmolLM2-135M-Instruct",
        "quantized_source": "accept",
        "variants": [{"variant": f"gguf:{name}", "required": name not in OPTIONAL} for name in FIGURES],
    }
)
SNAPSHOT = Artifact.of(
    FileEntry(path=path, size=size, digest=digest_of_bytes(path.encode()))
    for path, size in (("model.safetensors", 269_060_552), ("config.json", 861), ("tokenizer.json", 2_104_556))
)


def record(step: Step, output: str, seconds: float, notes: tuple[str, ...] = ()) -> StepRecord:
    """The record of a step that made something called `output`."""
    return StepRecord(
        key=step.key,
        step=step,
        output=digest_of_bytes(output.encode()),
        seconds=seconds,
        finished="2026-09-01T10:04:07Z",
        host=HOST.name,
        notes=notes,
        network_isolated=None if step.stage == "acquire" else True,
    )


ACQUIRE = record(Step(stage="acquire", stage_version=1, parameters={"source": str(RECIPE.source)}), "snapshot", 0.9)
INSPECT = record(Step(stage="inspect", stage_version=1, inputs={"source": ACQUIRE.output}), "inspection", 0.4)
REFERENCE = record(
    Step(
        stage="reference",
        stage_version=1,
        parameters={"window": 512, "windows": 12, "top": 256, "sample": 64, "dtype": "float32"},
        inputs={"source": ACQUIRE.output, "text": digest_of_bytes(b"text")},
        tools=(TORCH, TRANSFORMERS),
        observation=True,
    ),
    "reference",
    41.3,
)
CONVERT = record(
    Step(
        stage="convert",
        stage_version=1,
        parameters={"type": "f16"},
        inputs={"source": ACQUIRE.output},
        tools=(LLAMA_CPP,),
    ),
    "base",
    9.0,
)


def measuring(name: str, made: StepRecord) -> tuple[StepRecord, StepRecord]:
    """The records of evaluating and benchmarking a variant."""
    evaluate = Step(
        stage="evaluate",
        stage_version=1,
        parameters={"hardware": str(HARDWARE), "answer_tokens": 64},
        inputs={"variant": made.output, "reference": REFERENCE.output},
        tools=(LLAMA_CPP,),
        observation=True,
    )
    benchmark = Step(
        stage="benchmark",
        stage_version=1,
        parameters={"hardware": str(HARDWARE), "host": HOST.name, "prompt_tokens": 256, "generate_tokens": 64},
        inputs={"variant": made.output},
        tools=(LLAMA_CPP,),
        observation=True,
    )
    return record(evaluate, f"evaluation of {name}", 15.2), record(benchmark, f"benchmark of {name}", 5.8)


def quantizing(name: str) -> StepRecord:
    """The record of quantizing the base to a type."""
    step = Step(
        stage="quantize",
        stage_version=1,
        parameters={"type": name, "options": {"pure": False, "overrides": {}}},
        inputs={"base": CONVERT.output},
        tools=(LLAMA_CPP,),
    )
    fallbacks = FIGURES[name][2]
    notes = (f"{fallbacks} tensors of width 576 fell back to another type",) if fallbacks else ()
    return record(step, f"gguf:{name}", 1.3, notes)


def measurements(name: str) -> tuple[Measurement, ...]:
    """The figures of a type."""
    size, bits, fallbacks, kl, top_1, ratio, prefill, decode, memory = FIGURES[name]
    sound = {"loads": 1.0, "finite_logits": 1.0, "tokenizer_parity": 1.0, "template_parity": 1.0, "generates": 1.0}
    taken = (
        Measurement(measure="kl_divergence", value=kl, trials=3072, spread=kl * 0.04, statistic="mean"),
        Measurement(measure="kl_divergence_p99", value=kl * 9, trials=3072, statistic="p99"),
        Measurement(measure="top_1_agreement", value=top_1, trials=3072, spread=0.006, statistic="mean"),
        Measurement(measure="perplexity", value=17.42 * ratio, trials=3072, statistic="mean"),
        Measurement(measure="perplexity_ratio", value=ratio, trials=3072, spread=0.002, statistic="ratio"),
        Measurement(measure="conversion_kl", value=4.1e-7, trials=3072, spread=3e-8, statistic="mean"),
        *(Measurement(measure=measure, value=value) for measure, value in sound.items()),
        Measurement(measure="special_tokens_parity", value=1),
        Measurement(measure="stops", value=2 / 3, trials=3, statistic="mean"),
        Measurement(measure="load_time", value=0.083, trials=3, spread=0.004, statistic="median"),
        Measurement(measure="time_to_first_token", value=256 / prefill, trials=3, spread=0.012, statistic="median"),
        Measurement(measure="prefill_rate", value=prefill, trials=3, spread=6.0, statistic="median"),
        Measurement(measure="decode_rate", value=decode, trials=3, spread=2.5, statistic="median"),
        Measurement(measure="peak_memory", value=memory * 1e6, trials=3, statistic="max"),
    )
    files = (
        Measurement(measure="size", value=size * 1e6),
        Measurement(measure="bits_per_weight", value=bits),
        Measurement(measure="fallback_tensors", value=fallbacks),
    )
    return (*(m.model_copy(update={"hardware": HARDWARE}) for m in taken), *files)


ANSWERS = (
    Answer(prompt="What is the capital of France?", text="The capital of France is Paris.", tokens=8, stopped=True),
    Answer(prompt="Name three primary colours.", text="Red, blue and yellow.", tokens=7, stopped=True),
    Answer(
        prompt="Write one sentence about the sea.",
        text="The sea, a vast and mysterious realm, holds secrets and treasures that whisper tales of ancient "
        "civilizations, majestic creatures, and the endless cycle of life that has shaped our world for",
        tokens=64,
        stopped=False,
    ),
)


def base() -> VariantReport:
    """The unquantized base."""
    evaluate, benchmark = measuring("f16", CONVERT)
    figures = {"size": 271e6, "bits_per_weight": 16.0, "conversion_kl": 4.1e-7, "top_1_agreement": 0.9997}
    speeds = {"prefill_rate": 322.0, "decode_rate": 88.0, "time_to_first_token": 0.795, "peak_memory": 357e6}
    return VariantReport(
        variant="gguf:f16",
        format="gguf",
        type="f16",
        is_base=True,
        digest=CONVERT.output,
        size_bytes=271_000_000,
        files=("SmolLM2-135M-Instruct-F16.gguf",),
        options={"type": "f16"},
        measurements=tuple(
            Measurement(measure=measure, value=value, hardware=HARDWARE if measure in speeds else None)
            for measure, value in {**figures, **speeds}.items()
        ),
        steps=tuple(StepReport.of(step, reused=True) for step in (CONVERT, evaluate, benchmark)),
    )


def variant(wanted: Variant) -> VariantReport:
    """A variant, measured and judged."""
    made = quantizing(wanted.type)
    evaluate, benchmark = measuring(wanted.type, made)
    figures = measurements(wanted.type)
    steps = ((CONVERT, True), (made, False), (evaluate, False), (benchmark, False))
    return VariantReport(
        variant=wanted.name,
        format=wanted.format,
        type=wanted.type,
        required=wanted.required,
        digest=made.output,
        size_bytes=FIGURES[wanted.type][0] * 1_000_000,
        files=(f"SmolLM2-135M-Instruct-{wanted.type}.gguf",),
        options={"pure": False, "overrides": {}},
        base=CONVERT.output,
        measurements=figures,
        answers=ANSWERS,
        notes=made.notes,
        verdict=judge(figures, RECIPE.gates_of(wanted)),
        steps=tuple(StepReport.of(step, reused) for step, reused in steps),
    )


def sample() -> ReleaseReport:
    """The release."""
    variants = (base(), *(variant(wanted) for wanted in RECIPE.variants))
    shared = tuple(StepReport.of(step, reused=True) for step in (ACQUIRE, INSPECT, REFERENCE))
    return ReleaseReport(
        release=INVOCATION.release,
        recipe=RECIPE,
        recipe_digest=RECIPE.digest,
        source=SourceReport(
            reference=str(RECIPE.source),
            model="SmolLM2-135M-Instruct",
            revision=digest_of_bytes(b"revision"),
            digest=ACQUIRE.output,
            license="apache-2.0",
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
            size_class="micro",
            context_length=8192,
            notice=NOTICE,
        ),
        variants=variants,
        evaluation=EvaluationReport(
            reference="source",
            dtype="float32",
            data="pydoc",
            text_digest=digest_of_bytes(b"text"),
            window=512,
            windows=12,
            positions=3072,
            top=256,
            sample=64,
        ),
        host=HOST,
        hardware=HARDWARE,
        steps=shared,
        step_count=StepCount.of(step for steps in (shared, *(v.steps for v in variants)) for step in steps),
        created="2026-09-01T10:06:31Z",
        seconds=144.2,
        continues="smollm2-135m-20260901-095512",
        links=Links(flow_run=INVOCATION.flow_run, tracking_run=INVOCATION.tracking_run),
        modelmint="0.1.0",
    )


def records() -> list[StepRecord]:
    """The records of every step of the release."""
    made = [quantizing(name) for name in FIGURES]
    measuring_all = [measuring(name, step) for name, step in zip(FIGURES, made, strict=True)]
    shared = [ACQUIRE, INSPECT, REFERENCE, CONVERT, *measuring("f16", CONVERT)]
    return [*shared, *made, *(step for pair in measuring_all for step in pair)]


def lock(in_order: list[StepRecord] | None = None) -> ReleaseLock:
    """Its lock, from the records in any order."""
    return build_lock(
        recipe=RECIPE,
        source=str(RECIPE.source),
        snapshot=SNAPSHOT,
        records=in_order or records(),
        variants=sample().variants,
        data={"evaluation": digest_of_bytes(b"text")},
    )


def main() -> None:
    """Write the page to the path given."""
    from modelmint.page import render_page

    Path(sys.argv[1]).write_text(render_page(sample()), encoding="utf-8")


if __name__ == "__main__":
    main()
