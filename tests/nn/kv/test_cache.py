"""The compressed cache: what it holds, whatever way it came in, and what mlx-lm asks of it."""

import copy
import itertools

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlxfuse.fusion.dispatches import dispatches
from mlxfuse.kernels import launches
from mlxfuse.kernels.kv.scheme import pack, unpack
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.nn import sdpa as sdpa_module
from mlxfuse.nn.kv.cache import CompressedKVCache
from mlxfuse.nn.sdpa import sdpa
from tests.bench import bench_kv_memory

HEADS, K_DIM, V_DIM = 2, 64, 32
KEEP, RECENT, BLOCK = 4, CompressedKVCache.RECENT, CompressedKVCache.BLOCK


def stream(tokens, batch=1, seed=0, dtype=mx.float32):
    """Keys and values [batch, HEADS, tokens, dim]."""
    key = mx.random.key(seed)
    kv = mx.random.normal((batch, HEADS, tokens, K_DIM + V_DIM), key=key).astype(dtype)
    return kv[..., :K_DIM], kv[..., K_DIM:]


def part(pair, start, stop):
    return [x[:, :, start:stop] for x in pair]


def feed(cache, pair, steps):
    """Append in pieces of the sizes of ``steps``, again and again."""
    start, sizes = 0, itertools.cycle(steps)
    while start < pair[0].shape[2]:
        stop = start + next(sizes)
        cache.update_and_fetch(*part(pair, start, stop))
        start = stop
    return cache


def same_bits(a, b):
    assert a.dtype == b.dtype
    return a.shape == b.shape and mx.array_equal(mx.view(a, mx.uint8), mx.view(b, mx.uint8)).item()


def live(cache):
    """The parts of its arrays that a next token sees."""
    end, unseen = cache._sealed, cache._unseen
    parts = [cache.sink[:, :, : cache.offset]] if cache.keep else []
    if end:
        parts.append(cache.rows[:, :, min(unseen, end) : end])
    return [*parts, cache.tail[:, :, max(0, unseen - end) : cache._tail_length]]


def same(a, b):
    return a.offset == b.offset and all(map(same_bits, live(a), live(b)))


def held(cache, pair):
    """What `update_and_fetch` returns for no new token: all that is held."""
    fetched = copy.deepcopy(cache).update_and_fetch(*part(pair, 0, 0))
    return mx.concatenate(list(fetched), axis=-1)


@pytest.mark.parametrize("window", [None, 150], ids=["whole", "window"])
@pytest.mark.parametrize("tokens", [700, KEEP + RECENT + BLOCK * 3])
def test_the_same_bits_however_many_tokens_come_at_a_time(tokens, window):
    pair = stream(tokens, dtype=mx.float16)
    keep = 0 if window else KEEP
    one = feed(CompressedKVCache(keep=keep, window=window), pair, (1,))
    for steps in ((7,), (64,), (2048,), (5, 300, 1)):
        made = feed(CompressedKVCache(keep=keep, window=window), pair, steps)
        assert same(made, one), steps
    # Control: other keys, other codes.
    other = feed(CompressedKVCache(keep=keep, window=window), (pair[0] + 0.1, pair[1]), (7,))
    assert not same_bits(live(other)[-2], live(one)[-2])


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
def test_what_is_held_are_the_tokens_quantised_once(dtype):
    pair = stream(400, batch=2, dtype=dtype)
    cache = feed(CompressedKVCache(), pair, (33,))
    sealed = KEEP + (400 - KEEP - RECENT) // BLOCK * BLOCK
    k, v = unpack(cache.scheme, pack(cache.scheme, *part(pair, KEEP, sealed)))
    want = mx.concatenate(list(pair), axis=-1)
    want[:, :, KEEP:sealed] = mx.concatenate([k, v], axis=-1).astype(dtype)
    assert same_bits(held(cache, pair), want)
    # Of normal numbers 8 bits keep about 45 dB, 4 bits 21.
    for got, x, low, high in ((k, pair[0], 40, 50), (v, pair[1], 19, 24)):
        x = x[:, :, KEEP:sealed].astype(mx.float32)
        assert low < -10 * mx.log10(mx.mean((got - x) ** 2) / mx.mean(x**2)).item() < high


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 64 * 8 + 32 * 4 + 2 * 2 * 16),  # a group of each side: scale and bias
        ({"k_bits": 4, "v_bits": 8}, 64 * 4 + 32 * 8 + 2 * 2 * 16),
        ({"k_bits": 16}, 64 * 16 + 32 * 4 + 2 * 16),
        ({"group_size": 32}, 64 * 8 + 32 * 4 + 3 * 2 * 16),
    ],
)
def test_bytes_of_a_token(settings, bits):
    cache = CompressedKVCache(**settings)
    assert cache.token_bytes == cache.nbytes == 0
    feed(cache, stream(4 + 64 + 64 * 40, dtype=mx.float16), (2048,))
    assert cache.token_bytes == HEADS * bits // 8
    # Beside them: what waits to be sealed, the sink, and room for less than STEP rows more.
    plain = 2 * HEADS * (K_DIM + V_DIM) * (CompressedKVCache.CAPACITY + KEEP)
    assert 0 <= cache.nbytes - plain - 64 * 40 * cache.token_bytes < 256 * cache.token_bytes


