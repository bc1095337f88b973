"""A GGUF file's tokenizer in the files that transformers reads, where they can say it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from ..errors import UnsupportedError
from ..tokenizer.backend import build_backend
from ..tokenizer.merging import beyond_tokens, needs_scores
from ..tokenizer.vocab import Vocab

_NAMES = tuple(PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES)


def check_tokenizer(vocab: Vocab, path: Path) -> None:
    """Nothing where `save_tokenizer` writes a tokenizer with the same tokens.

    Raises:
        UnsupportedError: it cannot, and why.
    """
    reason = ""
    if vocab.is_spm and needs_scores(vocab):
        reason = "its tokens are merged by scores that are equal, or from characters that are none"
    elif not vocab.is_spm and beyond_tokens(vocab):
        reason = "merges in its list make or need texts that are no tokens"
    elif vocab.suppressed:
        reason = f"mlx-lm has no setting for the {len(vocab.suppressed)} tokens it never lets out"
    else:
        parsed = frozenset(vocab.parsed)
        for name, i in vocab.special.items():
            used = any(f"{name}_token" in text for text in vocab.chat_templates.values())
            if i not in parsed and used:
                reason = f"its {name} token, which the chat template uses, is an ordinary token"
    if reason:
        raise UnsupportedError(
            f"{path}: a checkpoint cannot say this vocabulary: {reason}; `mlxfuse export` "
            "without --mlx keeps it"
        )


def save_tokenizer(vocab: Vocab, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat templates."""
    parsed = frozenset(vocab.parsed)
    names = {
        f"{name}_token": AddedToken(vocab.tokens[i], normalized=i in vocab.rstrip, special=True)
        for name, i in vocab.special.items()
        if i in parsed and f"{name}_token" in _NAMES
    }
    templates: dict[str, str] | str | None = vocab.chat_templates or None
    if list(vocab.chat_templates) == ["default"]:
        templates = vocab.chat_templates["default"]
    PreTrainedTokenizerFast(
        tokenizer_object=build_backend(vocab, rstrip=vocab.rstrip),
        clean_up_tokenization_spaces=False,
        chat_template=templates,
        **names,
    ).save_pretrained(folder)
