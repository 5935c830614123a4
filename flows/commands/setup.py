"""``doctor``, ``version``, ``schema`` and ``ui``: the set-up, and what is around the work."""

import json
from contextlib import suppress
from typing import Annotated

import typer

from flows import console
from flows.commands import SETUP, Json, open_settings

SCHEMA_EPILOG = """\
Example: modelmint schema > deployments/recipe.schema.json

Editors complete and check a recipe that begins with: # yaml-language-server: $schema=../recipe.schema.json
"""
MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "bold red")}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=SETUP)(ui)
    app.command(rich_help_panel=SETUP)(doctor)
    app.command(epilog=SCHEMA_EPILOG, rich_help_panel=SETUP)(schema)
    app.command(rich_help_panel=SETUP)(version)


def doctor(as_json: Json = False) -> None:
    """Check the set-up and name what is missing; leaves with 4 if something is."""
    settings = open_settings()

    from rich.text import Text

    from flows.doctor import examine
    from flows.environment import prepare
    from modelmint.columns import plain

    prepare(settings)
    findings = []
    for finding in examine(settings):
        findings.append(finding)
        if as_json:
            continue
        mark, style = MARKS[finding.level]
        line = Text.assemble((f"{mark} ", style), (finding.check, "bold"), "  ", plain(finding.text))
        console.out().print(line, soft_wrap=True)
        if finding.way_out:
            console.out().print(Text(f"  → {plain(finding.way_out)}", style=style), soft_wrap=True)
    problems = sum(finding.level == "problem" for finding in findings)
    if as_json:
        console.print_json({"sound": problems == 0, "checks": [vars(finding) for finding in findings]})
    elif problems:
        console.say(f"{problems} to repair", "bold red")
    if problems:
        raise typer.Exit(4)


def version(as_json: Json = False) -> None:
    """Say which version this is; with --json also the identities of the tools."""
    from modelmint import __version__

    if not as_json:
        console.say_result(f"modelmint {__version__}")
        return
    import platform

    from modelmint import formats
    from modelmint.errors import UnsupportedError

    tools: dict[str, object] = {}
    for name in formats.FORMATS:
        try:
            tools[name] = [tool.model_dump(mode="json") for tool in formats.load(name).tools("convert")]
        except UnsupportedError as error:
            tools[name] = {"error": str(error)}
    console.print_json({"modelmint": __version__, "python": platform.python_version(), "tools": tools})


def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from modelmint.recipe_file import recipe_schema

    found = recipe_schema()
    if as_json:
        console.print_json(found)
    else:
        print(json.dumps(found, indent=2, ensure_ascii=False))


def ui(
    mlflow_port: Annotated[
        int, typer.Option(help="Port of MLflow's pages; 5000 or a free one by default.", min=0, max=65535)
    ] = 0,
    as_json: Json = False,
) -> None:
    """Serve Prefect's and MLflow's pages on loopback until Ctrl-C."""
    settings = open_settings()

    from flows.environment import prepare
    from flows.servers import pages

    prepare(settings)
    console.say("starting the servers …", "dim")
    with pages(settings, mlflow_port) as found:
        if as_json:
            console.print_json({"prefect": found.prefect, "mlflow": found.mlflow})
        else:
            console.say_result(f"Prefect  {found.prefect}")
            console.say_result(f"MLflow   {found.mlflow}")
            console.say("Ctrl-C ends them", "dim")
        # The way to end it is no error.
        with suppress(KeyboardInterrupt):
            found.wait()
