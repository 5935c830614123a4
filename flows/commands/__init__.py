"""The commands, a module for each kind of question; every one imports what it needs only when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modelmint.settings import Settings
    from modelmint.store import Store

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]

MAKE, LOOK, KEEP, SETUP = "Make", "Look and measure", "Store", "Set-up"
"""Panels of the help."""


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes that begin so, for the shell."""
    from flows.order import RECIPES

    return sorted(path.stem for path in RECIPES.glob(f"{incomplete}*.yaml"))


def complete_variant(context: typer.Context, incomplete: str) -> list[str]:
    """Variants of the recipe on the command line that begin so, for the shell."""
    from flows.order import RECIPES
    from modelmint.errors import RecipeError
    from modelmint.recipe_file import find_recipe

    # Behind an option whose value is still missing, the parser leaves the arguments as they came.
    name = context.params.get("recipe") or next(iter(context.args), "")
    try:
        recipe = find_recipe(name, RECIPES)
    except RecipeError:
        return []
    return [variant.name for variant in recipe.variants if variant.name.startswith(incomplete)]


def complete_release(incomplete: str) -> list[str]:
    """Names of stored releases that begin so, for the shell."""
    from flows.stored import release_names

    return [name for name in release_names(open_store()) if name.startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(
        help="Name of a recipe in deployments/recipes, or the path of a YAML file.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        "-v",
        help="Only this variant, such as gguf:Q4_K_M; may be given several times.",
        show_default=False,
        autocompletion=complete_variant,
    ),
]
Release = Annotated[
    str,
    typer.Argument(
        help="Name of a release, or how it begins; the latest by default.",
        show_default=False,
        autocompletion=complete_release,
    ),
]
Folder = Annotated[Path, typer.Option(help="The folder to write to; made if it is missing.", show_default=False)]


def open_settings() -> "Settings":
    """The settings of this machine."""
    from flows.environment import load_settings

    return load_settings()


def open_store(settings: "Settings | None" = None) -> "Store":
    """The store of this machine."""
    from modelmint.store import Store

    return Store((settings or open_settings()).store)
