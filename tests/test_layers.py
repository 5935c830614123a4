"""The borders between the packages: imports point inward, and the environment is read in one place."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[1]
PACKAGES = ("modelmint", "tasks", "flows")

VALUES = ("errors", "spelling", "report", "artifact", "recipe")
"""What everything else is said with; these modules import pydantic, the standard library and each other."""

MAY_IMPORT_MLFLOW = {"tasks/track.py", "tasks/artifact_repository.py"}
MAY_READ_ENVIRONMENT = {
    "modelmint/settings.py": "the one place",
    "modelmint/isolated_child.py": "the child's own, which its parent has made",
}
MAY_SET_ENVIRONMENT = {"flows/environment.py": "what Prefect and MLflow find when they are imported"}


def sources() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def imported(path: str, tree: ast.Module) -> Iterator[str]:
    """The full name of everything imported anywhere in a module, also inside of functions."""
    folder = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _named(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value
            elif isinstance(first, ast.JoinedStr) and isinstance(first.values[0], ast.Constant):
                yield str(first.values[0].value)


def violations(path: str, source: str) -> list[str]:
    """What a module does that its place does not allow."""
    tree = ast.parse(source)
    found = []
    package = path.split("/")[0]
    for name in imported(path, tree):
        top = name.split(".")[0]
        if top in ("prefect", "mlflow") and package == "modelmint":
            found.append(f"{path} imports {name}; modelmint knows neither Prefect nor MLflow")
        if top == "mlflow" and package != "modelmint" and path not in MAY_IMPORT_MLFLOW:
            found.append(f"{path} imports {name}; MLflow is reached through tasks/track.py")
        if top in PACKAGES and PACKAGES.index(top) > PACKAGES.index(package):
            found.append(f"{path} imports {name}; imports point inward: flows -> tasks -> modelmint")
        if path in {f"modelmint/{value}.py" for value in VALUES} and not _fit_for_values(name):
            found.append(f"{path} imports {name}; values import pydantic, the standard library and each other")
    mentions = {id(node) for node in ast.walk(tree) if _is_environment(node)}
    if path in MAY_SET_ENVIRONMENT:
        mentions -= {id(node) for statement in ast.walk(tree) for node in _set_by(statement)}
    if mentions and path not in MAY_READ_ENVIRONMENT:
        found.append(f"{path} reads the environment; modelmint/settings.py does that")
    return found


def _fit_for_values(name: str) -> bool:
    parts = name.split(".")
    return parts[1] in VALUES if parts[0] == "modelmint" else parts[0] in {"pydantic", *sys.stdlib_module_names}


def _is_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return _named(node) in ("os.environ", "os.environb", "os.getenv")
    names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) and node.module == "os" else set()
    return bool({"environ", "environb", "getenv"} & names)


def _set_by(node: ast.AST) -> list[ast.AST]:
    """The mention of the environment in a statement that only sets a variable: `os.environ[x] = y`, or `setdefault`."""
    if isinstance(node, ast.Assign):
        return [target.value for target in node.targets if isinstance(target, ast.Subscript)]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        return [node.value.func.value] if node.value.func.attr == "setdefault" else []
    return []


def _named(node: ast.AST) -> str:
    """The dotted name that an expression spells; empty where it is none."""
    if isinstance(node, ast.Attribute):
        return f"{_named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_imports_point_inward_and_the_environment_is_read_in_one_place() -> None:
    assert [line for path, source in sources() for line in violations(path, source)] == []


def test_every_module_was_looked_at() -> None:
    seen = {path for path, _ in sources()}
    assert seen >= {f"modelmint/{value}.py" for value in VALUES} | set(MAY_READ_ENVIRONMENT)
    assert {path.split("/")[0] for path in seen} == set(PACKAGES)


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("modelmint/store.py", "import prefect", "neither Prefect nor MLflow"),
        ("modelmint/store.py", "def f():\n    from mlflow.tracking import MlflowClient", "neither Prefect nor MLflow"),
        ("modelmint/store.py", "import importlib\nimportlib.import_module('mlflow')", "neither Prefect nor MLflow"),
        ("modelmint/formats/fake.py", "if True:\n    import prefect.flows as f", "neither Prefect nor MLflow"),
        ("modelmint/store.py", "from tasks import track", "imports point inward"),
        ("modelmint/formats/fake.py", "from ...tasks import track", "imports point inward"),
        ("modelmint/store.py", "class A:\n    def f(self):\n        import flows.release", "imports point inward"),
        ("tasks/convert.py", "from flows.release import release", "imports point inward"),
        ("tasks/convert.py", "import mlflow", "reached through tasks/track.py"),
        ("flows/release.py", "from mlflow import log_metric", "reached through tasks/track.py"),
        ("modelmint/report.py", "import numpy", "values import pydantic"),
        ("modelmint/report.py", "from pydantic_settings import BaseSettings", "values import pydantic"),
        ("modelmint/errors.py", "from modelmint import store", "values import pydantic"),
        ("modelmint/artifact.py", "from .store import Store", "values import pydantic"),
        ("modelmint/recipe.py", "def f():\n    from modelmint.settings import Settings", "values import pydantic"),
        ("modelmint/store.py", "import os\nos.environ['A']", "reads the environment"),
        ("tasks/track.py", "import os\ndef f():\n    return os.getenv('A')", "reads the environment"),
        ("flows/release.py", "from os import environ as e", "reads the environment"),
        ("flows/release.py", "import os\nos.environ['A'] = 'b'", "reads the environment"),
        ("flows/environment.py", "import os\nos.environ['A'] = os.environ['B']", "reads the environment"),
    ],
)
def test_a_violation_is_found(path: str, source: str, reason: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tasks/track.py", "import mlflow\nfrom modelmint.report import Measurement"),
        ("flows/release.py", "from prefect import flow\nfrom tasks import track\nfrom modelmint.store import Store"),
        ("tasks/convert.py", "from prefect import task"),
        ("modelmint/settings.py", "import os\nos.environ['A']"),
        ("flows/environment.py", "import os\nos.environ['A'] = 'b'\nos.environ.setdefault('C', 'd')"),
        (
            "modelmint/recipe.py",
            "from modelmint.artifact import Digest\nfrom .spelling import did_you_mean\nimport pydantic",
        ),
        ("modelmint/store.py", "import os\nfrom pathlib import Path\nenviron = {'getenv': 1}"),
    ],
)
def test_what_is_allowed_is_left_alone(path: str, source: str) -> None:
    assert violations(path, source) == []
