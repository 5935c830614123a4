"""``inspect``, ``show`` and ``compare``: look at a checkpoint, and at releases."""

from typing import TYPE_CHECKING, Annotated

import typer

from flows import console
from flows.commands import LOOK, Json, Release, complete_release, open_settings, open_store

if TYPE_CHECKING:
    from rich.table import Table

    from modelmint.inspection import Inspection

INSPECT_EPILOG = """\
Examples:

  modelmint inspect hf:HuggingFaceTB/SmolLM2-135M-Instruct

  modelmint inspect file:./my-checkpoint --context 4096

A token for gated repositories is read from HF_TOKEN. Weights are not downloaded and not kept.
"""
COMPARE_EPILOG = """\
Example: modelmint compare smollm2-135m-20261124-101500 latest

The first release is what the others are held against. Differences within their uncertainty count as none.
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=INSPECT_EPILOG, rich_help_panel=LOOK)(inspect)
    app.command(epilog="Example: modelmint show smollm2-135m", rich_help_panel=LOOK)(show)
    app.command(epilog=COMPARE_EPILOG, rich_help_panel=LOOK)(compare)


def inspect(
    source: Annotated[
        str,
        typer.Argument(help="hf:organization/name[@revision], file:folder or s3://bucket/prefix.", show_default=False),
    ],
    context: Annotated[int, typer.Option(help="Tokens of context for the estimate of memory.", min=1)] = 2048,
    as_json: Json = False,
) -> None:
    """Look into a checkpoint before it is downloaded: is it safe, what is it, what does it take."""
    settings = open_settings()

    from modelmint.errors import InputError
    from modelmint.inspect import inspect_source
    from modelmint.recipe import ModelRef

    try:
        reference = ModelRef.parse(source)
    except ValueError as error:
        raise InputError(_first_reason(error)) from None
    found = inspect_source(reference, settings)
    if as_json:
        answer = found.model_dump(mode="json", exclude={"tensors"})
        memory = {"context": context, "memory_bytes": found.memory_bytes(context)}
        console.print_json(answer | {"size_class": found.size_class} | memory)
    else:
        console.print_wide(_findings(found, context))


def show(
    release: Release = "",
    as_json: Json = False,
) -> None:
    """Print the table of a release again."""
    store = open_store()

    from flows.stored import PAGE, read_report, release_folder
    from modelmint.table import show_release

    report = read_report(store, release)
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        show_release(console.out(), report, report_path=release_folder(store, report.release) / PAGE)


def compare(
    releases: Annotated[
        list[str],
        typer.Argument(
            help="Two or more releases: names, beginnings of names, or latest.",
            show_default=False,
            autocompletion=complete_release,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Hold releases against each other: what became better, what worse, what cannot be compared."""
    store = open_store()

    from flows.stored import read_report
    from modelmint.compare import compare_rows
    from modelmint.errors import InputError
    from modelmint.table import show_comparison

    reports = [read_report(store, name) for name in releases]
    if len({report.release for report in reports}) < 2:
        raise InputError("a comparison needs two releases: modelmint compare EARLIER LATER")
    rows = compare_rows(reports)
    if as_json:
        console.print_json({"rows": [row.model_dump(mode="json") for row in rows]})
    else:
        show_comparison(console.out(), rows)


def _first_reason(error: ValueError) -> str:
    """What a value refuses, without the frame that pydantic puts around it."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error)


def _findings(found: "Inspection", context: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from modelmint.columns import count_of_weights, plain

    def size(count: int) -> str:
        return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

    types = ", ".join(f"{kind} {count_of_weights(count)}" for kind, count in found.dtypes.items())
    facts = {
        "source": found.source,
        "architecture": f"{found.architecture} ({found.model_type})" if found.model_type else found.architecture,
        "parameters": f"{count_of_weights(found.parameters)} ({found.size_class})",
        "weights": f"{size(found.weight_bytes)}, {types}",
        "files": size(found.size),
        "licence": found.license or "not named",
        "context": f"{found.context_length} tokens" if found.context_length else "unknown",
        "tokenizer": f"{found.tokenizer or 'unknown'}, {found.vocabulary or 'unknown number of'} tokens",
        "chat template": "yes" if found.chat_template else "no",
        "memory": f"about {size(found.memory_bytes(context))} unquantized, with {context} tokens of context",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(plain(value)))
    if found.repository_code:
        table.add_row("refused", Text(plain(f"wants code of its own to be run: {found.repository_code}"), style="red"))
    for sentence in (found.quantized_source, *found.notes):
        if sentence:
            table.add_row("note", Text(plain(sentence), style="yellow"))
    return table
