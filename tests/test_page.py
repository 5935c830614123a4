"""The report page: complete, self-contained, deterministic, and deaf to hostile names."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from sample_release import FIGURES, NOTICE, sample

from modelmint.page import render_page
from modelmint.release import ReleaseReport, VariantReport
from modelmint.report import Answer, Bound, Verdict, judge

pytestmark = pytest.mark.pure

HOSTILE = "</bdi><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\x1b[31m"


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "line", "circle", "rect", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "circle", "rect", "path", "polyline"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.seen if name == tag)


def with_variants(*variants: VariantReport) -> ReleaseReport:
    return sample().model_copy(update={"variants": variants})


def test_equal_reports_give_the_same_bytes():
    assert render_page(sample()) == render_page(sample())
    assert render_page(sample()) != render_page(sample().model_copy(update={"release": "another"}))


def test_the_page_is_well_formed_and_loads_nothing():
    page = render_page(sample())
    elements = Elements(page)
    assert elements.open == []
    assert not {name for name, _ in elements.seen} & {"link", "img", "iframe", "object", "embed", "base", "form", "a"}
    attributes = {attribute for _, given in elements.seen for attribute in given}
    assert not attributes & {"src", "href", "srcset", "style", "action", "background"}
    assert not [attribute for attribute in attributes if attribute.startswith("on")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)


def test_the_security_policy_allows_exactly_the_style_and_script_of_the_page():
    elements = Elements(render_page(sample()))
    policy = next(meta["content"] for meta in elements.named("meta") if "http-equiv" in meta)
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        digest = base64.b64encode(hashlib.sha256(elements.text[tag].encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")


def test_a_hostile_name_is_text_wherever_it_stands():
    variant = (
        sample()
        .variants[5]
        .model_copy(
            update={
                "variant": HOSTILE,
                "files": (HOSTILE,),
                "notes": (HOSTILE,),
                "options": {HOSTILE: HOSTILE},
                "answers": (Answer(prompt=HOSTILE, text=HOSTILE, tokens=1, stopped=True),),
                "verdict": judge(sample().variants[5].measurements, {}, failure=HOSTILE),
            }
        )
    )
    source = sample().source.model_copy(
        update=dict.fromkeys(("reference", "model", "license", "architecture", "notice", "revision"), HOSTILE)
    )
    report = with_variants(sample().variants[0], variant).model_copy(
        update={"source": source, "failure": HOSTILE, "release": HOSTILE, "continues": HOSTILE}
    )
    page = render_page(report)
    elements = Elements(page)
    assert elements.open == []
    assert len(list(elements.named("script"))) == 1
    assert "alert" not in elements.text["script"]
    assert not list(elements.named("img"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", page)


def test_every_variant_with_its_figures_reasons_and_tools_is_on_the_page():
    page = render_page(sample())
    for name in FIGURES:
        assert f"gguf:{name}" in page
        assert f"SmolLM2-135M-Instruct-{name}.gguf" in page
    for said in (
        "Release passed",
        "5 of 7 variants passed; 2 optional failed a gate.",
        NOTICE,
        "mean KL divergence 0.2551 nats/token is above the gate&#39;s 0.15",
        "KL divergence 0.2551, gate ≤ 0.15",
        "The capital of France is Paris.",
        "cut at the limit",
        "llama-cpp-python</bdi> 0.3.36",
        "-DGGML_NATIVE=OFF",
        "AMD EPYC 7B13",
        "3,072 positions",
        "<title>gguf:Q4_K_M (passed): KL 0.0573, 149 tokens/s</title>",
        sample().recipe_digest,
        sample().variants[1].digest,
        sample().links.tracking_run,
    ):
        assert said in page


def test_the_best_figure_is_that_of_a_variant_that_passed():
    # Q4_0 is smaller and prefills faster than any other, but its gates refused it.
    best = re.findall(r'<td class="number best" data-value="([^"]+)">', render_page(sample()))
    assert "94000000.0" in best
    assert "92000000.0" not in best
    assert "573.0" in best
    assert "591.0" not in best


def test_a_failed_release_says_so_and_why():
    failed = sample().variants[5].model_copy(update={"required": True})
    page = render_page(with_variants(failed))
    assert "Release failed: a required variant fell short" in page
    assert "0 of 1 variants passed; 1 required failed a gate." in page


def test_a_variant_may_have_other_gates_than_the_rest():
    first, second, third = sample().judged[:3]
    looser = judge(second.measurements, {"kl_divergence": Bound(max=0.3)})
    page = render_page(with_variants(first, second.model_copy(update={"verdict": looser}), third))
    assert '✓ 0.0085<div class="small">≤ 0.3</div>' in page
    # Eight of the nine gates of the others are none of its own.
    assert page.count(">no gate</td>") == 8
    # Without a bound that all share there is no line to draw.
    assert "gate-label" not in page.partition("<svg")[2]


def test_a_release_that_made_nothing_still_has_a_page():
    verdict = Verdict(passed=False, checks=(), failure="quantize failed: the disk is full")
    unmade = VariantReport(variant="gguf:Q8_0", format="gguf", type="Q8_0", verdict=verdict)
    bare = with_variants(unmade).model_copy(update={"evaluation": None, "host": None, "hardware": None, "steps": ()})
    page = render_page(bare)
    assert "Release incomplete: a stage failed" in page
    assert "quantize failed: the disk is full" in page
    assert "not made" in page
    assert "<svg" not in page


def test_answers_that_differ_stand_apart_and_equal_ones_together():
    first, *rest = sample().judged
    other = Answer(prompt="What is the capital of France?", text="Lyon, of course.", tokens=5, stopped=True)
    page = render_page(with_variants(first.model_copy(update={"answers": (other,)}), *rest))
    assert page.count("The capital of France is Paris.") == 1
    assert page.count("Lyon, of course.") == 1
    # Equal answers name those who gave them.
    assert "<bdi>gguf:Q6_K, gguf:Q5_K_M, gguf:Q4_K_M, gguf:Q4_0, gguf:IQ4_NL, gguf:Q3_K_M</bdi>" in page
