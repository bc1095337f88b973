"""Greedy merging of symbols, for the vocabularies that ``tokenizers``' BPE cannot express.

Its merge list ranks pairs of tokens that make a token. SentencePiece ranks the tokens that pairs
make, and of equal scores takes the leftmost; files converted without scores give every token the
same one. In llama.cpp's BPE a merge may make, or need, a text that is no token.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from .vocab import BYTE, NORMAL, Vocab


def needs_scores(vocab: Vocab) -> bool:
    """Whether merges do not decide: equal scores, or tokens of characters that are not tokens."""
    normal = np.flatnonzero(vocab.types == NORMAL).tolist()
    longer = [i for i in normal if len(vocab.tokens[i]) > 1]
    if vocab.scores is None or len(np.unique(vocab.scores[longer])) < len(longer):
        return True
    return any(char not in vocab.ids for char in set("".join(vocab.tokens[i] for i in longer)))


def merges_by_score(vocab: Vocab) -> Iterator[tuple[str, str]]:
    """Every way to make a token of two others, best score first."""
    assert vocab.scores is not None
    bytes_ = set(np.flatnonzero(vocab.types == BYTE).tolist())
    halves = {token for token, i in vocab.ids.items() if i not in bytes_}
    for i in np.argsort(-vocab.scores, kind="stable").tolist():
        token = vocab.tokens[i]
        for k in range(1, len(token)):
            left = token[:k]
            if left in halves and (right := token[k:]) in halves:
                yield left, right


Score = Callable[[str, str], float | None]
"""How early two symbols are merged, the highest first; None: never."""


def by_token(ids: Mapping[str, int], scores: Sequence[float]) -> Score:
    """SentencePiece's: by the token that they make."""

    def score(left: str, right: str) -> float | None:
        token = ids.get(left + right)
        return None if token is None else scores[token]

    return score


def by_pair(merges: Iterable[tuple[str, str]]) -> Score:
    """BPE's: by their place in the list of merges."""
    places = {pair: -float(i) for i, pair in enumerate(merges)}
    return lambda left, right: places.get((left, right))


def beyond_tokens(vocab: Vocab) -> bool:
    """Whether a merge makes or needs a text that is no token: of a vocabulary that was cut down."""
    ids = vocab.ids
    return any(not (a in ids and b in ids and a + b in ids) for a, b in vocab.merges)


def segment(text: str, score: Score) -> list[int]:
    """The lengths of the pieces of ``text``: what merges made, and characters that none reached."""
    symbols = list(text)
    before = list(range(-1, len(symbols) - 1))
    after = [*range(1, len(symbols)), -1]
    queue: list[tuple[float, int, int, int]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            found = score(symbols[left], symbols[right])
            if found is not None:
                size = len(symbols[left]) + len(symbols[right])
                heapq.heappush(queue, (-found, left, right, size))

    for i in range(1, len(symbols)):
        consider(i - 1, i)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        # Symbols only grow or empty, so the length tells whether either has changed.
        if not symbols[left] or not symbols[right] or len(symbols[left] + symbols[right]) != size:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        consider(before[left], left)
        consider(left, after[left])
    return [len(symbol) for symbol in symbols if symbol]