@pytest.mark.parametrize(("dim", "group"), [(64, 64), (96, 32), (80, 80), (112, 112), (256, 64)])
def test_a_group_divides_the_head(dim, group):
    cache = CompressedKVCache(8, 8, 64)
    x = mx.random.normal((1, 1, 200, dim))
    cache.update_and_fetch(x, x)
    assert (cache.scheme.k.group, cache.scheme.v.group) == (group, group)


# --- attention ------------------------------------------------------------------------------


def attention(queries, keys, values, mask, sinks=None, softcap=None):
    """softmax(q k / 8) v in float32, written down once more."""
    keys, values = (mx.repeat(x, queries.shape[1] // HEADS, axis=1) for x in (keys, values))
    scores = queries @ keys.swapaxes(-1, -2) / 8
    if softcap:
        scores = softcap * mx.tanh(scores / softcap)
    scores = mx.where(mask, scores, -mx.inf)
    if sinks is not None:
        column = mx.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, column], axis=-1)
    return mx.softmax(scores, axis=-1)[..., : keys.shape[2]] @ values


def seen(held, length, keep=KEEP, window=10**6):
    """bool [length, columns]: who sees whom, of the tokens that a next one may see."""
    new = mx.arange(held, held + length)[:, None]
    first = max(keep, held - window + 1)
    column = mx.concatenate([mx.arange(keep), mx.arange(first, held + length)])
    return (column <= new) & ((column > new - window) | (column < keep))


@pytest.mark.parametrize("length", [1, 5, 8, 9, 70])
@pytest.mark.parametrize(
    "settings", [{}, {"keep": 0, "window": 130}, {"window": 130}], ids=["whole", "sliding", "kept"]
)
def test_attend_is_attention_over_what_is_held(length, settings):
    pair = stream(300 + length)
    cache = feed(CompressedKVCache(**settings), part(pair, 0, 300), (77,))
    queries = mx.random.normal((1, 3 * HEADS, length, K_DIM), key=mx.random.key(1)) * 3
    fresh = part(pair, 300, 300 + length)
    sinks = mx.random.normal((3 * HEADS,), key=mx.random.key(2))
    for more in ({}, {"sinks": sinks}, {"softcap": 2.0}, {"sinks": sinks, "softcap": 2.0}):
        one, other = copy.deepcopy(cache), copy.deepcopy(cache)
        given = one.make_mask(length)
        mask = seen(300, length, **settings)
        got = one.attend(queries, *fresh, Scores.of(given, 1 / 8, **more))
        keys, values = other.update_and_fetch(*fresh)
        assert keys.shape[2] == mask.shape[1]
        want = attention(queries, keys, values, mask, **more)
        assert mx.abs(got - want).max().item() < 2e-5, more
        assert same(one, other)
        # The same mask as an array, and added.
        for form in (mask, mx.where(mask, 0.0, -mx.inf)):
            array = copy.deepcopy(cache).attend(queries, *fresh, Scores.of(form, 1 / 8, **more))
            assert mx.abs(array - want).max().item() < 2e-5
        # Control: to see one token less is another answer.
        less = mask & (mx.arange(mask.shape[1]) != mask.shape[1] - length)
        assert mx.abs(attention(queries, keys, values, less, **more) - want).max().item() > 1e-3


