"""A class is known by the text of its `__call__` and by what its names mean."""

import linecache
import sys
import types
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gpt_oss, llama, mixtral, phimoe, qwen3_moe

from mlxfuse.fusion import certify as certify_module
from mlxfuse.fusion.certify import KNOWN, Match, certify, parse, readers, summing, unify
from tests.fusion.survey import covered

FIRST_MLP = next(i for i, body in enumerate(KNOWN) if body.kind == "mlp")
ATTENTION, MLP = KNOWN[0].source, KNOWN[FIRST_MLP].source


def match(known: str, found: str) -> dict[str, str] | None:
    return unify(parse(known), parse(found))


def test_mlx_lm_is_covered() -> None:
    found = covered()
    kinds: Counter[str] = Counter()
    for i, names in found.items():
        kinds[KNOWN[i].kind] += len(names)
    # Of 0.32.2; another version may have more, or other bodies.
    assert kinds["mlp"] >= 60
    assert kinds["attention"] >= 35
    assert kinds["block"] >= 45
    assert kinds["delta_net"] >= 2
    # The most common of each: of 72 gated MLPs, 52 of which are written in two ways.
    assert len(found[0]) >= 19
    assert len(found[FIRST_MLP]) >= 52
    assert "llama.Attention" in found[0]
    assert "deepseek_v3.DeepseekV3MLP" in found[FIRST_MLP]
    assert all(found[i] for i in range(len(KNOWN)))  # no text is there for nothing


class Sparse(nn.Module):
    """Uses an expert's own result after the sum."""

    def __call__(self, x, ids, scores):
        y = self.experts(x, ids)
        total = (y * scores[..., None]).sum(axis=-2)
        return total + y[..., 0, :]


class Conditional(nn.Module):
    def __call__(self, x, ids, scores):
        if self.shared:
            y = self.experts(x, ids)
        y = (y * scores[..., None]).sum(axis=-2)
        return y


def test_sums_over_experts() -> None:
    """All of a method but the sum is its own text; what else reads the summands keeps it."""
    seen = []

    class Experts(nn.Module):
        def __call__(self, x, ids, scores=None, cast=None):
            seen.append((scores is not None, cast))
            return x if scores is not None else mx.broadcast_to(x[..., None, :], (*ids.shape, 8))

    for cls, name, cast in (
        (mixtral.MixtralSparseMoeBlock, "switch_mlp", False),
        (qwen3_moe.Qwen3MoeSparseMoeBlock, "switch_mlp", True),
        (gpt_oss.MLPBlock, "experts", False),
    ):
        found = summing(cls)
        assert found[0] == name
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.gate = block.router = nn.Linear(8, 4)
        block.top_k = block.num_experts_per_tok = 2
        block.sharding_group, block.norm_topk_prob = None, True
        block[name] = Experts()
        x = mx.random.normal((3, 8))
        assert mx.allclose(found[1](block, x), block(x), atol=1e-6)  # scores add up to one
        assert seen == [(True, cast), (False, None)]
        seen.clear()
    assert summing(Sparse).endswith("Sparse.__call__ uses y after the weighted sum")
    assert summing(Conditional).endswith("has no weighted sum that is known")
    other = type("Other", (mixtral.MixtralSparseMoeBlock,), {})
    assert "is not the class" in summing(other)


def test_a_sum_whose_source_has_changed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = phimoe.PhiMoESparseMoeBlock
    real = certify_module._file
    assert isinstance(summing(cls), tuple)
    certify_module._summing.cache_clear()
    monkeypatch.setattr(
        certify_module, "_file", lambda call: real(call).replace("axis=-2", "axis=-3")
    )
    assert summing(cls).endswith("__call__ has another source")
    certify_module._summing.cache_clear()


BLOCKS = """
import mlx.core as mx
import mlx.nn as nn

FACTOR = 2

def unchanged(function):
    return function

class Decorated(nn.Module):
    @unchanged
    def __call__(self, x, ids, scores):
        y = self.experts(x, ids)
        y = (y * scores[..., None]).sum(axis=-2)
        return y

class Private(nn.Module):
    FACTOR = 3

    def __call__(self, x, ids, scores, factor=FACTOR, *, more=FACTOR):
        y = self.experts(x, ids)
        y = (y * scores[..., None]).sum(axis=-2)
        return y * self.__own * factor * more
"""


