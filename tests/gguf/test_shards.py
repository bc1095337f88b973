"""Sets of shards that do not fit together; the sound ones are in ``test_reader``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mlxfuse.errors import GGUFError, ModelRefError
from mlxfuse.gguf import open_gguf
from tests.gguf import make
from tests.gguf.make import T, Typed


def three(folder: Path) -> list[Path]:
    return make.shards(folder, [[T("a")], [T("b")], [T("c")]])


def split(no: object, count: object, total: object = 3) -> dict[str, object]:
    return {"split.no": no, "split.count": count, "split.tensors.count": total}


@dataclass(frozen=True)
class SetCase:
    name: str
    break_it: Callable[[list[Path]], object]
    reason: str
    blamed: int  # index of the file in the message


SETS = [
    SetCase("missing", lambda p: p[1].unlink(), "shard 2 of the set cannot be opened.*No such", 1),
    SetCase("directory", lambda p: (p[2].unlink(), p[2].mkdir()), "shard 3 .*is a directory", 2),
    SetCase("empty", lambda p: p[2].write_bytes(b""), "the file is empty", 2),
    SetCase("truncated", lambda p: os.truncate(p[1], 90), "bytes", 1),
    SetCase(
        "duplicated",
        lambda p: p[2].write_bytes(p[1].read_bytes()),
        "split.no 2 and split.count 3 expected, found 1 and 3",
        2,
    ),
    SetCase(
        "exchanged",
        lambda p: (p[1].rename(p[1].with_name("x")), p[2].rename(p[1]),
                   p[1].with_name("x").rename(p[2])),
        "split.no 1 and split.count 3 expected, found 2 and 3",
        1,
    ),
    SetCase(
        "of another set",
        lambda p: make.write(p[1], split(1, 4), [T("b")]),
        "split.no 1 and split.count 3 expected, found 1 and 4",
        1,
    ),
    SetCase(
        "not a shard", lambda p: make.write(p[1], {}, [T("b")]), "found -1 and -1 .-1: absent", 1
    ),
    SetCase(
        "the same tensor twice",
        lambda p: make.write(p[2], split(2, 3), [T("a")]),
        "tensor 'a' is in m-00001-of-00003.gguf too",
        2,
    ),
    SetCase(
        "too few tensors",
        lambda p: make.write(p[2], split(2, 3)),
        "says 3 tensors; the 3 shards have 2",
        0,
    ),
    SetCase(
        "first without a number",
        lambda p: make.write(p[0], {"split.count": 3}, [T("a")]),
        "split.no 0 and split.count 3 expected, found -1 and 3",
        0,
    ),
    SetCase(
        "number in the name and in the header differ",
        lambda p: make.write(p[0], split(1, 3), [T("a")]),
        "header says shard 2 of 3, so its name must end in -00002-of-00003.gguf",
        0,
    ),
    SetCase(
        "count in the name and in the header differ",
        lambda p: make.write(p[0], split(0, 2), [T("a")]),
        "header says shard 1 of 2, so its name must end in -00001-of-00002.gguf",
        0,
    ),
    SetCase(
        "count beyond any name",
        lambda p: make.write(p[0], split(0, Typed(make.U64, 2**64 - 1)), [T("a")]),
        "so its name must end in",
        0,
    ),
    SetCase(
        "count of a wrong type",
        lambda p: make.write(p[0], split(0, "3"), [T("a")]),
        "split.count: an integer >= 0 expected, found str",
        0,
    ),
    SetCase(
        "negative number",
        lambda p: make.write(p[1], split(Typed(make.I32, -1), 3), [T("b")]),
        "split.no: an integer >= 0 expected, found -1",
        1,
    ),
    SetCase(
        "number is an array",
        lambda p: make.write(p[1], split(np.arange(9, dtype="u2"), 3), [T("b")]),
        "split.no: an integer >= 0 expected, found ndarray",
        1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", SETS, ids=lambda case: case.name)
def test_set_refused(case: SetCase, tmp_path: Path) -> None:
    paths = three(tmp_path)
    open_gguf(paths[0]).close()  # whole before it is broken
    case.break_it(paths)
    with pytest.raises(GGUFError, match=case.reason) as caught:
        open_gguf(paths[0])
    assert caught.value.path == str(paths[case.blamed])


def test_a_renamed_shard_is_refused(tmp_path: Path) -> None:
    three(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match="must end in -00001-of-00003"):
        open_gguf(tmp_path / "model.gguf")


def test_only_the_first_shard_is_opened(tmp_path: Path) -> None:
    paths = three(tmp_path)
    with pytest.raises(
        ModelRefError, match=r"is shard 2 of 3; open the first, .*-00001-of-00003\.gguf"
    ):
        open_gguf(paths[1])
