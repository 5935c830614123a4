"""The tables of the terminal: they fit it, and lose nothing where there is none."""

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from sample_release import FIGURES, NOTICE, sample

from modelmint.columns import COLUMNS, count_of_weights, figure, rows, three_digits
from modelmint.compare import compare_rows
from modelmint.plan import Plan, PlannedStep, PlannedVariant
from modelmint.release import StepCount
from modelmint.report import judge
from modelmint.table import duration, show_comparison, show_plan, show_release

pytestmark = pytest.mark.pure


def shown(show, *arguments, width: int | None = None, colour: bool = False, **options) -> str:
    """What is printed on a terminal of that width, or into a file."""
    stream = io.StringIO()
    colours = "truecolor" if colour else None
    terminal = width is not None
    show(Console(file=stream, width=width, force_terminal=terminal, color_system=colours), *arguments, **options)
    return stream.getvalue()


def test_a_pipe_gets_plain_text_and_all_of_it():
    text = shown(show_release, sample(), report_path=Path("/a/long/path") / ("x" * 200) / "report.html")
    assert "\x1b" not in text
    assert "…" not in text
    assert "x" * 200 + "/report.html" in text
    for column in COLUMNS:
        assert column.title in text
    for name in FIGURES:
        assert f"gguf:{name}" in text
    assert "left out" not in text


def test_a_table_says_all_that_matters_of_a_release():
    text = shown(show_release, sample())
    for line in (
        "5 of 7 variants passed; 2 optional failed a gate.",
        "  gguf:Q4_0    mean KL divergence 0.2551 nats/token is above the gate's 0.15",
        "               top-1 agreement 0.745 is below the gate's 0.8 (not required)",
        NOTICE,
        "forge-1: AMD EPYC 7B13, 2 cores, 8 GB",
        "x86_64 sse4_2 avx avx2 fma f16c bmi2, cpu, 2 threads",
        "21 executed, 6 reused, 2 min 24 s; continues smollm2-135m-20260901-095512",
    ):
        assert line in text
    row = next(line for line in text.splitlines() if line.startswith(" gguf:Q8_0"))
    assert row.split() == [
        *("gguf:Q8_0", "145", "8.51", "0.0040", "±", "0.0002", "96.6", "1.001"),
        *("480", "140", "533", "231", "passed"),
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
def test_a_table_fits_its_terminal_without_cutting_a_name_or_a_reason(width):
    text = shown(show_release, sample(), width=width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for name in FIGURES:
        assert any(line.split()[:1] == [f"gguf:{name}"] for line in text.splitlines())
    joined = " ".join(text.split())
    assert "mean KL divergence 0.2551 nats/token is above the gate's 0.15" in joined


def test_columns_that_do_not_fit_are_named_and_the_most_telling_stay():
    assert "left out" not in shown(show_release, sample(), width=100)
    text = shown(show_release, sample(), width=60)
    assert "KL divergence" in text
    assert "TTFT ms" in " ".join(text.partition("left out")[2].split())


def test_passed_is_green_failed_is_red_and_the_base_is_dim():
    text = shown(show_release, sample(), width=140, colour=True)
    assert "\x1b[32mpassed" in text
    assert "\x1b[1;31mfailed" in text
    assert "\x1b[2mgguf:f16" in text


def test_foreign_text_cannot_write_to_the_terminal_and_is_no_markup():
    source = sample().source.model_copy(update={"model": "\x1b[2J[red]x[/red]", "license": "\x07\u202e"})
    text = shown(show_release, sample().model_copy(update={"source": source}), width=120)
    assert "�[2J[red]x[/red]" in text
    assert not set("\x1b\x07\u202e") & set(text)


def test_a_variant_without_figures_shows_its_failure():
    unmade = (
        sample()
        .variants[1]
        .model_copy(
            update={
                "measurements": (),
                "digest": "",
                "verdict": judge((), {}, failure="quantize failed: no space left"),
            }
        )
    )
    text = shown(show_release, sample().model_copy(update={"variants": (unmade,)}))
    assert "incomplete" in text
    assert "0 of 1 variants passed; 1 required could not be finished." in text
    assert "gguf:Q8_0  quantize failed: no space left" in text


def test_rows_for_other_tables_carry_titles_and_text():
    first = rows(sample())[1]
    assert first["variant"] == "gguf:Q8_0"
    assert first["KL divergence nats / token"] == "0.0040 ± 0.0002"
    assert first["size MB"] == "145"
    assert rows(sample())[5]["verdict"] == "failed, optional"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (271.4, "271"), (99.97, "100"), (92, "92.0"), (9.996, "10.0"), (5.411, "5.41"), (0.0831, "0.0831")],
)
def test_three_digits_of_a_figure(number, text):
    assert three_digits(number) == text


