"""The tokenizer of an MLX-LM checkpoint: every vocabulary has the same tokens, or is refused."""

import re
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load

from mlxfuse.errors import UnsupportedError
from mlxfuse.export.tokenizer import check_tokenizer, save_tokenizer
from mlxfuse.tokenizer.load import build_tokenizer
from mlxfuse.tokenizer.pretokenizers import PRE
from mlxfuse.tokenizer.vocab import read_vocab

from ..tokenizer import vocabularies
from ..tokenizer.test_chat_template import CHATML, MACROS, RARE, TOOL_USE
from ..tokenizer.test_tokenizer import GOLDEN

FAMILIES = vocabularies.families(PRE)
REFUSED = {
    "spm of equal scores": "scores that are equal",
    **{f"{kind}, cut down": "texts that are no tokens" for kind in ("bpe", "gemma4")},
    "bpe, cut down, whole words": "texts that are no tokens",
}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def saved(metadata, folder):
    vocab = read_vocab(metadata, "x.gguf")
    check_tokenizer(vocab, Path("x.gguf"))
    save_tokenizer(vocab, folder)
    return load(folder, eos_token_ids=sorted(vocab.eog)), build_tokenizer(metadata, "x.gguf")


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - REFUSED.keys()))
def test_mlx_lm_has_the_same_tokens(name, tmp_path):
    there, here = saved(FAMILIES[name], tmp_path)
    for text in GOLDEN["texts"]:
        if name == "spm phi-3" and re.search(r">\s*[\x85\u3000]", text):
            continue  # transformers strips Unicode's white space too
        assert there.encode(text) == here.encode(text), text
    assert set(there.eos_token_ids) == set(here.eos_token_ids)


@pytest.mark.parametrize("name", REFUSED)
def test_what_tokenizer_json_cannot_say_is_refused(name, tmp_path):
    with pytest.raises(UnsupportedError, match=f"x.gguf: .*{REFUSED[name]}.*without --mlx"):
        saved(FAMILIES[name], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_template_that_writes_an_ordinary_token_is_refused(tmp_path):
    metadata = {**FAMILIES["bpe, bos is a letter"], "tokenizer.chat_template": "{{ bos_token }}"}
    with pytest.raises(UnsupportedError, match="its bos token, which the chat template uses"):
        saved(metadata, tmp_path)


@pytest.mark.parametrize(
    "templates",
    [
        {"": CHATML},
        {"": TOOL_USE, ".tool_use": MACROS},
        {".rag": RARE},
        {".tool_use": CHATML, ".a": RARE},
    ],
    ids=["one", "default and named", "named only", "all named"],
)
def test_mlx_lm_renders_the_same(templates, tmp_path):
    named = {f"tokenizer.chat_template{name}": text for name, text in templates.items()}
    there, here = saved({**FAMILIES["bpe qwen2"], **named}, tmp_path)
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]):
        for more in ({}, {"chat_template": "a"} if ".a" in templates else {}):
            options = {"tools": tools, "tokenize": False, **more}
            text = there.apply_chat_template(CHAT, **options)
            assert text == here.apply_chat_template(CHAT, **options)
            assert text
    assert there.has_chat_template
