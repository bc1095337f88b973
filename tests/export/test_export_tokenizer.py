"""The tokenizer of an MLX-LM checkpoint: every vocabulary has the same tokens, or is refused."""

import random

import mlx_lm
import numpy as np
import pytest

from mlxfuse.errors import UnsupportedError
from mlxfuse.export.mlx_checkpoint import export_mlx
from mlxfuse.tokenizer.load import build_tokenizer
from mlxfuse.tokenizer.pretokenizers import PRE

from ..gguf.make import T, gguf
from ..models import tiny
from ..tokenizer import vocabularies
from ..tokenizer.test_chat_template import CHATML, MACROS, RARE, TOOL_USE
from ..tokenizer.test_tokenizer import GOLDEN

FAMILIES = vocabularies.families(PRE)
REFUSED = {
    "spm of equal scores": "scores that are equal",
    **{f"{kind}, cut down": "texts that are no tokens" for kind in ("bpe", "gemma4")},
    "bpe, cut down, whole words": "texts that are no tokens",
}
KEPT = sorted(FAMILIES.keys() - REFUSED.keys())
# Each vocabulary with one of these: one, default and named, named only, all named.
TEMPLATES = (
    {"": CHATML},
    {"": TOOL_USE, ".tool_use": MACROS},
    {".rag": RARE},
    {".tool_use": CHATML, ".a": RARE},
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]


def exported(metadata, folder):
    """The tokenizer that mlx-lm reads from a whole checkpoint, and ours of the file."""
    model = tiny.build("llama", 0)
    size, width = len(metadata["tokenizer.ggml.tokens"]), model.case.hidden
    tensors = [T("token_embd.weight", shape=(size, width), data=bytes(4 * size * width))]
    for name in model.tensors:
        if name.startswith("blk.0.") or name == "output_norm.weight":
            array = model.weights(name)
            tensors.append(T(name, shape=array.shape, data=array.tobytes()))
    described = {**model.metadata, **metadata, "llama.block_count": 1}
    (folder / "x.gguf").write_bytes(gguf(described, tensors))
    export_mlx(folder / "x.gguf", folder / "out")
    return mlx_lm.load(str(folder / "out"))[1], build_tokenizer(metadata, "x.gguf")


@pytest.mark.parametrize("name", KEPT)
def test_mlx_lm_has_the_same_tokens_ends_and_conversations(name, tmp_path):
    templates = TEMPLATES[KEPT.index(name) % len(TEMPLATES)]
    named = {f"tokenizer.chat_template{key}": text for key, text in templates.items()}
    there, here = exported({**FAMILIES[name], **named}, tmp_path)
    for text in GOLDEN["texts"]:
        assert there.encode(text) == here.encode(text), text
    assert there.eos_token_ids == here.eos_token_ids
    assert there.has_chat_template
    for tools in (None, TOOLS):
        for more in ({}, {"chat_template": "a"} if ".a" in templates else {}):
            options = {"tools": tools, "add_generation_prompt": True, **more}
            text = there.apply_chat_template(CHAT, tokenize=False, **options)
            assert text
            assert text == here.apply_chat_template(CHAT, tokenize=False, **options)
            assert there.apply_chat_template(CHAT, **options) == here.encode(
                text, add_special_tokens=False
            )


@pytest.mark.parametrize("more", [{}, {"add_space_prefix": False}], ids=["prefix", "none"])
def test_what_swallows_white_space_leaves_unicodes(more, tmp_path):
    """Phi-3's marks; llama.cpp strips C's white space behind them, Hugging Face Unicode's."""
    metadata = {**vocabularies.spm(**more), "general.name": "Phi-3 mini"}
    there, here = exported(metadata, tmp_path)
    parts = ["<|im_end|>", "<s>", "</s>", "<think>", " ", "\n", "\u3000", "\x85", "a", "the", "<"]
    draw = random.Random(0)
    texts = ["".join(draw.choices(parts, k=6)) for _ in range(400)]
    assert [there.encode(text) for text in texts] == [here.encode(text) for text in texts]
    # Neither none nor all of it is swallowed.
    kept = "<|im_end|>\n\u3000a"
    assert there.encode(kept) == there.encode("<|im_end|>\u3000a") != there.encode("<|im_end|>a")


def test_a_vocabulary_without_a_template_has_none(tmp_path):
    there, _ = exported(FAMILIES["spm"], tmp_path)
    assert not there.has_chat_template


def refuses(metadata, reason, folder):
    with pytest.raises(UnsupportedError, match=f"x.gguf: .*{reason}.*without --mlx"):
        exported(metadata, folder)
    assert [path.name for path in folder.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_tokenizer_json_cannot_say_is_refused(name, tmp_path):
    refuses(FAMILIES[name], REFUSED[name], tmp_path)


def test_a_template_that_writes_an_ordinary_token_is_refused(tmp_path):
    metadata = {**FAMILIES["bpe, bos is a letter"], "tokenizer.chat_template": "{{ bos_token }}"}
    refuses(metadata, "its bos token, which the chat template uses", tmp_path)


def test_tokens_that_are_never_to_come_are_refused(tmp_path):
    metadata = {
        **FAMILIES["bpe qwen2"],
        "tokenizer.ggml.suppress_tokens": np.array([5, 6], np.int32),
    }
    refuses(metadata, "no setting for the 2 tokens it never lets out", tmp_path)
