"""What ranks agree on, and how one notices that another is lost."""

import json
import queue
import socket

import pytest

from mlxfuse.errors import RanksError
from mlxfuse.ranks.agreement import same_run
from mlxfuse.ranks.team import Peer
from tests.distributed.launch import finish, start_forked
from tests.models import tiny


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("models") / "tiny.gguf", tiny.build("llama", 0))
    said = finish(start_forked(2, "tests.distributed.agreeing", str(path)), 120)
    each = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return sorted(each, key=lambda one: one["rank"])


def test_a_kernel_that_one_rank_cannot_use_is_used_by_none(found):
    assert [rank["disabled"] for rank in found] == [
        ["on rank 1: largest error 3"],
        ["largest error 3"],
    ]
    assert found[0]["reported"] == {"vector": "on rank 1: largest error 3"}


def test_the_token_of_rank_0_is_everyones(found):
    assert [rank["tokens"] for rank in found] == [[0, 1], [0, 1]]
    assert found[1]["own tokens"] == [1, 2]  # control


def test_values_go_from_rank_to_rank(found):
    for rank in found:
        assert rank["all values"] == [[0, ""], [1, "x" * 10]]
        assert rank["shared"] == "of rank 0"
        assert rank["long"]
        assert rank["of the first"] == [1, 2, 3]
    assert [rank["asked"] for rank in found] == [[0], []]


def test_arguments_that_differ_are_told_of(found):
    for rank in found:
        assert rank["differs"].startswith("the ranks differ in the arguments of load: rank 0 has (")


def facts(path):
    return same_run({"the model's files": path}, "")["the model's files"]


def test_files_are_told_apart_by_their_bytes_and_size(tmp_path):
    def seen(data, name="model.gguf"):
        (tmp_path / name).write_bytes(data)
        return facts(tmp_path / "model.gguf")

    data = bytes(range(256)) * 1000
    first = seen(data)
    assert seen(data) == first
    assert seen(data[:100_000] + b"!" + data[100_001:]) != first
    assert seen(data + b"!") != first
    assert seen(data) == first == seen(data, "other.gguf")
    shards = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for shard in shards:
        shard.write_bytes(data)
    whole = facts(shards[0])
    shards[1].write_bytes(data[::-1])
    assert facts(shards[0]) != whole


@pytest.fixture
def ends():
    return queue.SimpleQueue()


@pytest.fixture
def pair(ends):
    """A peer that is lost after a second of silence, and its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        own, _ = listener.accept()
    peer = Peer(1, own, lambda *end: ends.put(end), silence=1.0)
    yield peer, other
    other.close()
    own.close()


@pytest.mark.parametrize(
    ("last", "want"),
    [
        (b'["end", 0]\n', (1, 0)),
        (b'["end", 3]\n', (1, 3)),
        (b"", (1, None)),
        (b"no JSON\n", (1, None)),
    ],
)
def test_how_a_rank_has_ended_is_known(pair, ends, last, want):
    peer, other = pair
    other.sendall(b'["value", [1, "a"]]\n["beat", null]\n' + last)
    other.close()
    assert ends.get(timeout=10)[:2] == want
    assert peer.told() == [1, "a"]
    for _ in range(2):
        with pytest.raises(RanksError, match="rank 1 has ended"):
            peer.told()


def test_a_rank_that_is_silent_is_lost(pair, ends):
    _, other = pair
    for _ in range(4):  # signs of life
        other.sendall(b'["beat", null]\n')
        with pytest.raises(queue.Empty):
            ends.get(timeout=0.5)
    assert ends.get(timeout=10) == (1, None, "it has been silent for 1 seconds")
