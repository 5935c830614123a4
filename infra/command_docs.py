"""Writes docs/commands.md from the help of every command, or with --check says whether it is up to date."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
# Before typer is imported, which reads some of these once: the page does not depend on the terminal it is made on.
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
os.environ |= {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "100", "TERMINAL_WIDTH": "100", "LC_ALL": "C.UTF-8"}

HEAD = """\
# Commands

What `--help` says of every command. This page is made from the program by `make docs`, and a test compares the two.

{contents}
"""


def main() -> int:
    """Write or check the page; 1 if it is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; leave with 1 if the page is old")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/commands.md is not what the commands say; write it anew with: make docs", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page."""
    helps = dict(commands())
    contents = "\n".join(f"- [`{name}`](#{name.replace(' ', '-')})" for name in helps)
    parts = [HEAD.format(contents=contents)]
    parts += [f"## {name}\n\n```\n{text}\n```\n" for name, text in helps.items()]
    return "\n".join(parts)


def commands() -> Iterator[tuple[str, str]]:
    """Every command with its help, the program itself first, in the order in which the help lists them."""
    import typer

    from flows.cli import app

    def below(names: list[str], command: object) -> Iterator[tuple[str, str]]:
        yield " ".join(["modelmint", *names]), help_of(names)
        for name, sub in getattr(command, "commands", {}).items():
            if not sub.hidden:
                yield from below([*names, name], sub)

    yield from below([], typer.main.get_command(app))


def help_of(names: list[str]) -> str:
    """What a command says when it is asked for help, without white space at the ends of lines."""
    from typer.testing import CliRunner

    from flows.cli import app

    result = CliRunner().invoke(app, [*names, "--help"], prog_name="modelmint")
    if result.exit_code != 0:
        raise SystemExit(f"modelmint {' '.join(names)} --help left with {result.exit_code}: {result.output}")
    return re.sub(r"[ \t]+$", "", result.output, flags=re.MULTILINE).strip("\n")


if __name__ == "__main__":
    sys.exit(main())
