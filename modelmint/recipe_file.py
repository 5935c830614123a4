"""Reads and writes recipes as YAML, and answers a mistake with its line and what was meant."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from modelmint.errors import RecipeError
from modelmint.recipe import Benchmark, DatasetRef, Evaluation, Recipe, Variant
from modelmint.report import Bound
from modelmint.spelling import did_you_mean

MAXIMUM_BYTES = 1 << 20
"""A recipe is a page of text; something larger is another file."""


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key that is written twice is a mistake rather than a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: {key!r} is written twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        RecipeError: names the file, the line, the key or value, and what would be right.
    """
    try:
        if path.stat().st_size > MAXIMUM_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes are too many for a recipe; is it another file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(_missing(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from error
    return parse_recipe(text, str(path))


def find_recipe(name: str, folder: Path) -> Recipe:
    """The recipe of a name, or in a file.

    Args:
        name: the path of a YAML file, or the name of a recipe in `folder`.
        folder: where recipes are looked up by name, as ``<name>.yaml``.

    Raises:
        RecipeError: if there is none; says which names there are.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return read_recipe(Path(name))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in folder.glob("*.yaml")]
        raise RecipeError(f"no recipe is called {name!r}{did_you_mean(name, known)}; or give the path of a YAML file")
    return read_recipe(path)


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """The recipe in a YAML text; `name` begins every error message.

    Raises:
        RecipeError: as `read_recipe`.
    """
    try:
        data = yaml.load(text, _Loader)
        lines = _lines(yaml.compose(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: a recipe is a mapping that begins with schema: 1, not {type(data).__name__}")
    if data.get("schema") != 1:
        raise RecipeError(f"{name}: schema is {data.get('schema')!r}; this version of modelmint reads schema: 1")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, name, lines)) from None


def write_recipe(recipe: Recipe) -> str:
    """The YAML text of a recipe, defaults left out; reading it gives an equal recipe."""
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    data = {"schema": 1, **data, "source": str(recipe.source)}
    data["variants"] = [_variant_to_yaml(variant) for variant in recipe.variants]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe as it is written in YAML, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    name = {"type": "string", "pattern": "^[a-z][a-z0-9]*:[A-Za-z0-9][A-Za-z0-9_.-]*(@[a-z0-9][a-z0-9-]*)?$"}
    written = dict(definitions["Variant"]["properties"])
    for part in ("format", "type", "label"):
        del written[part]
    definitions["Variant"] = {
        "anyOf": [
            {**name, "description": "format:type[@label], such as gguf:Q4_K_M"},
            {
                "type": "object",
                "properties": {"variant": name, **written},
                "required": ["variant"],
                "additionalProperties": False,
            },
        ]
    }
    schema["properties"]["source"] = {"type": "string", "description": definitions.pop("ModelRef")["description"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ModelMint recipe"
    return json.loads(json.dumps(schema))  # type: ignore[no-any-return]


def _variant_to_yaml(variant: Variant) -> object:
    rest = variant.model_dump(mode="json", exclude_defaults=True, exclude={"format", "type", "label"})
    return {"variant": variant.name, **rest} if rest else variant.name


def _missing(path: Path) -> str:
    """The message for a recipe file that is not there."""
    neighbours = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, neighbours) if neighbours else "; give the path of a YAML file"
    return f"{path}: no such recipe{hint}"


def _lines(node: yaml.Node | None) -> dict[tuple[str | int, ...], int]:
    """The line, counted from 1, of every key and item of a document by its path."""
    found: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                found[(*path, index)] = value.start_mark.line + 1
                walk(value, (*path, index))

    walk(node, ())
    return found


FIELDS_AT: dict[str, type[BaseModel]] = {
    "": Recipe,
    "variants": Variant,
    "evaluation": Evaluation,
    "data": DatasetRef,
    "calibration": DatasetRef,
    "benchmark": Benchmark,
    "gates": Bound,
}
"""Which model's fields are meant where a key of that parent is unknown."""


def _explain(error: ValidationError, name: str, lines: dict[tuple[str | int, ...], int]) -> str:
    """One line for each mistake: file, line, path, what is wrong, what was meant."""
    sentences = []
    for mistake in error.errors(include_url=False):
        path = tuple(mistake["loc"])
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)
        where = ".".join(str(part) for part in path)
        if mistake["type"] == "extra_forbidden":
            parents = [str(part) for part in path[:-1] if isinstance(part, str) and part in FIELDS_AT]
            model = FIELDS_AT[parents[-1] if parents else ""]
            known = [field.alias or key for key, field in model.model_fields.items()]
            known += ["variant"] if model is Variant else []
            sentence = f"unknown key {path[-1]!r}{did_you_mean(str(path[-1]), known)}"
        elif mistake["type"] == "missing":
            sentence = f"{where} is missing"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            given = mistake["input"]
            value = (
                f" (given: {given!r})"
                if isinstance(given, str | int | float | bool) and repr(given) not in message
                else ""
            )
            sentence = f"{where}: {message}{value}" if where else f"{message}{value}"
        sentences.append(f"{name}: line {line}: {sentence}")
    return "\n".join(sentences)
