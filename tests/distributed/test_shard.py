"""What each of several machines would hold, by a file's header alone."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_reduce

from mlxfuse.errors import UnsupportedError
from mlxfuse.gguf.reader import open_gguf
from mlxfuse.models.build import FileRows, build
from mlxfuse.models.config import read_config
from mlxfuse.models.part import Part
from mlxfuse.models.plan import Plan, plan
from mlxfuse.models.rows import RowSource, indices
from mlxfuse.models.shard import shares, stages
from mlxfuse.models.share import Share
from tests.distributed.results import written
from tests.distributed.test_tensor import FAMILIES
from tests.models import tiny


class Group:
    """Of a rank that says nothing to others."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.size = lambda: rank, lambda: ranks


def planned(folder: Path, case: str) -> Plan:
    file = open_gguf(written(folder, case)[0])
    return plan(file, read_config(file))


def every(weights: Plan) -> Iterator[RowSource]:
    """What is read from a file."""
    for weight in (*weights.outer, *(w for layer in weights.layers for w in layer)):
        yield from (*weight.weight, *(() if weight.silent else weight.bias))


def cells(weights: Plan) -> dict[str, np.ndarray]:
    """Of each tensor, which of its numbers [matrices, rows, columns] are held."""
    found: dict[str, np.ndarray] = {}
    for source in every(weights):
        shape = source.tensor.shape if len(source.tensor.shape) > 1 else (*source.tensor.shape, 1)
        shape = (1, 1, *shape)[-3:]
        mask = found.setdefault(source.tensor.name, np.zeros(shape, bool))
        kept = source.kept or ((0, source.stop - source.start),)
        rows = [source.start + i for i in indices(kept)]
        matrices, columns = source.matrices or ((0, shape[0]),), source.columns or ((0, shape[2]),)
        mask[np.ix_(list(indices(matrices)), rows, list(indices(columns)))] = True
    return found


def check_bytes(weights: Plan, found: tuple[Share, ...]) -> None:
    """Every number is held, and those that several ranks hold are said to be replicated."""
    each = {s.tensor.name: s.format.type_size / s.format.block_size for s in every(weights)}
    held = [cells(share.plan) for share in found]
    own, twice = [0.0] * len(found), [0.0] * len(found)
    for name, mask in cells(weights).items():
        masks = [one.get(name, np.zeros_like(mask)) for one in held]
        some = np.sum(masks, axis=0)
        assert np.array_equal(some > 0, mask), name
        for rank, one in enumerate(masks):
            own[rank] += one.sum() * each[name]
            twice[rank] += (one & (some > 1)).sum() * each[name]
    assert [share.nbytes for share in found] == own
    assert [share.replicated for share in found] == twice
    assert {share.whole for share in found} == {sum(s.nbytes for s in every(weights))}


MANY = ("llama-biases", "uneven", "gemma4-e2b", *FAMILIES)
REST = [pytest.param(case, marks=pytest.mark.slow) for case in tiny.CASES if case not in MANY]


@pytest.mark.parametrize("case", [*MANY, *REST])
def test_every_byte_is_held_once(case: str, tmp_path: Path) -> None:
    weights = planned(tmp_path, case)
    for ranks in (2, 3, 4):
        for split in (shares, stages):
            try:
                check_bytes(weights, split(weights, ranks))
            except UnsupportedError as error:
                assert f"cannot be shared by {ranks}" in str(error)  # noqa: PT017


