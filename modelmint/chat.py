"""Renders chat templates, which are foreign programs, as transformers does: sandboxed, and bounded in time and memory.

Jinja's sandbox stops a template from reaching Python's internals; it does not stop ``{{ 'A' * 10**10 }}`` or nested
loops. So all chats of one template are rendered in a child process of their own that has 2 s of processor time and
256 MB.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from modelmint.errors import StageError
from modelmint.isolate import Limits, call
from modelmint.report import Value

LIMITS = Limits(
    # A template cannot sleep, so processor time is the bound that a busy machine does not move.
    cpu_seconds=2,
    wall_seconds=60.0,
    address_space_bytes=256 << 20,
    answer_bytes=4 << 20,
    way_out="a sound chat template needs milliseconds: look at the one in the tokenizer's configuration",
)
TODAY = "2025-01-01"
"""The date of every rendered chat: some templates write it down, and the same inputs give the same text."""


class Message(Value):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Chat(Value):
    """A chat to render.

    Attributes:
        messages: its turns.
        add_generation_prompt: whether the beginning of the assistant's answer follows.
    """

    messages: tuple[Message, ...]
    add_generation_prompt: bool = True

    @classmethod
    def of_prompt(cls, prompt: str) -> "Chat":
        """The chat of one user's message that waits for its answer."""
        return cls(messages=(Message(role="user", content=prompt),))


class Rendered(Value):
    """A chat as text, or the error with which the template refused it (many refuse a system message, for one)."""

    text: str = ""
    error: str = ""


def render(template: str, chats: Sequence[Chat], variables: Mapping[str, str]) -> tuple[Rendered, ...]:
    """Render chats in a child process.

    Args:
        template: the Jinja text.
        chats: all of them share the bounds.
        variables: what the template sees besides the messages, such as ``bos_token``.

    Raises:
        StageError: if the template takes more than 2 s of processor time or 256 MB, or breaks the interpreter.
    """
    asked = [chat.model_dump(mode="json") for chat in chats]
    arguments: dict[str, Any] = {"template": template, "chats": asked, "variables": dict(variables)}
    try:
        outcome = call("modelmint.chat:render_here", arguments, limits=LIMITS)
    except StageError as error:
        raise StageError(
            f"the chat template ({len(template)} characters) could not be rendered within "
            f"{LIMITS.cpu_seconds} s and 256 MB: {error}"
        ) from error
    return tuple(Rendered.model_validate(rendered) for rendered in outcome.value)


def render_here(
    template: str, chats: Sequence[Mapping[str, Any]], variables: Mapping[str, str]
) -> list[dict[str, str]]:
    """Render chats in this process, unbounded: what `render` calls in its child."""
    import jinja2

    # What a template's own code can raise: each is its answer to this chat. Lack of memory is not among them.
    errors = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
    try:
        compiled = _compiled(template)
    except errors as error:
        return [{"text": "", "error": f"{type(error).__name__}: {error}"}] * len(chats)
    rendered: list[dict[str, str]] = []
    for chat in chats:
        # Templates ask whether tools "is not none", which is true of a name that nobody defined.
        values = {"tools": None, "documents": None, **variables, **chat}
        try:
            rendered.append({"text": compiled(**values), "error": ""})
        except errors as error:
            rendered.append({"text": "", "error": f"{type(error).__name__}: {error}"})
    return rendered


def _compiled(template: str) -> Callable[..., str]:
    """The template in an environment with the filters, functions and tags that transformers gives it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around an assistant's words, which marks them for training and says nothing here."""

        tags = {"generation"}  # noqa: RUF012 - the name and kind that Jinja asks for

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        from datetime import datetime

        return datetime.fromisoformat(TODAY).strftime(pattern)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(template).render
