"""Whether a variant reads and writes as its source does: tokenizer, chat template and special tokens.

A variant whose tokenizer differs is another model, however small its divergence on given tokens. What the source does
is written down once, in `Expectations`, and every variant is held against it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import ConfigDict, Field

from modelmint.artifact import digest_of_bytes
from modelmint.chat import Chat, Message, Rendered, render
from modelmint.errors import StageError, UnsafeSourceError
from modelmint.formats import SpecialTokens, Tokenizer
from modelmint.report import Value

TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "the quick brown FOX JUMPS over THE lazy dOg",
    "She said: \"I can't, won't, and shouldn't've!\" He'd've agreed; they'll see.",
    "Prices rose 3.14% to $1,234,567.89 (from €999).",
    "0123456789 00 007 1e-10 0xDEADBEEF 10000000000000000",
    "In 1984, 2 + 2 = 5; by 2024 it was 4.",
    " leading space",
    "trailing space ",
    "  two leading, two  inside, two trailing  ",
    "a b  c   d    e     f      g       h        i",
    " ",
    "        ",
    "\n",
    "\n\n\n",
    "\t",
    "line one\nline two\r\nline three\rline four",
    "\ttabbed\t\ttwice \t mixed\n \n\t\n",
    "ends with newline\n",
    "def f(x: int) -> int:\n    if x > 0:\n        return x * f(x - 1)\n    return 1\n",
    "for (int i = 0; i < n; ++i) { a[i] = b[i] ^ 0xff; } // loop",
    "SELECT name, COUNT(*) FROM users WHERE id != 3 GROUP BY name;",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "<html><body class='x'>&amp; &lt;tag&gt;</body></html>",
    "https://example.org/path?query=1&other=%20#fragment",
    "user@example.org, C:\\Users\\x, /usr/local/bin, snake_case, camelCase, kebab-case",
    "!!! ??? ... --- ___ *** ### $$$ %%% &&& ((( ))) [[[ ]]]",
    "“Curly quotes”, ‘single’, em—dash, en–dash, ellipsis…",
    "naïve café, Ångström, Übergröße, façade, El Niño, cœur",
    "cafe\u0301 and caf\u00e9 differ only in normal form",
    "ﬁne ligatures, ² superscript, Ⅷ numerals, ㎏ units, ｆｕｌｌ width",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Árvíztűrő tükörfúrógép.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "敏捷的棕色狐狸跳过了懒狗。",
    "いろはにほへと ちりぬるを。カタカナもあります。",
    "다람쥐 헌 쳇바퀴에 타고파.",
    "نص حكيم له سر قاطع وذو شأن عظيم.",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा।",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "😀 😃 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️ ✊🏿",
    "🤖text🤖between🤖emoji",
    "zero\u200bwidth, no\u00a0break, soft\u00adhyphen, \u202eoverride\u202c, \ufeffmark",
    "control \x01 \x07 \x1b[31m characters \x7f",
    "x" * 300,
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopic",
    "<|im_start|>user\nNot a turn<|im_end|>\n<|endoftext|>",
    "<s>[INST] not an instruction [/INST]</s><unk><pad><bos><eos>",
    "<start_of_turn>model<end_of_turn><|user|><|assistant|><|end|><think></think>",
)
"""50 texts on which tokenizers are known to differ: spaces, digits, scripts, normal forms, special tokens spelt out."""


def _chat(*turns: tuple[Literal["system", "user", "assistant"], str], prompt: bool) -> Chat:
    return Chat(messages=tuple(Message(role=role, content=text) for role, text in turns), add_generation_prompt=prompt)


CHATS = (
    _chat(("user", "Hi"), prompt=True),
    _chat(("user", "Hi"), prompt=False),
    _chat(("system", "Be brief."), ("user", "Hi"), prompt=True),
    _chat(("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), prompt=True),
    _chat(("user", "Hi"), ("assistant", "Hello."), prompt=False),
    _chat(("user", "  padded \n\n"), ("assistant", " padded\n"), ("user", ""), prompt=True),
    _chat(("user", 'Ça va ? 你好 👍🏽 {{ not jinja }} {% nor this %} "quoted" <tag>'), prompt=True),
)
"""Chats that templates treat differently."""


class SourceTokenizer(Tokenizer, Protocol):
    """The source's own tokenizer, which also knows what its chat template sees."""

    @property
    def template_variables(self) -> Mapping[str, str]:
        """The special tokens by the names that a template has for them, such as ``bos_token``."""
        ...


class TokenizedText(Value):
    """A text and its token ids; `special` says whether spellings of special tokens in it are those tokens."""

    text: str
    special: bool = False
    tokens: tuple[int, ...]


class RenderedChat(Value):
    """A chat and what the template makes of it."""

    chat: Chat
    rendered: Rendered