@pytest.mark.parametrize("case", ["llama-q4", "uneven", "phi3", "net"])
def test_the_parts_are_the_whole(case: str, tmp_path: Path) -> None:
    """Values of a layer's weights, summed over what is not the same on all ranks."""
    path, _ = written(tmp_path, case)
    with open_gguf(path) as file:
        weights = plan(file, read_config(file))
        found = [share.plan for share in shares(weights, 2)]
        for i, layer in enumerate(weights.layers):
            for j, weight in enumerate(layer):
                parts = [one.layers[i][j] for one in found]
                assert {part.module for part in parts} == {weight.module}
                values = [FileRows(file, w.weight, mapped=False) for w in (weight, *parts)]
                every, *own = (
                    v(0, w.shape[0]) for v, w in zip(values, (weight, *parts), strict=True)
                )
                if parts[0] is not weight:
                    assert sum(a.size for a in own) == every.size
                    both = np.concatenate([a.ravel() for a in own])
                    assert np.array_equal(np.sort(both), np.sort(every.ravel()))


def test_a_mapped_part_is_the_part_that_is_read(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "uneven")
    with open_gguf(path) as file:
        for share in shares(plan(file, read_config(file)), 2):
            for weight in share.plan.layers[0]:
                for source in weight.weight:
                    read, mapped = (source.bytes(file, mapped=m) for m in (False, True))
                    assert np.array_equal(read, mapped)


def test_ranks_take_turns_to_have_more(tmp_path: Path) -> None:
    """At most 1.1 / N of what is not the same on all, although three units are for two."""
    for share in shares(planned(tmp_path, "uneven"), 2):
        own, all_ = share.nbytes - share.replicated, share.whole - share.replicated
        assert own < 1.1 / 2 * all_
    # What an earlier layer keeps is read by one that has the same heads.
    shared = shares(planned(tmp_path, "gemma4-e4b"), 2)[0].counts
    assert len({count["n_kv_heads"] for count in shared.values()}) == 1


def test_what_cannot_be_shared_is_said(tmp_path: Path) -> None:
    weights = planned(tmp_path, "uneven")
    with pytest.raises(UnsupportedError, match="3 in units of 1 cannot be shared by 4"):
        shares(weights, 4)
    whole = shares(planned(tmp_path, "gemma4-e2b"), 2)
    assert whole[0].notes == (
        "attention (key/value heads) is whole on every machine: 1 in units of 1 cannot be shared "
        "by 2",
    )
    assert shares(planned(tmp_path, "mamba"), 2)[0].kv_heads == (0, 0)  # none of whole ones
    with pytest.raises(UnsupportedError, match="2 layers cannot be shared by 3 machines"):
        stages(weights, 3)


def test_a_cache_is_of_the_own_heads(tmp_path: Path) -> None:
    weights = planned(tmp_path, "uneven")
    two, one = 2 * 2 * 64, 2 * 1 * 64
    found = [share.plan.config for share in shares(weights, 2)]
    # Ranks take turns to have more heads.
    assert [[c.sizes_of(i)["cache"] for i in (0, 1)] for c in found] == [[two, one], [one, two]]
    first, second = (share.plan.config for share in stages(weights, 2))
    assert [first.sizes_of(i)["cache"] for i in (0, 1)] == [384, 0]
    assert [second.sizes_of(i)["cache"] for i in (0, 1)] == [0, 384]


def nbytes(total: int, array: object) -> int:
    return total + (array.nbytes if isinstance(array, mx.array) else 0)


@pytest.mark.parametrize("split", [shares, stages])
def test_a_rank_reads_no_more_than_it_keeps(split, tmp_path: Path) -> None:
    """Its arrays, and what the host holds while it loads, beside those of one process."""
    path, _ = written(tmp_path, "uneven")
    held, peaks = [], []
    for rank in (None, 0, 1):
        with open_gguf(path) as file:
            weights = plan(file, read_config(file))
            own = None if rank is None else Part(split(weights, 2)[rank], Group(rank, 2))
            tracemalloc.start()
            model = build(file, weights, mx.float32, quantized=True, part=own)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            held.append(tree_reduce(nbytes, model, 0))
            if own is not None:
                assert own.share.nbytes < 0.6 * own.share.whole
    assert max(held[1:]) < 0.65 * held[0]
    assert max(peaks[1:]) <= 1.1 * peaks[0]