def test_sums_of_methods_with_defaults_decorators_and_private_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a notebook, whose cells are no module's file."""
    name = "mlxfuse_notebook"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    lines = BLOCKS.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, "<cell 1>", (len(BLOCKS), None, lines, "<cell 1>"))
    exec(compile(BLOCKS, "<cell 1>", "exec"), vars(module))
    assert summing(module.Decorated) == f"{name}.Decorated.__call__ is no plain method"
    assert certify(module.Decorated, "mlp") == f"{name}.Decorated.__call__ is no plain method"
    attribute, body = summing(module.Private)
    block = module.Private()
    block._Private__own = 5
    block[attribute] = lambda x, ids, scores=None, cast=None: x
    assert body(block, mx.ones(1), None, None).item() == 5 * 3 * 3


class Any(nn.Module):
    def __call__(self, *args):
        return self.linear(*args)


def test_readers_of_the_input() -> None:
    assert readers(llama.MLP) == ("gate_proj", "up_proj")
    assert readers(Any) == ()


def test_names_may_differ() -> None:
    other = """
    def __call__(self, x: "array") -> "array":
        'Documentation.'
        y = self.w2(swiglu(self.w1(x), self.w3(x)))
        return y
    """
    assert match(MLP, other) == {"DOWN": "w2", "GATE": "w1", "UP": "w3"}
    renamed = ATTENTION.replace("queries", "q").replace("keys", "k").replace("self.HEADS", "self.n")
    assert match(ATTENTION, renamed)["HEADS"] == "n"
    apart = ATTENTION.replace(
        "queries, keys, values = self.Q(x), self.K(x), self.V(x)",
        "queries = self.Q(x)\n    keys = self.K(x)\n    values = self.V(x)",
    )
    assert apart != ATTENTION
    assert match(ATTENTION, apart)["V"] == "V"
    ordered = ATTENTION.replace(
        "cache=cache, scale=self.SCALE, mask=mask", "mask=mask, scale=self.SCALE, cache=cache"
    )
    assert ordered != ATTENTION
    assert match(ATTENTION, ordered)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keys = self.ROPE(keys, offset=cache.offset)", "keys = self.ROPE(keys)"),
        ("self.K(x)", "self.Q(x)"),  # capitals are one name each
        ("keys = self.ROPE(keys)", "keys = self.OTHER(keys)"),
        ("return self.O(output)", "return self.O(output) + x"),
        ("return self.O(output)", "return self.O(queries)"),
        ("mask=None", "mask=0"),
        ("(self, x, mask=None", "(self, y, mask=None"),
        ("(0, 2, 1, 3).reshape(B, L, -1)", "(0, 2, 3, 1).reshape(B, L, -1)"),
        ("queries, keys, values, cache=cache", "queries, values, keys, cache=cache"),
        ("keys, values = cache.update_and_fetch", "values, keys = cache.update_and_fetch"),
        ("scaled_dot_product_attention", "attention"),
    ],
)
def test_what_is_another_body(old: str, new: str) -> None:
    assert old in ATTENTION
    changed = ATTENTION.replace(old, new)
    found = match(ATTENTION, changed)
    # Two of the same name are the same: that q and k are one linear is for the detector to see.
    assert found is None or (new == "self.Q(x)" and found["K"] == found["Q"])


def test_an_assignment_that_reads_what_it_writes_is_not_taken_apart() -> None:
    text = "def __call__(self, x, y):\n    x, y = self.A(y), self.B(x)\n    return x + y\n"
    apart = "def __call__(self, x, y):\n    x = self.A(y)\n    y = self.B(x)\n    return x + y\n"
    assert match(text, text) == {"A": "A", "B": "B"}
    assert match(text, apart) is None


def test_what_a_class_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(certify(llama.MLP, "mlp"), Match)
    assert certify(llama.MLP, "attention") == "llama.MLP.__call__ is not a body that is known"
    assert "not a body" in certify(nn.Linear, "mlp")
    monkeypatch.setattr(llama, "Louder", type("Louder", (llama.MLP,), {}), raising=False)
    llama.Louder.__module__ = llama.__name__
    assert "subclass" in certify(llama.Louder, "mlp")
    monkeypatch.setattr(llama, "MLP", nn.Linear)
    assert "not the class" in certify(type_of_mlp, "mlp")
    exec(compile(MLP.replace("swiglu(", "print("), "<text>", "exec"), scope := {})
    monkeypatch.setattr(type_of_mlp, "__call__", scope["__call__"])
    monkeypatch.setattr(llama, "MLP", type_of_mlp)
    assert certify(type_of_mlp, "mlp") == "llama.MLP.__call__ has no source"


type_of_mlp = llama.MLP
