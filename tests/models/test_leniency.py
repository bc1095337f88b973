"""What llama.cpp runs, runs here, and what it refuses is refused, whatever a key holds.

The changes are `tests.models.leniency`'s; where we differ, `DIFFERENCES` says why.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mlxfuse.gguf.reader import open_gguf
from mlxfuse.inspect.needs import needs

from . import leniency

GOLDEN = json.loads(Path(__file__).with_name("golden_leniency.json").read_text())
# llama.cpp's logits are compared where both run. Its own float16 tables are the least of it.
BOUND = 2e-2
EVERY = 6  # of so many changes one is tried in the fast tests

NUMBER = r"(yes|-?[0-9.]+|nan|inf|most|as \w+|(no )?text|list|as list of 3)"
# (pattern of "key: change", who runs it, why).
DIFFERENCES = [
    (r".*: (as int32|as 64 bits|uint32|int32|floats|zeros)", "we", "the same number, another type"),
    (r".*(scal\w*|factor|base\w*|epsilon|linear\w*|softcapping|clamp\w*): (-?\d|most)", "we",
     "a whole number where llama.cpp wants a float"),
    (r".*: (list|as list of 3)", "we", "one number a layer, all the same, where one is wanted"),
    (r"general\.name: .*", "we", "the name is not used but for Phi-3's"),
    (r"tokenizer\.ggml\.\w+_token_id: -1", "we", "no token, as 2^32 - 1 is none"),
    (r".*nextn_predict_layers: 1", "we", "blocks that are left out where there are none such"),
    (r"gemma3\.attention\.sliding_window_pattern: 1", "we", "every layer sees the whole context"),
    (r"gemma3\.attention\.sliding_window_pattern: (0|most|list)", "llama.cpp",
     "MLX-LM's Gemma 3 has layers without a window, in equal distances"),
    (r"gemma3\.final_logit_softcapping: 0\.5", "llama.cpp", "Gemma 3 has no cap; refused by name"),
    (r".*: (nan|inf)", "llama.cpp", "nothing sensible is computed"),
    (rf".*\.(expert_weights_norm|expert_weights_scale|leading_dense_block_count): {NUMBER}",
     "llama.cpp", "it does not look at the key's type in this architecture"),
    (r".*\.feed_forward_length: most", "llama.cpp", "where all are experts it is not used"),
]  # fmt: skip


def difference(name: str, who: str) -> int | None:
    """The row that tells of it."""
    for i, (pattern, runs, _) in enumerate(DIFFERENCES):
        if runs == who and re.fullmatch(pattern, name):
            return i
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("leniency")


def tried(case, folder, every, first=0):
    """(its name, the file, llama.cpp's verdict) of one change in ``every``."""
    metadata, tensors = leniency.model(case)
    path = folder / f"{case}.gguf"
    path.write_bytes(leniency.file(metadata, tensors))
    changes = list(leniency.changes(metadata, leniency.asked(case, path)))
    for change in changes[first::every]:
        name = f"{change[0]}: {change[1]}"
        path.write_bytes(leniency.file(metadata, tensors, change))
        yield name, path, GOLDEN[case][name]


def compare(case, folder, every, first, values):
    """The rows of `DIFFERENCES` that were met, and what is not told there."""
    met, wrong = set(), []
    for i, (name, path, verdict) in enumerate(tried(case, folder, every, first)):
        ours, theirs = leniency.reads(path), verdict is not None
        if (ours == "runs") != theirs:
            row = difference(name, "llama.cpp" if theirs else "we")
            met.add(row)
            if row is None:
                wrong.append((name, verdict, ours))
        elif theirs and i % values == 0:
            found = leniency.logits(path)
            if not np.allclose(found, verdict, rtol=BOUND, atol=BOUND):
                wrong.append((name, verdict, found))
    return met, wrong


@pytest.mark.parametrize("case", leniency.CASES)
def test_a_sample_of_keys(case, folder):
    first = leniency.CASES.index(case) % EVERY
    assert compare(case, folder, EVERY, first, values=8)[1] == []


@pytest.mark.slow
def test_every_key(folder):
    met: set[int | None] = set()
    for case in leniency.CASES:
        rows, wrong = compare(case, folder, 1, 0, values=1)
        assert wrong == []
        met |= rows
    assert met == set(range(len(DIFFERENCES)))


def test_the_changes_are_seen(folder):
    """Both refuse some, and other values give other logits: else nothing would be compared."""
    for case in leniency.CASES:
        verdicts = list(GOLDEN[case].values())
        assert 0.2 < sum(v is None for v in verdicts) / len(verdicts) < 0.9
        assert len({tuple(v) for v in verdicts if v is not None}) > 8


@pytest.mark.parametrize("change", ["missing", "0", "7"])
def test_gemma_3_without_a_window(change, folder):
    """Then every layer sees everything, and rotates as those without a window do."""
    metadata, tensors = leniency.model("gemma3")
    path = folder / "x.gguf"
    path.write_bytes(leniency.file(metadata, tensors))
    key = "gemma3.attention.sliding_window"
    (found,) = (c for c in leniency.changes(metadata, {key}) if (c[0], c[1]) == (key, change))
    path.write_bytes(leniency.file(metadata, tensors, found))
    want = GOLDEN["gemma3"][f"{key}: {change}"]
    assert np.allclose(leniency.logits(path), want, rtol=1e-3, atol=1e-3)
    assert not np.allclose(want, GOLDEN["gemma3"]["as it is"], atol=0.1)
    with open_gguf(path) as file:
        assert {window for _, window in needs(file).kv} == ({0, 7} if change == "7" else {0})


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("llama.context_length", 0, True),
        ("llama.context_length", 2**32 - 1, True),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, False),
        ("llama.attention.layer_norm_epsilon", "x", True),
        ("qwen3moe.feed_forward_length", 0, True),
        ("qwen3moe.expert_gating_func", "x", True),
        ("qwen3moe.expert_group_used_count", 7, True),
        ("qwen3moe.expert_feed_forward_length", [48, 48, 48], True),
    ],
)
def test_what_llama_cpp_runs_runs(key, value, same, folder):
    case = key.partition(".")[0]
    metadata, tensors = leniency.model(case)
    path = folder / "x.gguf"
    if isinstance(value, list):
        value = np.full(len(value), metadata[key], np.int32)
    elif value == 2**32 - 1:
        value = leniency.Typed(leniency.U32, value)
    path.write_bytes(leniency.file(metadata, tensors, (key, "", value)))
    found, want = leniency.logits(path), GOLDEN[case]["as it is"]
    assert np.allclose(found, want, rtol=1e-3, atol=1e-3) == same or key.endswith("epsilon")
