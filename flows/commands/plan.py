"""``plan``: what a release would do."""

import typer

from flows import console
from flows.commands import MAKE, Json, Recipe, Variants, open_settings, open_store

EPILOG = """\
Examples:

  modelmint plan smollm2-135m

  modelmint plan my.yaml --variant gguf:Q8_0 --json

Weights are not downloaded: from a remote source come the small files and the headers of the weights.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG, rich_help_panel=MAKE)(plan)


def plan(recipe: Recipe, variants: Variants = None, as_json: Json = False) -> None:
    """Say what a release would run and reuse, how large its variants get, and what it takes in disk and time."""
    show_plan(recipe, variants, as_json)


def show_plan(recipe: str, variants: list[str] | None, as_json: bool) -> None:
    """Print the plan; leaves with 1 where the release would be refused."""
    settings = open_settings()

    from flows.order import RECIPES, narrowed
    from modelmint.planning import plan_release
    from modelmint.recipe_file import find_recipe
    from modelmint.step import Context
    from modelmint.table import show_plan as show

    wanted = narrowed(find_recipe(recipe, RECIPES), variants or [])
    found = plan_release(wanted, Context(open_store(settings), settings))
    if as_json:
        console.print_json(found.model_dump(mode="json"))
    else:
        show(console.out(), found)
    if any(variant.refusal for variant in found.variants):
        raise typer.Exit(1)
