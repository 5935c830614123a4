"""The pages under docs/ say what is true: code runs, recipes are read, no key, measure or command is left out."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from modelmint import formats, parity
from modelmint.convert import base_options
from modelmint.formats.gguf import format as gguf
from modelmint.recipe import Benchmark, DatasetRef, Evaluation, Recipe, Variant
from modelmint.recipe_file import parse_recipe
from modelmint.reference import first_scored
from modelmint.report import DEFAULT_GATES, MEASURES, Bound

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = "modelmint/formats/__init__.py"
REACHES_CHILDREN = """\
import os

from modelmint import settings

# Child processes get a clean environment; here the package lies where only PYTHONPATH leads to.
inherited = settings.child_environment
settings.child_environment = lambda: inherited() | {"PYTHONPATH": os.environ["PYTHONPATH"]}
"""


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return [text for found, text in BLOCK.findall(page(name)) if found == language]


def files_of(name: str) -> dict[str, str]:
    """What a page has its reader write, by the path that begins each block; blocks of one file are put together."""
    parts: dict[str, list[str]] = defaultdict(list)
    for text in blocks(name, "python"):
        first, _, rest = text.partition("\n")
        assert first.startswith("# "), f"a block of {name} does not say which file it belongs to: {first}"
        parts[first.removeprefix("# ")].append(rest)
    return {path: "\n\n".join(texts) for path, texts in parts.items()}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with everything done that the page says."""
    folder = tmp_path_factory.mktemp("followed")
    shutil.copytree(ROOT / "modelmint", folder / "modelmint", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    files = files_of("adding-a-format.md")
    line = files.pop(TABLE)
    table = (folder / TABLE).read_text()
    (folder / TABLE).write_text(table.replace("FORMATS = {\n", f"FORMATS = {{\n{line}", 1))
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    shutil.copyfile(ROOT / "tests" / "conftest.py", folder / "tests" / "conftest.py")
    (folder / "conftest.py").write_text(REACHES_CHILDREN)
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_who_follows_the_page_has_a_format_that_passes_its_tests(followed: Path) -> None:
    assert set(files_of("adding-a-format.md")) == {
        "modelmint/formats/digits.py",
        "modelmint/formats/digits_tool.py",
        "tests/formats/test_digits.py",
        TABLE,
    }
    said = run(followed, "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/formats")
    assert re.search(r"^(9|1[0-9]) passed", said, re.MULTILINE), said


def test_its_code_is_formatted_and_clean(followed: Path) -> None:
    paths = [path for path in files_of("adding-a-format.md") if path != TABLE]
    run(followed, "ruff", "format", "--no-cache", "--check", "--diff", *paths)
    run(followed, "ruff", "check", "--no-cache", *paths)


PART = "schema: 1\nname: part\nsource: fake:tiny\nvariants: [gguf:Q8_0]\n"
KEYS = {
    "The recipe": Recipe,
    "variants": Variant,
    "evaluation": Evaluation,
    "data": DatasetRef,
    "gates": Bound,
    "benchmark": Benchmark,
}
"""The models of a recipe by the heading under which their keys are explained."""
NOT_IN_A_CELL = {("The recipe", "evaluation"), ("The recipe", "benchmark"), ("evaluation", "prompts")}
"""Defaults that are told in words."""


def as_recipe(text: str) -> str:
    """A block of the page as a whole recipe: what begins with `schema` is one, other blocks are parts of one."""
    if text.startswith("schema:"):
        return text
    given = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
    rest = [line for line in PART.splitlines() if line.partition(":")[0] not in given]
    return "\n".join(rest) + "\n" + text


def section(name: str, heading: str) -> str:
    """What stands under a heading, up to the next one."""
    match = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", page(name), re.MULTILINE | re.DOTALL)
    assert match, f"{name} has no heading {heading!r}"
    return match[1]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables in a text, without their heads."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[0].startswith("`")]


@pytest.mark.parametrize("text", blocks("recipes.md", "yaml") + blocks("adding-a-format.md", "yaml"))
def test_every_recipe_of_the_pages_is_read(text: str) -> None:
    text = text.removeprefix("# deployments/recipes/digits.yaml\n")
    recipe = parse_recipe(as_recipe(text))
    for variant in recipe.variants:
        if variant.format != "digits":
            formats.load(variant.format).check(variant)
    for name, options in recipe.base.items():
        base_options(name, options)


@pytest.mark.parametrize("heading", KEYS)
def test_every_key_is_explained_with_its_default(heading: str) -> None:
    model = KEYS[heading]
    told = {row[0].strip("`"): row[1] for row in rows(section("recipes.md", heading))}
    for name, field in model.model_fields.items():
        key = field.alias or name
        assert key in told, f"recipes.md does not explain {heading}: {key}"
        if (heading, key) in NOT_IN_A_CELL:
            continue
        if field.is_required():
            assert told[key] == "*required*", key
        else:
            default = field.get_default(call_default_factory=True)
            plain = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            assert yaml.safe_load(told[key].strip("`")) == (list(plain) if isinstance(plain, tuple) else plain), key


def test_no_key_is_explained_that_does_not_exist() -> None:
    options = {*gguf.VariantOptions.model_fields, *gguf.BaseOptions.model_fields}
    known = {field.alias or name for model in KEYS.values() for name, field in model.model_fields.items()}
    told = {row[0].strip("`") for row in rows(page("recipes.md")) if len(row) == 3}
    assert told == known | options | {"variant"}


def test_the_options_of_gguf_are_explained_with_their_defaults() -> None:
    for heading, model in (("base", gguf.BaseOptions), ("variants", gguf.VariantOptions)):
        told = {row[0].strip("`"): row[1].strip("`") for row in rows(section("recipes.md", heading))}
        for name, field in model.model_fields.items():
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert yaml.safe_load(told[name]) == default, name


def test_every_measure_is_explained_with_unit_direction_and_gate() -> None:
    def gate(name: str) -> str:
        if name not in DEFAULT_GATES:
            return "–"
        bound = DEFAULT_GATES[name]
        return f"at most {bound.max:g}" if bound.max is not None else f"at least {bound.min:g}"

    told = [[row[0].strip("`"), *row[1:]] for row in rows(section("measures.md", "All of them"))]
    assert told == [[name, measure.unit, measure.better, gate(name)] for name, measure in MEASURES.items()]
    explained = page("measures.md").partition("## Quality")[2]
    assert [name for name in MEASURES if not re.search(rf"\b{name}\b", explained)] == []


def test_the_formula_of_the_page_is_the_one_that_is_used() -> None:
    [code] = blocks("measures.md", "python")
    exec(compile(code, "measures.md", "exec"), {})


def test_the_settings_that_the_page_names_are_the_defaults() -> None:
    wanted, timed, text = Evaluation(), Benchmark(), page("measures.md")
    for name in ("window", "windows", "top", "sample"):
        assert f"(`{name}`, {getattr(wanted, name)})" in text or f"`{name}` ({getattr(wanted, name)})" in text, name
    for name in ("prompt_tokens", "generate_tokens"):
        assert f"`{name}` ({getattr(timed, name)})" in text, name
    scored = wanted.window - 1 - first_scored(wanted.window)
    assert f"{scored} positions of {wanted.window} tokens,\n{scored * wanted.windows} in all by default" in text
    assert f"The texts are {len(parity.TEXTS)} on which" in text
    assert f"up to {len(parity.CHATS)} rendered chats" in text


def test_the_help_of_every_command_is_on_its_page() -> None:
    # In a process of its own, because typer looks at the terminal once; with other terminals the page is the same.
    environment = {**os.environ, "FORCE_COLOR": "1", "CI": "1", "COLUMNS": "60", "TERM": "xterm-256color"}
    script = ROOT / "infra" / "command_docs.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_section() -> None:
    listed = set(re.findall(r"^- \[`(modelmint[^`]*)`\]", page("commands.md"), re.MULTILINE))
    assert listed == set(re.findall(r"^## (modelmint.*)$", page("commands.md"), re.MULTILINE))
    wanted = "plan release inspect evaluate benchmark show compare export schema doctor version ui store"
    assert {f"modelmint {name}" for name in wanted.split()} <= listed


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = sorted(DOCS.glob("*.md"))
    assert {path.name for path in pages} >= {"adding-a-format.md", "commands.md", "measures.md", "recipes.md"}
    for path in pages:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
            other = path.parent / target if target else path
            assert other.exists(), f"{path.name} links to {target}"
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{path.name} links to {target}#{anchor}"
