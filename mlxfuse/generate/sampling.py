"""How the next token is chosen, and what ends an answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import MLXFuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling options of ``generate``, ``chat`` and ``server``, with mlx-lm's names.

    temp                     temperature; 0 takes the most likely token (greedy).
    top_p, min_p, top_k      which tokens are left to choose from; 1, 0 and 0 leave all.
    repetition_penalty       logits of recent tokens are divided by it (multiplied where they are
                             negative); 1 changes nothing.
    presence_penalty         subtracted from the logit of each recent token.
    frequency_penalty        subtracted as often as the token is among the recent ones.
    repetition_context_size  how many tokens are recent, for all three penalties.
    logit_bias               token id -> what is added to its logit.
    stop                     texts; an answer ends before the first of them.
    extra_eos_token          tokens (their text or id) that end an answer.
    max_tokens               tokens to generate at most; -1 for no limit.
    seed                     seed of MLX's random numbers; None leaves them as they are.
    """

    max_tokens: int = 100
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_tokens_to_keep: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_context_size: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    extra_eos_token: tuple[str, ...] = ()
    seed: int | None = None

    def sampler(self, tokenizer: TokenizerWrapper) -> Any:
        """What chooses a token, as mlx-lm's ``sampler`` argument."""
        newline = tokenizer.encode("\n", add_special_tokens=False)
        return make_sampler(
            self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            # mlx-lm refuses as many as there are, which leaves all.
            top_k=self.top_k if self.top_k < tokenizer.vocab_size else 0,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=newline + sorted(tokenizer.eos_token_ids),
        )

    def logits_processors(self, tokenizer: TokenizerWrapper) -> list[Any]:
        """What changes logits before a token is chosen, as mlx-lm's ``logits_processors``.

        Raises:
            MLXFuseError: a token of ``logit_bias`` is not in the vocabulary.
        """
        size = tokenizer.vocab_size
        for token in self.logit_bias:
            if not 0 <= token < size:
                raise MLXFuseError(
                    f"--logit-bias: {token} is no token of this model; expected 0 to {size - 1:,}"
                )
        recent = self.repetition_context_size
        on = recent > 0
        return make_logits_processors(
            {**self.logit_bias, **suppressed(tokenizer)},
            self.repetition_penalty if on and self.repetition_penalty != 1 else None,
            recent,
            self.presence_penalty if on else None,
            recent,
            self.frequency_penalty if on else None,
            recent,
        )

    def chosen(self) -> dict[str, float]:
        """What differs from the defaults and matters to the choice of a token."""
        plain, here = Sampling(), {name: getattr(self, name) for name in SHOWN}
        if self.temp == 0:
            here = {name: v for name, v in here.items() if name in PENALTIES}
        if not any(here[name] != getattr(plain, name) for name in PENALTIES[:3]):
            here.pop(PENALTIES[3])
        return {name: v for name, v in here.items() if v != getattr(plain, name)}

    def describe(self, of_file: Collection[str] = ()) -> str:
        """`chosen` in one line.

        Args:
            of_file: names of the options that the model's file gave.
        """
        listed = [
            f"{name.replace('_', '-')} {value:g}" + " (the file's)" * (name in of_file)
            for name, value in self.chosen().items()
        ]
        return "Sampling: " + ", ".join(["greedy"] * (self.temp == 0) + listed)


PENALTIES = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    "repetition_context_size",
)
# What `chosen` tells of; the rest is not about the choice of a token.
SHOWN = (
    *("temp", "top_p", "min_p", "top_k", "xtc_probability", "xtc_threshold"),
    *PENALTIES,
)


def suppressed(tokenizer: TokenizerWrapper) -> dict[int, float]:
    """The file's ``suppress_tokens``, each with -inf, which its logit is biased by."""
    found: dict[int, float] = getattr(tokenizer, "suppressed", {})
    return found


class StopTexts:
    """Cuts a text that comes in pieces before the first of some texts.

    What could be the beginning of one of them is held back until more is known.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is known not to belong to a stop text; ``found`` is the one met."""
        if not self._stops:
            return piece
        text = self._held + piece
        places = [(i, stop) for stop in self._stops if (i := text.find(stop)) >= 0]
        if places:
            first, self.found = min(places)
            self._held = ""
            return text[:first]
        longest = max(len(stop) for stop in self._stops) - 1
        keep = next(
            n
            for n in range(min(longest, len(text)), -1, -1)
            if n == 0 or any(stop.startswith(text[-n:]) for stop in self._stops)
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What is held back when the text ends."""
        held, self._held = self._held, ""
        return held
