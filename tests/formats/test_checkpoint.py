"""The source checkpoint under PyTorch: its tokenizer and its session, on tiny checkpoints of real architectures."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from modelmint import checkpoint, parity
from modelmint.errors import UnsupportedError
from modelmint.formats import SpecialTokens

pytestmark = pytest.mark.tools

TOKENS = [1, 40, 300, 77, 5, 639, 12, 12, 200, 81, 9, 450]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.checkpoint(tmp_path / "llama")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def edit(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (document | fields).items() if value is not None}))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_session_predicts_what_transformers_predicts(tmp_path: Path, architecture: str) -> None:
    import torch
    import transformers

    folder = tiny.checkpoint(tmp_path / "model", architecture)
    session = checkpoint.open_source(folder, "float32", 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    ours = session.logits(TOKENS)
    assert ours.dtype == np.float32
    assert ours.shape == (len(TOKENS), session.vocabulary) == (12, 640)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    np.testing.assert_allclose(session.logits(TOKENS, 7), ours[7:], atol=2e-5)
    session.close()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_answer_takes_the_best_token_each_time(tmp_path: Path, architecture: str) -> None:
    session = checkpoint.open_source(tiny.checkpoint(tmp_path / "model", architecture), "float32", 1)
    answer = session.generate(TOKENS, 6)
    text = list(TOKENS)
    for token in answer:
        logits = session.logits(text, len(text) - 1)[0]
        # Equal up to rounding: the cache of keys and values adds in another order.
        assert logits[token] >= logits.max() - 1e-3
        text.append(token)
    assert len(answer) == 6 or answer[-1] in session.special_tokens.end


def test_answer_ends_with_the_end(llama: Path) -> None:
    first = checkpoint.open_source(llama, "float32", 1).generate(TOKENS, 4)
    edit(llama, "generation_config.json", eos_token_id=[2, first[2]])
    ended = checkpoint.open_source(llama, "float32", 1).generate(TOKENS, 4)
    assert ended == first[: first.index(first[2]) + 1]


def test_sixteen_bits_are_near_and_the_logits_are_float32(llama: Path) -> None:
    full = checkpoint.open_source(llama, "float32", 1).logits(TOKENS)
    half = checkpoint.open_source(llama, "bfloat16", 1).logits(TOKENS)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.3


def test_speed_is_measured(llama: Path) -> None:
    speed = checkpoint.open_source(llama, "float32", 1).speed(TOKENS, 3)
    assert min(vars(speed).values()) > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_tokenizer_is_that_of_transformers(tmp_path: Path, architecture: str) -> None:
    import transformers

    folder = tiny.checkpoint(tmp_path / "model", architecture)
    ours = checkpoint.open_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in parity.TEXTS:
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.tokenize(text) == plain
        assert ours.tokenize(text, special=True) == theirs(text, add_special_tokens=False).input_ids
        assert ours.detokenize(plain) == theirs.decode(plain, skip_special_tokens=True)
    special = ours.special_tokens
    assert (special.beginning, special.end) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert special.adds_beginning
    assert theirs("a").input_ids[0] == special.beginning
    assert ours.chat_template == theirs.chat_template == tiny.CHAT_TEMPLATE
    assert ours.template_variables == {
        name: getattr(theirs, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }


def test_spelling_of_a_special_token_is_that_token_only_where_asked(llama: Path) -> None:
    tokenizer = checkpoint.open_tokenizer(llama)
    assert 2 in tokenizer.tokenize("end</s>", special=True)
    assert 2 not in tokenizer.tokenize("end</s>")
    assert 2 in tokenizer.tokenize("end</s>", special=True)


@pytest.mark.parametrize(
    ("options", "generation", "expected"),
    [
        ({}, {"eos_token_id": [2, 5, 9]}, SpecialTokens(1, (2, 5, 9), True)),
        ({"add_bos_token": False}, {}, SpecialTokens(1, (2,), False)),
        # Without a word in the configuration the tokenizer's post-processor decides.
        ({"add_bos_token": None}, {}, SpecialTokens(1, (2,), True)),
        ({"bos_token": {"content": "<s>", "lstrip": False}}, {}, SpecialTokens(1, (2,), True)),
        ({"bos_token": None}, {}, SpecialTokens(None, (2,), False)),
    ],
)
def test_special_tokens_come_from_every_file_that_names_them(
    llama: Path, options: dict[str, Any], generation: dict[str, Any], expected: SpecialTokens
) -> None:
    edit(llama, "tokenizer_config.json", **options)
    edit(llama, "generation_config.json", **generation)
    assert checkpoint.open_tokenizer(llama).special_tokens == expected


def test_template_of_its_own_file_comes_first_and_the_default_one_of_several(llama: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit(llama, "tokenizer_config.json", chat_template=several)
    assert checkpoint.open_tokenizer(llama).chat_template == "plain"
    (llama / "chat_template.jinja").write_text("file")
    assert checkpoint.open_tokenizer(llama).chat_template == "file"
    (llama / "chat_template.jinja").unlink()
    edit(llama, "tokenizer_config.json", chat_template=None)
    assert checkpoint.open_tokenizer(llama).chat_template == ""


def test_older_tokenizer_files_are_converted(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    edit(llama, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    tokenizer = checkpoint.open_tokenizer(llama)
    assert tokenizer.detokenize(tokenizer.tokenize("Hello, world!")).strip() == "Hello, world!"


def test_tokenizer_opens_without_the_heavy_libraries(llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from modelmint import checkpoint;"
        f"checkpoint.open_tokenizer(Path({str(llama)!r})).tokenize('a');"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_code_of_the_checkpoint_is_never_run(llama: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (llama / "modeling_own.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).write_text('')\n")
    automatic = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(llama, "config.json", model_type="own", architectures=["OwnModel"], auto_map=automatic)
    with pytest.raises(UnsupportedError, match=r"transformers [\d.]+ cannot open the source checkpoint"):
        checkpoint.open_source(llama, "float32", 1)
    assert not ran.exists()


def test_unknown_architecture_is_refused_with_the_way_out(llama: Path) -> None:
    edit(llama, "config.json", model_type="nobody-knows")
    with pytest.raises(UnsupportedError, match=r"cannot open the source checkpoint: .*write 'reference: base'"):
        checkpoint.open_source(llama, "float32", 1)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_damaged_configuration_is_refused_by_name(llama: Path, name: str) -> None:
    (llama / name).write_text("{")
    with pytest.raises(UnsupportedError, match=f"{name} of the source is not JSON"):
        checkpoint.open_tokenizer(llama)
    (llama / name).write_text("[]")
    with pytest.raises(UnsupportedError, match=f"{name} of the source is not a JSON object"):
        checkpoint.open_tokenizer(llama)


def test_damaged_tokenizer_is_refused(llama: Path) -> None:
    (llama / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UnsupportedError, match="the source's tokenizer cannot be opened"):
        checkpoint.open_tokenizer(llama)


def test_pickled_weights_are_not_opened(llama: Path) -> None:
    shutil.move(llama / "model.safetensors", llama / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="cannot open the source checkpoint"):
        checkpoint.open_source(llama, "float32", 1)
