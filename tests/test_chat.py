"""Chat templates are rendered as transformers does it, and no template can take the machine."""

import time

import pytest

from modelmint.chat import Chat, Message, Rendered, render, render_here
from modelmint.errors import StageError

pytestmark = pytest.mark.pure

HELLO = Chat.of_prompt("Hello")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def one(template: str, chat: Chat = HELLO, **variables: str) -> Rendered:
    """What `render` gives without its child process; the bounds have tests of their own."""
    return Rendered.model_validate(render_here(template, [chat.model_dump(mode="json")], variables)[0])


def test_child_renders_every_chat_with_its_variables() -> None:
    answer = Chat(
        messages=(Message(role="system", content="Be brief."), Message(role="user", content="Grüß Gott 👋")),
        add_generation_prompt=False,
    )
    assert render("{{ bos_token }}" + CHATML, [HELLO, answer], {"bos_token": "<s>"}) == (
        Rendered(text="<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        Rendered(text="<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüß Gott 👋<|im_end|>\n"),
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # Each is a feature that templates of published models use.
        ("  {% if true %}\n  kept\n  {% endif %}\nend", "  kept\nend"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hello"}'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{{ messages | tojson(indent=1) }}", '[\n {\n  "role": "user",\n  "content": "Hello"\n }\n]'),
        ("{{ strftime_now('%d %b %Y') }}", "01 Jan 2025"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{% if tools is not none %}tools{% else %}plain{% endif %}", "plain"),
        ("{{ bos_token | default('none') }}{{ missing }}", "none"),
    ],
)
def test_template_sees_what_transformers_gives_it(template: str, text: str) -> None:
    assert one(template) == Rendered(text=text)


def test_transformers_renders_the_same() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": "user", "content": "  <b>Hello</b>\n"}, {"role": "assistant", "content": "Ja 👋 "}]
    template = (
        CHATML
        + "{{ messages | tojson }}\n{% for m in messages %}\n  {%- if loop.last %} last {% endif %}\n{% endfor %}"
    )
    chat = Chat(messages=tuple(Message(**turn) for turn in conversation), add_generation_prompt=True)
    [theirs], _ = render_jinja_template([conversation], chat_template=template, add_generation_prompt=True)
    assert one(template, chat).text == theirs


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not supported"),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ raise_exception.__globals__.json }}", "SecurityError: "),
    ],
)
def test_refusal_of_a_template_is_its_answer(template: str, error: str) -> None:
    rendered = one(template)
    assert rendered.text == ""
    assert rendered.error.startswith(error)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'A' * 10**10 }}",
        "{% set a = 'A' * 10**8 %}{{ a }}{{ a }}{{ a }}",
        "{{ 7 ** 99999999 }}",
        "{{ 'x' * 10**7 }}",
    ],
    ids=["loops", "memory", "memory in steps", "one long operation", "answer too large"],
)
def test_template_without_end_is_stopped_within_its_bounds(template: str) -> None:
    started = time.monotonic()
    with pytest.raises(
        StageError, match=r"the chat template \(\d+ characters\) could not be rendered within 2 s and 256 MB"
    ):
        render(template, [HELLO], {})
    # Two seconds of processor time; the machine may be busy.
    assert time.monotonic() - started < 30