def test_a_figure_too_small_for_its_decimals_keeps_its_digits():
    assert figure(0.0040, 4) == "0.0040"
    assert figure(0.00004, 4) == "4.0e-05"
    assert figure(4.1e-7, 4) == "4.1e-07"
    assert figure(0.0, 4) == "0.0000"


def test_people_say_weights_and_times_so():
    assert [count_of_weights(count) for count in (512, 134_515_008, 3_836_021_760)] == ["512", "135 M", "3.84 B"]
    said = {0.41: "0.410 s", 12.3: "12 s", 59.6: "1 min", 144.2: "2 min 24 s", 3900: "1 h 5 min", 7200: "2 h"}
    assert {seconds: duration(seconds) for seconds in said} == said


PLAN = Plan(
    recipe="smollm2-135m",
    source="file:model",
    model="SmolLM2-135M-Instruct",
    steps=(PlannedStep(stage="reference", state="runs"), PlannedStep(stage="acquire", state="reused")),
    variants=(
        PlannedVariant(
            variant="gguf:f16",
            is_base=True,
            size_bytes=271_000_000,
            steps=(PlannedStep(stage="convert", state="reused"),),
        ),
        PlannedVariant(
            variant="gguf:Q8_0",
            size_bytes=145_000_000,
            steps=(PlannedStep(stage="evaluate", state="runs"), PlannedStep(stage="quantize", state="runs")),
        ),
        PlannedVariant(variant="gguf:IQ2_XS", required=False, refusal="IQ2_XS needs an importance matrix"),
    ),
    step_count=StepCount(executed=3, reused=2),
    disk_bytes=420_000_000,
    disk_free_bytes=99_000_000_000,
    seconds=65,
    notes=(NOTICE,),
)


def test_a_plan_says_what_runs_and_what_it_takes():
    text = shown(show_plan, PLAN)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["variant"] == ["variant", "MB", "convert", "quantize", "evaluate", "required"]
    assert lines["gguf:f16"] == ["gguf:f16", "271", "reused", "–", "–"]
    assert lines["gguf:Q8_0"] == ["gguf:Q8_0", "145", "–", "runs", "runs", "yes"]
    for said in (
        "gguf:IQ2_XS  IQ2_XS needs an importance matrix",
        "acquire reused, reference runs",
        "3 to execute, 2 reused",
        "0.420 GB needed, 99.0 GB free",
        "about 1 min 5 s",
        NOTICE,
    ):
        assert said in text


def test_a_comparison_shows_the_later_figures_and_their_changes():
    before = sample()
    q8 = before.variants[1]
    smaller = tuple(m.model_copy(update={"value": 130e6}) if m.measure == "size" else m for m in q8.measurements)
    after = before.model_copy(
        update={"release": "later", "variants": (q8.model_copy(update={"measurements": smaller}), *before.variants[2:])}
    )
    text = shown(show_comparison, compare_rows([before, after]))
    assert "later  against smollm2-135m-20260901-100407" in text
    assert "-10.3% better" in text
    assert "gguf:f16" in text