@pytest.mark.parametrize("steps", [(1,), (3, 50, 1, 9)])
@pytest.mark.parametrize("keep", [0, 4])
def test_a_window_sees_what_a_rotating_cache_holds(steps, keep):
    """With 16 bits nothing is lost, so both hold the same tokens, but for their order."""
    pair = stream(420)
    ours = CompressedKVCache(16, 16, rotate=False, keep=keep, window=100 - keep)
    theirs = RotatingKVCache(max_size=100, keep=keep)
    feed(ours, pair, steps)
    feed(theirs, pair, steps)
    one = part(stream(1, seed=3), 0, 1)
    found = mx.sort(ours.update_and_fetch(*one)[0], axis=2)
    want = mx.sort(theirs.update_and_fetch(*one)[0], axis=2)
    assert same_bits(found, want)
    assert ours.rows.shape[2] <= 512
    assert not ours.is_trimmable()


def test_masks_are_mlx_lms():
    pair = stream(90)
    for length, window_size in itertools.product((1, 2, 30), (None, 20, 200)):
        ours, theirs = CompressedKVCache(), KVCache()
        for cache in (ours, theirs):
            feed(cache, pair, (90,))
        for as_array in (False, True):
            asked = {"return_array": as_array, "window_size": window_size}
            a, b = (c.make_mask(length, **asked) for c in (ours, theirs))
            same_array = isinstance(a, mx.array) and mx.array_equal(a, b).item()
            assert same_array or a == b
    narrow = feed(CompressedKVCache(keep=0, window=40), pair, (90,))
    assert narrow.make_mask(1) is None
    assert narrow.make_mask(1, window_size=10).sum().item() == 10
    mask = narrow.make_mask(3)
    assert mask.sum(-1).tolist() == [40, 40, 40]
    assert mask[1].tolist() == [False] + [True] * 40 + [False]


# --- trim, save, convert ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1,), (3,)])
def test_trimming_within_the_tail_leaves_no_trace(steps):
    pair, junk = stream(600), stream(9, seed=1)
    plain = feed(CompressedKVCache(), pair, steps)
    cache = CompressedKVCache()
    for start in range(0, 600, 6):
        cache.update_and_fetch(*part(pair, start, start + 6))
        if cache._due(9) <= 0:  # what is sealed stays sealed
            before = copy.deepcopy(cache)
            cache.update_and_fetch(*junk)
            assert trim_prompt_cache([cache], 9) == 9
            assert same(cache, before)
    assert same(cache, plain)


def test_trimming_into_what_is_sealed_keeps_the_bits():
    pair = stream(600)
    cache = feed(CompressedKVCache(), pair, (50,))
    before = held(cache, pair)
    assert cache.trim(350) == 350
    assert same_bits(held(cache, pair), before[:, :, :250])
    cache.update_and_fetch(*part(pair, 250, 600))
    again = held(cache, pair)
    assert same_bits(again[:, :, :250], before[:, :, :250])
    assert same_bits(again[:, :, 600 - RECENT :], before[:, :, 600 - RECENT :])
    assert cache.trim(1000) == 600
    assert cache.empty()
    assert same(feed(cache, pair, (9,)), feed(CompressedKVCache(), pair, (50,)))


