"""What each of several machines would hold, by a file's header alone."""

import tracemalloc
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
from mlxfuse.models.shard import Share, shares, stages
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


def check_bytes(found: tuple[Share, ...]) -> None:
    """Every byte is held, and once but for what every rank has whole."""
    ranks, whole = len(found), found[0].whole
    assert {share.whole for share in found} == {whole}
    assert len({share.replicated for share in found}) == 1
    held = sum(share.nbytes - share.replicated for share in found)
    assert held == whole - found[0].replicated, ranks


MANY = ("llama-biases", "uneven", "gemma4-e2b", *FAMILIES)
REST = [pytest.param(case, marks=pytest.mark.slow) for case in tiny.CASES if case not in MANY]


@pytest.mark.parametrize("case", [*MANY, *REST])
def test_every_byte_is_held_once(case: str, tmp_path: Path) -> None:
    weights = planned(tmp_path, case)
    for ranks in (2, 3, 4):
        for split in (shares, stages):
            try:
                check_bytes(split(weights, ranks))
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
