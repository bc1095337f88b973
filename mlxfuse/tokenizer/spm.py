"""SentencePiece's greedy merging, for the vocabularies that a list of merges cannot express.

A merge list ranks pairs; SentencePiece ranks the tokens that pairs make, and of equal scores takes
the leftmost. Files converted without scores give every token the same one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

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


def segment(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    """The lengths of the pieces of ``text``: tokens, and characters that no merge reached."""
    symbols = list(text)
    before = list(range(-1, len(symbols) - 1))
    after = [*range(1, len(symbols)), -1]
    queue: list[tuple[float, int, int, int]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            token = ids.get(symbols[left] + symbols[right])
            if token is not None:
                size = len(symbols[left]) + len(symbols[right])
                heapq.heappush(queue, (-scores[token], left, right, size))

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
