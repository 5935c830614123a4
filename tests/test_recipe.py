"""The laws of recipes, and how a mistake in one is answered."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modelmint.errors import RecipeError
from modelmint.recipe import ModelRef, Recipe, Variant
from modelmint.recipe_file import find_recipe, parse_recipe, read_recipe, recipe_schema, write_recipe
from modelmint.report import DEFAULT_GATES, Bound

pytestmark = pytest.mark.pure

SMALL = "schema: 1\nname: small\nsource: fake:tiny\nvariants: [gguf:Q8_0]\n"
NAME = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)


@given(NAME, NAME, NAME | st.just(""))
def test_the_text_form_of_a_hub_reference_round_trips(organization: str, name: str, revision: str) -> None:
    text = f"hf:{organization}/{name}" + (f"@{revision}" if revision else "")
    assert str(ModelRef.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["file:models/tiny", "file:/a/b c", "s3://bucket/some/prefix", "s3://bucket", "fake:x"]
)
def test_the_text_form_of_other_references_round_trips(text: str) -> None:
    assert str(ModelRef.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("models/tiny", "hf:organization/name"),
        ("ftp:models/tiny", "not a model reference: 'ftp:models/tiny'"),
        ("hf:tiny", "write organization/name"),
        ("hf:a/b/c", "write organization/name"),
        ("s3:bucket", "write s3://bucket/prefix"),
        ("s3://B/x", "not a bucket and prefix"),
        ("file:", "at least 1 character"),
    ],
)
def test_a_malformed_reference_is_answered_with_the_form(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ModelRef.parse(text)


@given(
    st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True),
    st.just("") | st.from_regex(r"[a-z0-9][a-z0-9-]{0,5}", fullmatch=True),
)
def test_the_name_of_a_variant_round_trips(format_name: str, type_name: str, label: str) -> None:
    variant = Variant(format=format_name, type=type_name, label=label)
    assert Variant.parse(variant.name) == variant


@pytest.mark.parametrize("name", ["Q8_0", "gguf:", "gguf:Q8_0@", "GGUF:Q8_0", "gguf:Q8_0@A", "gguf:Q8 0", "gguf:a:b"])
def test_a_malformed_variant_is_answered_with_the_form(name: str) -> None:
    with pytest.raises(ValueError, match="format:type@label"):
        Variant.parse(name)


def test_a_variants_name_is_unique_in_its_recipe() -> None:
    with pytest.raises(RecipeError, match=r"named twice: gguf:Q8_0; give one of them a label"):
        parse_recipe(SMALL.replace("[gguf:Q8_0]", "[gguf:Q8_0, {variant: gguf:Q8_0, options: {pure: true}}]"))


def test_two_equal_recipes_have_one_digest() -> None:
    spelled_out = SMALL + "quantized_source: refuse\nbenchmark: {trials: 3}\n"
    assert parse_recipe(SMALL).digest == parse_recipe(spelled_out).digest
    assert parse_recipe(SMALL).digest != parse_recipe(SMALL + "licenses: [mit]\n").digest


def test_a_recipe_reads_back_as_it_was_written() -> None:
    recipe = parse_recipe(
        "schema: 1\nname: all\nsource: hf:Qwen/Qwen3-0.6B@main\nlicenses: [apache-2.0]\n"
        "variants: [gguf:Q8_0, {variant: gguf:Q4_0@pure, required: false, options: {pure: true},"
        " gates: {kl_divergence: {max: 0.3}, conversion_kl: null}}]\n"
        "gates: {decode_speedup: {min: 1.1}}\nbenchmark: null\n"
    )
    assert parse_recipe(write_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "line", "match"),
    [
        ("sorce: x", 5, r"unknown key 'sorce'; did you mean 'source'\?"),
        ("evaluation: {windwos: 3}", 5, r"unknown key 'windwos'; did you mean 'windows'\?"),
        ("gates: {kl_div: {max: 1}}", 5, r"unknown measure 'kl_div'; did you mean 'kl_divergence'\?"),
        ("gates: {kl_divergence: {}}", 5, r"a gate needs min, max or both"),
        ("gates: {kl_divergence: {min: 2, max: 1}}", 5, r"min 2.0 is above max 1.0"),
        ("gates: {kl_divergence: {max: .nan}}", 5, r"must be finite"),
        ("benchmark:\n  trials: 0", 6, r"benchmark.trials: .*greater than or equal to 1 \(given: 0\)"),
        ("name: again", 5, r"'name' is written twice"),
        ("evaluation: {data: {source: 'fake:x'}}", 5, r"not a text: 'fake:x'; write pydoc"),
    ],
)
def test_a_mistake_is_answered_with_its_line_and_what_was_meant(change: str, line: int, match: str) -> None:
    with pytest.raises(RecipeError, match=f"r.yaml: line {line}: .*{match}"):
        parse_recipe(SMALL + change + "\n", "r.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "a recipe is a mapping that begins with schema: 1, not list"),
        ("", "not NoneType"),
        ("schema: 2\nname: x", "schema is 2; this version of modelmint reads schema: 1"),
        ("schema: 1\n\tname: x", "not valid YAML"),
        ("schema: 1\nname: x\nsource: fake:a\n", "variants is missing"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        parse_recipe(text)


def test_a_file_that_is_missing_large_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean 'small.yaml'"):
        read_recipe(tmp_path / "smal.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        read_recipe(tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match="is it another file"):
        read_recipe(tmp_path / "large.yaml")


def test_a_recipe_is_found_by_name_or_path(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    assert find_recipe("small", tmp_path) == find_recipe(str(tmp_path / "small.yaml"), tmp_path)
    with pytest.raises(RecipeError, match="no recipe is called 'smal'; did you mean 'small'"):
        find_recipe("smal", tmp_path)


def test_a_variants_gates_stand_over_the_recipes_and_those_over_the_defaults() -> None:
    recipe = parse_recipe(
        SMALL.replace("[gguf:Q8_0]", "[{variant: gguf:Q8_0, gates: {loads: null, size: {max: 9}}}]")
        + "gates: {kl_divergence: {max: 0.5}, size: {max: 7}}\n"
    )
    gates = recipe.gates_of(recipe.variants[0])
    assert gates["kl_divergence"] == Bound(max=0.5)
    assert gates["size"] == Bound(max=9)
    assert "loads" not in gates
    assert gates["top_1_agreement"] == DEFAULT_GATES["top_1_agreement"]


def test_without_the_source_as_reference_no_conversion_gate_is_assumed() -> None:
    recipe = parse_recipe(SMALL + "evaluation: {reference: base}\n")
    assert "conversion_kl" not in recipe.gates_of(recipe.variants[0])
    asked = parse_recipe(SMALL + "evaluation: {reference: base}\ngates: {conversion_kl: {max: 1}}\n")
    assert asked.gates_of(asked.variants[0])["conversion_kl"] == Bound(max=1)


def test_the_schema_for_editors_takes_what_is_written_in_yaml() -> None:
    schema = recipe_schema()
    assert schema["properties"]["source"]["type"] == "string"
    names = schema["$defs"]["Variant"]["anyOf"]
    assert names[0]["type"] == "string"
    assert set(names[1]["properties"]) == {"variant", "options", "required", "gates"}
    json.dumps(schema)


def test_a_recipe_is_frozen_and_refuses_unknown_keys() -> None:
    recipe = parse_recipe(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        Recipe.model_validate({"schema": 1, "name": "x", "source": "fake:x", "variants": ["gguf:Q8_0"], "extra": 1})


def test_the_schema_beside_the_recipes_is_the_current_one() -> None:
    path = Path(__file__).parent.parent / "deployments" / "recipe.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == recipe_schema(), "run modelmint schema > " + path.name
