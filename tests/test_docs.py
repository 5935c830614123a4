"""The pages under docs/ say what is true: their code runs, their recipes are read, and no key or measure is left out."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

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
    assert re.search(r"^1[0-9] passed", said, re.MULTILINE), said


def test_its_code_is_formatted_and_clean(followed: Path) -> None:
    paths = [path for path in files_of("adding-a-format.md") if path != TABLE]
    run(followed, "ruff", "format", "--no-cache", "--check", "--diff", *paths)
    run(followed, "ruff", "check", "--no-cache", *paths)
