"""The command line: what a person types, what comes back, and with which exit code.

Nothing heavy is imported here or in `flows.commands`: ``modelmint --help`` answers at once, and each command imports
what it needs when it runs.
"""

import errno
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flows import console
from flows.commands import look, measure, plan, release, setup, store
from modelmint.errors import ModelMintError, ResourceError, StageError

EPILOG = """\
Exit codes: 0 all required variants pass, 1 bad input, 2 usage, 3 a gate failed, 4 a stage failed, 5 a proof failed.

Everything is kept in the working folder (MODELMINT_HOME for another): store/, mlruns/ and .modelmint/. \
With PREFECT_API_URL and MLFLOW_TRACKING_URI set, the servers named there are used.
"""

INTERRUPTED, READER_GONE, TERMINATED = 130, 141, 143
"""Exit codes after Ctrl-C, where whoever read our output, such as `head`, has had enough, and after SIGTERM."""


class Commands(TyperGroup):
    """The commands; what typer would answer with an exit code of its own is taken before it sees it."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with console.written():
                return super().invoke(ctx)
        except BrokenPipeError as error:
            raise StageError(f"a connection was closed by its other end: {error}") from error


app = typer.Typer(
    name="modelmint",
    cls=Commands,
    help="Turn a small language model into edge-ready variants that can be trusted: converted, quantized, measured, "
    "gated and recorded.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (release, plan, look, measure, store, setup):
    module.register(app)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of errors.", envvar="MODELMINT_DEBUG")
    ] = False,
) -> None:
    """Read what stands before the command."""
    console.show_tracebacks(debug)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--json" in arguments:
        console.reserve_stdout()
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Run a command; every error ends here. Returns the exit code."""
    from flows.signals import Terminated, raised_by_sigterm

    as_json = "--json" in arguments
    try:
        with raised_by_sigterm():
            return int(app(arguments, standalone_mode=False) or 0)
    except typer.TyperException as error:
        return _usage(error, as_json)
    except ModelMintError as error:
        return _failed(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Terminated:
        return TERMINATED
    except console.ReaderGone:
        return READER_GONE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _failed(ResourceError(f"a disk is full: {error}; free some space and run again"), as_json)
        return _bug(error, as_json)
    except Exception as error:  # noqa: BLE001
        return _bug(error, as_json)


def _usage(error: Any, as_json: bool) -> int:
    from typer import rich_utils

    rich_utils.rich_format_error(error)
    if as_json:
        console.print_json({"error": {"kind": "UsageError", "message": error.format_message()}})
    return int(error.exit_code)


def _failed(error: ModelMintError, as_json: bool) -> int:
    if console.tracebacks():
        traceback.print_exception(error)
    console.say_error(str(error))
    if as_json:
        console.print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
    return error.exit_code


def _bug(error: Exception, as_json: bool) -> int:
    traceback.print_exception(error)
    console.say_error(
        f"this is a bug in modelmint, please report it with the lines above: {type(error).__name__}: {error}"
    )
    if as_json:
        console.print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
    return ModelMintError.exit_code


if __name__ == "__main__":
    main()
