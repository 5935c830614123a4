"""``release``: the main job."""

from pathlib import Path
from typing import Annotated

import typer

from flows import console
from flows.commands import MAKE, Json, Recipe, Variants, open_settings

EPILOG = """\
Examples:

  modelmint release smollm2-135m

  modelmint release my.yaml --variant gguf:Q4_K_M --output models

  modelmint release my.yaml --dry-run

Steps that are done already, here or in an earlier release, are reused.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG, rich_help_panel=MAKE)(release)


def release(
    recipe: Recipe,
    variants: Variants = None,
    name: Annotated[
        str, typer.Option(help="What the release is called; made from recipe and time otherwise.", show_default=False)
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Export the variants that pass to this folder.", show_default=False),
    ] = None,
    export_all: Annotated[bool, typer.Option("--all", help="With --output: export those that fail as well.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, like plan.")] = False,
    as_json: Json = False,
) -> None:
    """Make, measure and judge the variants of a recipe, and record it all."""
    if dry_run:
        from flows.commands.plan import show_plan

        return show_plan(recipe, variants, as_json)

    settings = open_settings()

    from flows.launch import launch
    from flows.order import open_order
    from flows.stages import Stages
    from flows.stored import LOCK, PAGE, REPORT, release_folder
    from modelmint.release import exit_code, release_json
    from modelmint.store import Store
    from modelmint.table import show_release

    # What is wrong with the recipe is said at once, before a server is started for it.
    order = open_order(recipe, variants or [], name)
    report = launch(settings, recipe, variants or [], order.name, Stages(console.err()))
    store = Store(settings.store)
    folder = release_folder(store, report.release)
    files = []
    if output is not None:
        from flows.export import export

        files = export(store, report, output, failed_as_well=export_all)
    if as_json:
        answer = release_json(report, folder / LOCK, folder / REPORT)
        console.print_json(answer | ({"files": [str(file) for file in files]} if output is not None else {}))
    else:
        show_release(console.out(), report, report_path=folder / PAGE)
        for file in files:
            console.say(f"exported {file}")
        console.say("modelmint ui shows the runs in Prefect and MLflow", style="dim")
    raise typer.Exit(exit_code(report))
