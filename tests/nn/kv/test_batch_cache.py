"""A batch of compressed caches gives what each sequence gives alone."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache

from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.kernels.runtime import kernel
from mlxfuse.loader import load
from mlxfuse.nn.kv.batch_cache import BatchCompressedKVCache
from mlxfuse.nn.kv.cache import CompressedKVCache
from tests.models import tiny

from .test_cache import BLOCK, HEADS, K_DIM, feed, part, same, stream

LENGTHS = (230, 7, 131)


def singles(settings=None):
    made = []
    for seed, n in enumerate(LENGTHS):
        made.append(feed(CompressedKVCache(**(settings or {})), stream(n, seed=seed), (50,)))
    return made


@pytest.mark.parametrize(
    ("length", "padded"), [(1, False), (3, False), (3, True), (40, False), (40, True)]
)
@pytest.mark.parametrize("settings", [{}, {"keep": 0, "window": 90}], ids=["whole", "window"])
def test_a_batch_is_its_sequences(length, settings, padded):
    fresh = stream(length, batch=3, seed=9)
    queries = mx.random.normal((3, 2 * HEADS, length, K_DIM), key=mx.random.key(1))
    valid = [length, length - 2, 0] if padded else [length] * 3
    for attending in (False, True):
        alone = singles(settings)
        batch = CompressedKVCache.merge(alone)
        assert batch.offset.tolist() == list(LENGTHS)
        if padded:
            batch.prepare(lengths=valid, right_padding=[length - n for n in valid])
        mask = batch.make_mask(length)
        if attending:
            got = batch.attend(queries, *fresh, Scores.of(mask, 0.1))
        else:
            keys, values = batch.update_and_fetch(*fresh)
            got = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask=mask)
        batch.finalize()
        for i, (cache, n) in enumerate(zip(alone, valid, strict=True)):
            if not n:
                continue
            q, k, v = (x[i : i + 1, :, :n] for x in (queries, *fresh))
            want = cache.attend(q, k, v, Scores.of(cache.make_mask(n), 0.1))
            assert mx.abs(got[i : i + 1, :, :n] - want).max().item() < 1e-5
            other = got[(i + 1) % 3][None, :, :n]  # control
            assert mx.abs(other - want).max().item() > 1e-2
        assert all(same(a, b) for a, b in zip(batch.caches, alone, strict=True))
        assert batch.offset.tolist() == [a + n for a, n in zip(LENGTHS, valid, strict=True)]


@pytest.mark.parametrize("settings", [{}, {"keep": 0, "window": 90}], ids=["whole", "window"])
def test_a_step_of_a_batch_is_one_attention(settings, monkeypatch):
    """And bit for bit what each sequence gives, also when blocks are sealed on the way."""
    monkeypatch.setenv("MLXFUSE_KERNELS", "emulated")
    alone = singles(settings)
    batch = CompressedKVCache.merge(alone)
    steps = stream(70, batch=3, seed=9)
    queries = mx.random.normal((3, 2 * HEADS, 70, K_DIM), key=mx.random.key(1))
    for i in (*range(0, 65, 5), *range(65, 70)):
        n = 5 if i < 65 else 1
        before = kernel.launches["compressed_sdpa"]
        new = part(steps, i, i + n)
        mask = batch.make_mask(n)
        got = batch.attend(queries[:, :, i : i + n], *new, Scores.of(mask, 0.1))
        assert kernel.launches["compressed_sdpa"] == before + 1
        for b, cache in enumerate(alone):
            q, k, v = (x[b : b + 1] for x in (queries[:, :, i : i + n], *new))
            want = cache.attend(q, k, v, Scores.of(cache.make_mask(n), 0.1))
            # A window reads fewer tokens than a mask does, in other splits.
            limit = 1e-5 if settings and n > 1 else 0
            assert mx.abs(got[b : b + 1] - want).max().item() <= limit
    assert batch.nbytes >= sum(c.nbytes for c in alone)
    assert all(same(a, b) for a, b in zip(batch.caches, alone, strict=True))
    assert alone[2]._first + alone[2]._sealed > BLOCK  # one was sealed
    # A mask of somebody else is looked at, which takes an attention for each sequence.
    fresh = stream(1, batch=3, seed=3)
    other = mx.array(batch.make_mask(1))
    got = batch.attend(queries[:, :, :1], *fresh, Scores.of(mx.zeros_like(other), 0.1))
    assert not mx.any(got)


def test_joining_and_leaving_move_no_token():
    alone = singles()
    batch = CompressedKVCache.merge(alone[:2])
    batch.extend(CompressedKVCache.merge(alone[2:]))
    batch.filter([2, 0])
    pair = stream(70, batch=2, seed=5)
    for i in range(70):
        batch.update_and_fetch(*part(pair, i, i + 1))
    assert batch.trim(6) == 6
    for i, one in enumerate((2, 0)):
        want = feed(alone[one], [x[i : i + 1] for x in pair], (1,))
        want.trim(6)
        assert same(batch.extract(i), want)
    assert batch.nbytes == alone[2].nbytes + alone[0].nbytes
    again = BatchCompressedKVCache.from_state(batch.state)
    assert all(same(a, b) for a, b in zip(again.caches, batch.caches, strict=True))


def test_left_padding_is_refused():
    with pytest.raises(ValueError, match="right, not the left"):
        CompressedKVCache.merge(singles()).prepare(left_padding=[1, 0, 0])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("fuse", ["off", "qkv"])
def test_mlx_lms_batch_generator(name, fuse, tmp_path):
    """Prompts of three lengths give the tokens that they give one by one."""
    path = tiny.write(tmp_path / "m.gguf", tiny.build(name, 0))
    model, _ = load(path, fuse=fuse, kv_bits="k8v4")
    prompts = [[(7 * i + n) % 250 for i in range(n)] for n in (150, 3, 81)]
    want = [
        [token for token, _ in generate_step(mx.array(p), model, max_tokens=6)] for p in prompts
    ]
    generator = BatchGenerator(model, max_tokens=6, prefill_step_size=64)
    uids = generator.insert(prompts)
    got = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for r in responses:
            got[r.uid].append(r.token)
    assert [got[uid] for uid in uids] == want
    assert all(type(c) is not KVCache for c in model.make_cache())


def test_copies_go_their_own_ways():
    """mlx-lm deep-copies caches that several prompts begin with."""
    one, two = stream(40, seed=6), stream(40, seed=7)
    start = singles()[0]
    first, second = copy.deepcopy(start), start
    for i in range(40):
        first.update_and_fetch(*part(one, i, i + 1))
        second.update_and_fetch(*part(two, i, i + 1))
    assert same(first, feed(singles()[0], one, (1,)))
    assert same(second, feed(singles()[0], two, (1,)))


def test_what_is_extracted_goes_on_by_itself():
    alone = singles()
    batch = CompressedKVCache.merge(alone)
    taken = batch.extract(1)
    assert same(taken, alone[1])
    feed(taken, stream(90, seed=7), (9,))
    assert batch.offset.tolist() == list(LENGTHS)
    assert same(batch.caches[1], alone[1])
    taken.trim(95)
    assert same(batch.caches[1], alone[1])
    # Nor do the caches that were merged, or the batch's, change each other.
    batch.update_and_fetch(*stream(1, batch=3))
    assert [c.offset for c in alone] == list(LENGTHS)