@pytest.mark.parametrize("tokens", [0, 3, 70, 500])
@pytest.mark.parametrize("settings", [{}, {"keep": 0, "window": 200, "v_bits": 8}])
def test_mlx_lm_saves_and_loads_it(tokens, settings, tmp_path):
    pair = stream(tokens + 200, dtype=mx.float16)
    cache = feed(CompressedKVCache(**settings), part(pair, 0, tokens), (100,))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert loaded.state[3:] == cache.state[3:]
    for one in (cache, loaded):
        feed(one, part(pair, tokens, tokens + 200), (1, 60))
    assert same(loaded, cache)


@pytest.mark.parametrize("tokens", [0, 3, 99, 100, 101, 430])
@pytest.mark.parametrize("keep", [None, 0, 4], ids=["plain", "sliding", "kept"])
def test_a_plain_cache_is_converted(tokens, keep):
    pair = stream(tokens + 130)
    window = None if keep is None else 100 - keep
    theirs = KVCache() if keep is None else RotatingKVCache(max_size=100, keep=keep)
    feed(theirs, part(pair, 0, tokens), (40, 1))
    direct = CompressedKVCache(v_bits=8, keep=KEEP if keep is None else keep, window=window)
    feed(direct, part(pair, 0, tokens), (40, 1))
    made = CompressedKVCache.from_cache(theirs, v_bits=8)
    for cache in (made, direct):
        feed(cache, part(pair, tokens, tokens + 130), (10,))
    assert made.offset == direct.offset == tokens + 130
    assert same_bits(held(made, pair), held(direct, pair))


# --- kernels and memory -----------------------------------------------------------------------


def test_a_step_that_seals_nothing_is_three_dispatches():
    pair = stream(501, dtype=mx.float16)
    queries = mx.zeros((1, 4 * HEADS, 1, K_DIM), mx.float16)
    one = part(pair, 500, 501)
    mx.eval(queries, one)
    for tokens, want in ((450, {"compressed_sdpa": 2, "SliceUpdate": 1}), (451, None)):
        cache = feed(CompressedKVCache(), part(pair, 0, tokens), (150,))
        mx.eval(cache.state)

        def step(cache=cache):
            return cache.attend(queries, *one, Scores.of(None, 0.1)), cache.tail, cache.rows

        found = dispatches(step)
        if want is None:  # control: to seal a block takes more
            assert found.total() > 3
            assert found["quantize_kv"] == 1
        else:
            assert found == want


def test_the_kernels_in_the_cache(kernels, monkeypatch):
    """Emulated or on Metal: quantised, decompressed and attended to as by the reference."""
    pair = stream(160, dtype=mx.float16)
    queries = mx.random.normal((1, 2 * HEADS, 1, K_DIM), key=mx.random.key(1)).astype(mx.float16)

    def outputs():
        cache = feed(CompressedKVCache(), part(pair, 0, 150), (150,))
        steps = []
        for i in range(150, 153):
            steps.append(cache.attend(queries, *part(pair, i, i + 1), Scores.of(None, 0.2)))
            mx.eval(steps[-1], cache.state)
        steps.append(mx.concatenate(list(cache.update_and_fetch(*part(pair, 153, 154))), axis=-1))
        return cache, steps

    launches.clear()
    cache, got = outputs()
    assert launches["quantize_kv"] == launches["dequantize_kv"] == 1
    assert launches["compressed_sdpa"] >= 3
    monkeypatch.setenv("MLXFUSE_KERNELS", "reference")
    reference, want = outputs()
    assert cache._sealed == reference._sealed == 64
    for a, b in zip(got, want, strict=True):
        assert mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item() < 0.02
    codes = cache.rows[:, :, :64] == reference.rows[:, :, :64]
    assert codes.astype(mx.float32).mean().item() > 0.98


