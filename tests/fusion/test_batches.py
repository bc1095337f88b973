"""Every architecture gives each sequence of a batch what it gives that sequence alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import _merge_caches, _right_pad_prompts
from mlx_lm.models.cache import make_prompt_cache

from mlxfuse.kernels.runtime.backend import unfused
from mlxfuse.loader import load
from mlxfuse.models.families import gemma2_model as gemma2
from tests.fusion.zoo import uncompiled
from tests.models import tiny

# Some prompts are beyond the windows of 6, some within.
LENGTHS = (11, 4, 3, 8)
# As many as there are KV heads, where a mask of sequences could be taken for one of heads; all.
BATCHES = (2, 4)
DECODED = 3
# Sums of 96 products in float32, in another order, through up to 6 layers.
BOUND = 1e-4
CASES = {case.arch: name for name, case in reversed(tiny.CASES.items())}


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")


def decoded(model: nn.Module, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of each sequence, its prompt but for `DECODED` tokens, and then token by token; as
    mlx-lm's server computes them for several requests at once.
    """
    caches = _merge_caches([make_prompt_cache(model) for _ in prompts])
    starts = [prompt[:-DECODED].tolist() for prompt in prompts]
    lengths = [len(start) for start in starts]
    padding = [max(lengths) - n for n in lengths]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=padding)
    whole = np.array(model(_right_pad_prompts(starts), cache=caches))
    for cache in caches:
        cache.finalize()
    steps = []
    for i in range(DECODED, 0, -1):
        tokens = mx.array([[int(prompt[-i])] for prompt in prompts])
        steps.append(np.array(model(tokens, cache=caches)))
    return [
        np.concatenate([whole[i, :n], *(step[i] for step in steps)]) for i, n in enumerate(lengths)
    ]


def alone(model: nn.Module, prompt: np.ndarray) -> np.ndarray:
    cache = make_prompt_cache(model)
    rows = [model(mx.array(prompt[None, :-DECODED]), cache=cache)[0]]
    for token in prompt[-DECODED:]:
        rows.append(model(mx.array([[int(token)]]), cache=cache)[0])
    return np.array(mx.concatenate(rows))


def apart(model: nn.Module, prompts: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """The largest difference of a batch from its sequences, relative to the largest logit."""
    found = zip(decoded(model, prompts), want, strict=False)
    return float(max(np.abs(got - own).max() / np.abs(own).max() for got, own in found))


def random_prompts() -> list[np.ndarray]:
    random = np.random.RandomState(5)
    return [random.randint(0, 256, n + DECODED) for n in LENGTHS]


def loaded(path: Path, name: str, fuse: str) -> nn.Module:
    file = tiny.write(path / "m.gguf", tiny.build(name, 0))
    return load(file, fuse=fuse, dtype=mx.float32)[0]


@pytest.mark.parametrize("arch", CASES)
def test_a_batch_is_its_sequences(arch: str, tmp_path: Path) -> None:
    """Fused or not, it is what the model's own code gives them one by one."""
    prompts = random_prompts()
    with uncompiled():
        model = loaded(tmp_path, CASES[arch], "all")
        with unfused():
            want = [alone(model, prompt) for prompt in prompts]
        for code in (nullcontext(), unfused()):
            with code:
                assert max(apart(model, prompts[:n], want) for n in BATCHES) <= BOUND


def test_a_mask_of_another_sequence_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: mlx-lm's own attention, in a batch as large as there are KV heads."""
    monkeypatch.setattr(gemma2, "Attention", gemma2.gemma2.Attention)
    model, prompts = loaded(tmp_path, "gemma2", "off"), random_prompts()
    want = [alone(model, prompt) for prompt in prompts]
    assert apart(model, prompts[:2], want) > 100 * BOUND
    with pytest.raises(ValueError, match="broadcast"):
        apart(model, prompts, want)