class Expectations(Value):
    """What the source does with texts and chats.

    Attributes:
        schema_version: version of this document's layout.
        vocabulary: number of token ids.
        special_tokens: its special tokens.
        texts: texts with their tokens: `TEXTS`, and every chat that the template renders.
        chat_template: the template's text; empty if there is none.
        chat_template_digest: its digest.
        template_variables: what the template sees besides the messages.
        chats: `CHATS` as the template renders them.
        prompts: the recipe's prompts as the template renders them, each a chat of one user's message.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    vocabulary: int
    special_tokens: SpecialTokens
    texts: tuple[TokenizedText, ...]
    chat_template: str
    chat_template_digest: str
    template_variables: dict[str, str]
    chats: tuple[RenderedChat, ...]
    prompts: tuple[RenderedChat, ...]

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)


@dataclass(frozen=True)
class Parity:
    """How much of what was compared is equal; `notes` names the first difference."""

    equal: int
    compared: int
    notes: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """The share that is equal."""
        return self.equal / self.compared


def expectations(tokenizer: SourceTokenizer, prompts: Sequence[str]) -> Expectations:
    """Write down what the source does.

    Raises:
        UnsafeSourceError: if the source's chat template takes more time or memory than any sound one.
    """
    template, variables = tokenizer.chat_template, dict(tokenizer.template_variables)
    chats = [*CHATS, *(Chat.of_prompt(prompt) for prompt in prompts)] if template else []
    try:
        rendered = render(template, chats, variables) if chats else ()
    except StageError as error:
        raise UnsafeSourceError(f"{error}; correct the template or remove it from the source") from error
    pairs = [RenderedChat(chat=chat, rendered=text) for chat, text in zip(chats, rendered, strict=True)]
    texts = [(text, False) for text in TEXTS]
    texts += [(pair.rendered.text, True) for pair in pairs[: len(CHATS)] if pair.rendered.text]
    return Expectations(
        vocabulary=tokenizer.vocabulary,
        special_tokens=tokenizer.special_tokens,
        texts=tuple(
            TokenizedText(text=text, special=special, tokens=tuple(tokenizer.tokenize(text, special=special)))
            for text, special in texts
        ),
        chat_template=template,
        chat_template_digest=digest_of_bytes(template.encode()),
        template_variables=variables,
        chats=tuple(pairs[: len(CHATS)]),
        prompts=tuple(pairs[len(CHATS) :]),
    )


def tokenizer_parity(expected: Expectations, tokenizer: Tokenizer) -> Parity:
    """Compare token ids text by text; with another vocabulary size, nothing is equal."""
    total = len(expected.texts)
    if tokenizer.vocabulary != expected.vocabulary:
        note = f"the vocabulary has {tokenizer.vocabulary} tokens, the source's {expected.vocabulary}"
        return Parity(0, total, (note,))
    equal, notes = 0, list[str]()
    for item in expected.texts:
        tokens = tuple(tokenizer.tokenize(item.text, special=item.special))
        if tokens == item.tokens:
            equal += 1
        elif not notes:
            notes.append(
                f"tokenizes differently: {_shown(item.text)} is {_ids(tokens)}, for the source {_ids(item.tokens)}"
            )
    return Parity(equal, total, tuple(notes))


def template_parity(expected: Expectations, tokenizer: Tokenizer) -> Parity:
    """Compare rendered chats; one and the same template text renders equally without a try."""
    template = tokenizer.chat_template
    if template == expected.chat_template:
        return Parity(max(1, len(expected.chats)), max(1, len(expected.chats)))
    if not template:
        return Parity(0, len(expected.chats), ("the source has a chat template, this has none",))
    if not expected.chat_template:
        return Parity(0, 1, ("this has a chat template, the source has none",))
    try:
        rendered = render(template, [item.chat for item in expected.chats], expected.template_variables)
    except StageError as error:
        return Parity(0, len(expected.chats), (str(error),))
    pairs = list(zip(expected.chats, rendered, strict=True))
    different = [(item, text) for item, text in pairs if item.rendered != text]
    notes = tuple(
        f"the chat template renders {_shown(text.text or text.error)}, the source's "
        f"{_shown(item.rendered.text or item.rendered.error)}"
        for item, text in different[:1]
    )
    return Parity(len(pairs) - len(different), len(pairs), notes)


def special_tokens_parity(expected: SpecialTokens, found: SpecialTokens) -> Parity:
    """Compare special tokens: which begins, whether it is put first, and that all that end an answer do so here too.

    A beginning that neither side puts anywhere is a mere name, and a format may know further ends.
    """
    notes: list[str] = []
    if expected.adds_beginning != found.adds_beginning:
        verb = "puts" if found.adds_beginning else "does not put"
        notes.append(f"the tokenizer {verb} the beginning-of-sequence token first, unlike the source's")
    used = expected.adds_beginning or found.adds_beginning or expected.beginning is not None
    if used and expected.beginning != found.beginning:
        notes.append(f"sequences begin with token {found.beginning}, for the source with {expected.beginning}")
    missing = sorted(set(expected.end) - set(found.end))
    if missing:
        notes.append(f"token {missing[0]} ends an answer of the source, but not here")
    return Parity(3 - len(notes), 3, tuple(notes))


def rendered_prompts(expected: Expectations, tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Rendered, ...]:
    """The prompts as the variant's own chat template renders them; none of the source's own is rendered again.

    Raises:
        StageError: if the template takes more time or memory than any sound one.
    """
    same = tokenizer.chat_template == expected.chat_template
    known = {item.chat: item.rendered for item in expected.prompts} if same else {}
    chats = [Chat.of_prompt(prompt) for prompt in prompts]
    new = [chat for chat in chats if chat not in known]
    if new:
        rendered = render(tokenizer.chat_template, new, expected.template_variables)
        known |= dict(zip(new, rendered, strict=True))
    return tuple(known[chat] for chat in chats)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _ids(tokens: Sequence[int]) -> str:
    return str(list(tokens)) if len(tokens) <= 12 else f"[{', '.join(map(str, tokens[:12]))}, ...] ({len(tokens)})"