def test_memory_of_a_thousand_pipelined_tokens():
    """The compressed rows are never copied as a whole; a plain cache is, while it is read."""
    assert bench_kv_memory.decode(CompressedKVCache, 2048)[1] < 0.5
    if mx.default_device() == mx.cpu:
        assert bench_kv_memory.decode(KVCache, 2048, 100)[1] > 0.9


def test_memory_of_a_prompt_is_below_the_plain_caches():
    of = bench_kv_memory.model()
    (plain, most), (held, peak) = (
        bench_kv_memory.prompt(of, make, 4096, 512, 1) for make in (KVCache, CompressedKVCache)
    )
    assert held < 0.5 * plain
    assert peak < 0.8 * most


@pytest.mark.usefixtures("fresh_buffers")
def test_layers_take_memory_one_after_the_other():
    """Why the benchmark's one computing layer has the peak of all 24.

    When MLX's threads free what they have read shifts the peak by an eighth; 24 layers at once
    would take several times it.
    """
    of = bench_kv_memory.model()
    one, all_of_them = (
        bench_kv_memory.prompt(of, CompressedKVCache, 2048, 64, n)[1] for n in (1, 24)
    )
    assert one == pytest.approx(all_of_them, rel=0.3)


@pytest.mark.parametrize("settings", [{}, {"keep": 0, "window": 130}], ids=["whole", "sliding"])
def test_many_queries_read_some_heads_at_a_time(settings, monkeypatch):
    pair = stream(400)
    cache = feed(CompressedKVCache(**settings), part(pair, 0, 320), (320,))
    queries = mx.random.normal((1, 3 * HEADS, 80, K_DIM), key=mx.random.key(1))
    sinks = mx.random.normal((3 * HEADS,), key=mx.random.key(2))
    mask = mx.random.uniform(shape=(1, 3 * HEADS, 80, cache.columns + 80)) < 0.7
    heads = []

    def counted(q, k, *rest, **how):
        heads.append(k.shape[1])
        return sdpa(q, k, *rest, **how)

    monkeypatch.setattr(sdpa_module, "sdpa", counted)
    keys, values = copy.deepcopy(cache).update_and_fetch(*part(pair, 320, 400))
    causal = cache.mask_array(80, cache.window)
    for given, seen_keys in ((cache.make_mask(80), causal), (mask, mask), (mask[:, :1],) * 2):
        want = attention(queries, keys, values, seen_keys, sinks)
        results, caches = [], []
        for scratch in (CompressedKVCache.SCRATCH, 1):
            monkeypatch.setattr(CompressedKVCache, "SCRATCH", scratch)
            caches.append(copy.deepcopy(cache))
            fresh = part(pair, 320, 400)
            results.append(caches[-1].attend(queries, *fresh, Scores.of(given, 1 / 8, sinks=sinks)))
            monkeypatch.undo()
            monkeypatch.setattr(sdpa_module, "sdpa", counted)
        assert heads == [HEADS] + [1] * HEADS
        heads.clear()
        assert all(mx.abs(x - want).max().item() < 2e-5 for x in results)
        assert same(*caches)
        # Control: the heads of queries have other masks, sinks and keys.
        assert mx.abs(mx.roll(want, 1, axis=1) - want).max().item() > 1e-2


def test_a_sliding_cache_can_be_trimmed_until_something_has_left_the_window():
    pair = stream(600)
    cache = CompressedKVCache(keep=0, window=200)
    for length in (150, 50, 400):
        start = cache.offset
        feed(cache, part(pair, start, start + length), (50,))
        full = cache._first > 0
        assert cache.is_trimmable() == (not full)
        if not full:
            before = copy.deepcopy(cache)
            feed(cache, stream(3, seed=2), (3,))
            assert trim_prompt_cache([cache], 3) == 3
            assert same(cache, before)
    assert full
    assert trim_prompt_cache([cache], 3) == 0
