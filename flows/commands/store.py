"""``store`` and ``export``: what is kept, whether it is sound, what can go, and how to get it out."""

from typing import TYPE_CHECKING, Annotated

import typer

from flows import console
from flows.commands import KEEP, Folder, Json, Release, complete_release, open_store

if TYPE_CHECKING:
    from modelmint.upkeep import GcPlan
    from modelmint.verify import VerifyReport

GC_EPILOG = """\
Examples:

  modelmint store gc --dry-run

  modelmint store gc --keep-last 1

Kept is what a published release needs, what the last releases of each recipe need, and all that these were made of.
"""
PATH_EPILOG = """\
Examples:

  modelmint store path gguf:Q4_K_M

  modelmint store path sha256:1f0c... --release smollm2-135m

The files in the store are named by their contents and read-only; export writes them under their own names.
"""
EXPORT_EPILOG = """\
Examples:

  modelmint export latest --to models

  modelmint export smollm2-135m --to models --all
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    store = typer.Typer(
        help="See what is kept, check it, and free what no release needs.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    store.command("ls")(ls)
    store.command()(verify)
    store.command(epilog=GC_EPILOG)(gc)
    store.command(epilog=PATH_EPILOG)(path)
    app.add_typer(store, name="store", rich_help_panel=KEEP)
    app.command(epilog=EXPORT_EPILOG, rich_help_panel=KEEP)(export)


def ls(as_json: Json = False) -> None:
    """List every result in the store, oldest first, and the releases that need it."""
    store = open_store()

    from modelmint.upkeep import listing

    rows = listing(store)
    if as_json:
        return console.print_json({"store": str(store.root), "results": [row.model_dump(mode="json") for row in rows]})
    if not rows:
        return console.say(f"{store.root} holds nothing yet")

    from rich.table import Table
    from rich.text import Text

    from modelmint.columns import plain

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("digest", "stage", "finished"):
        table.add_column(name, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("releases", justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    for row in rows:
        style = "" if row.whole else "red"
        what = plain(row.parameters) + ("" if row.whole else "  files are missing: it will be made again")
        cells = (row.digest[:19], row.stage, row.finished[:19], _size(row.size), str(len(row.releases)))
        table.add_row(*cells, Text(what, style=style))
    console.print_wide(table)
    total = sum({row.digest: row.size for row in rows}.values())
    return console.say(f"{len(rows)} results, {_size(total)} in {store.root}", style="dim")


def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged files, so that their steps are done again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hash every stored file again and read every record; leaves with 5 if something is damaged."""
    store = open_store()

    from modelmint.verify import verify as check

    found = check(store, repair=repair)
    if as_json:
        console.print_json(found.model_dump(mode="json") | {"sound": found.sound})
    else:
        _print_verified(found)
    if not found.sound and not (found.repaired and not found.conflicts):
        raise typer.Exit(5)


def _print_verified(found: "VerifyReport") -> None:
    from modelmint.columns import plain
    from modelmint.table import duration

    console.say_result(
        f"{found.blobs} files ({_size(found.blob_bytes)}), {found.artifacts} manifests and {found.records} records "
        f"checked in {duration(found.seconds)}"
    )
    for damage in found.damaged:
        removed = "; removed" if found.repaired else "; --repair removes it, and its step is done again"
        console.say_result(plain(f"damaged: {damage.path}: {damage.what}{removed}"), "red")
    for conflict in found.conflicts:
        console.say_result(plain(f"two outputs of one step, to be compared: {conflict}"), "red")
    if found.incomplete:
        console.say_result(f"{len(found.incomplete)} steps lack files and will be done again", "yellow")
    if found.orphans:
        console.say_result(
            f"{found.orphans} files ({_size(found.orphan_bytes)}) belong to nothing; gc frees them", "dim"
        )
    if found.sound:
        console.say_result("sound", "green")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
    keep_last: Annotated[int, typer.Option(help="How many releases of each recipe are kept.", min=0)] = 3,
    as_json: Json = False,
) -> None:
    """Free what no release needs."""
    store = open_store()

    from modelmint.upkeep import collect, plan_gc

    plan = plan_gc(store, keep_last)
    if not as_json:
        _print_plan(plan)
    freed = 0
    if not dry_run:
        freed = collect(store, plan).size
        if not as_json:
            console.say_result(f"freed {_size(freed)}", "green")
    elif not as_json:
        console.say_result(f"would free {_size(plan.size)}; nothing was changed")
    if as_json:
        console.print_json(plan.model_dump(mode="json") | {"size": plan.size, "freed": freed, "dry_run": dry_run})


def _print_plan(plan: "GcPlan") -> None:
    from modelmint.columns import plain

    kept = ", ".join(plan.kept) if plan.kept else "no release"
    console.say_result(plain(f"kept: {kept}"), "dim")
    for item in plan.items:
        console.say_result(plain(f"{item.kind:<9} {_size(item.size):>9}  {item.path}  {item.label}"))


def path(
    what: Annotated[
        str, typer.Argument(help="A digest, the beginning of one, or a variant's name.", show_default=False)
    ],
    release: Annotated[
        str,
        typer.Option(
            help="The release whose variant is meant; the latest by default.",
            show_default=False,
            autocompletion=complete_release,
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Say where the files of an artifact lie in the store."""
    store = open_store()

    from flows.stored import find_digest

    digest = find_digest(store, what, release)
    artifact = store.artifact(digest)
    files = [{"file": entry.path, "size": entry.size, "path": str(store.blob(entry))} for entry in artifact.files]
    if as_json:
        console.print_json({"digest": digest, "files": files})
    else:
        for file in files:
            console.say_result(f"{file['path']}")
            console.say(f"  {file['file']} of {digest}", style="dim")


def export(
    to: Folder,
    release: Release = "",
    failed_as_well: Annotated[bool, typer.Option("--all", help="Export variants that fail as well.")] = False,
    as_json: Json = False,
) -> None:
    """Write the variants of a release that pass to a folder, under the names that people expect."""
    store = open_store()

    from flows.export import export as write
    from flows.stored import read_report

    report = read_report(store, release)
    files = write(store, report, to, failed_as_well=failed_as_well)
    if as_json:
        console.print_json({"release": report.release, "files": [str(file) for file in files]})
    else:
        for file in files:
            console.say_result(str(file))
        if not files:
            console.say(f"no variant of {report.release} passed; --all exports those that fail as well", "yellow")


def _size(count: int) -> str:
    """A number of bytes as people say it."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:.{0 if count >= 100 * factor else 1}f} {unit}"
    return f"{count} B"
