"""A class is known by the text of its `__call__` and by what its names mean."""

from collections import Counter
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import (
    bailing_moe,
    gemma4_text,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    kimi_k3,
    llama,
    ministral3,
    mixtral,
    muse_glimmer,
    qwen3_moe,
)

from mlxfuse.errors import NotFusible
from mlxfuse.fusion import certify as certify_module
from mlxfuse.fusion.certify import KNOWN, certify, inputs, parse, readers, unify
from mlxfuse.nn.moe import Summands
from tests.fusion.survey import covered

FIRST_MLP = next(i for i, body in enumerate(KNOWN) if body.kind == "mlp")
ATTENTION, MLP = KNOWN[0].source, KNOWN[FIRST_MLP].source


def refusal(cls: type, kind: str) -> str:
    with pytest.raises(NotFusible) as reason:
        certify(cls, kind)
    return str(reason.value)


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


def test_a_function_that_a_method_calls_is_known_by_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert certify(glm4_moe.MoEGate, "sigmoid_router").form["eps"] == 0
    assert certify(glm4_moe_lite.MoEGate, "sigmoid_router").form["eps"] == 1e-20
    monkeypatch.setattr(glm4_moe, "group_expert_select", glm4_moe_lite.group_expert_select)
    assert certify(glm4_moe.MoEGate, "sigmoid_router").form["eps"] == 1e-20
    for other in (bailing_moe.group_expert_select, mx.softmax, None):
        monkeypatch.setattr(glm4_moe, "group_expert_select", other)
        assert refusal(glm4_moe.MoEGate, "sigmoid_router") == (
            "glm4_moe.MoEGate.__call__ has another group_expert_select"
        )


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


class Looped(nn.Module):
    """Asks for the experts' results again."""

    def __call__(self, x, ids, scores):
        for _ in range(2):
            y = self.experts(x, ids)
            x = (y * scores[..., None]).sum(axis=-2)
        return x


class Twice(nn.Module):
    """Needs the experts' own results elsewhere."""

    def __call__(self, x, ids, scores):
        y = self.experts(x, ids)
        total = (y * scores[..., None]).sum(axis=-2)
        return total + self.experts(total, ids).sum(axis=-2)


class Wider(nn.Module):
    """Adds up along another axis."""

    def __call__(self, x, ids, scores):
        y = self.experts(x, ids)
        return (y * scores[..., None]).sum(axis=-3)


def test_sums_over_experts() -> None:
    for cls, names, form in (
        (mixtral.MixtralSparseMoeBlock, "switch_mlp", {}),
        (qwen3_moe.Qwen3MoeSparseMoeBlock, "switch_mlp", {"cast": True}),
        (kimi_k3.KimiK3SparseMoE, "switch_mlp", {}),
        (gpt_oss.MLPBlock, "experts", {}),
        (gemma4_text.Experts, "switch_glu", {"whole": True}),
    ):
        found = certify(cls, "experts_sum")
        assert found.names == {"EXPERTS": names}
        assert found.form == form
    for cls in (Sparse, Conditional, Looped, Twice, Wider, llama.MLP):
        assert refusal(cls, "experts_sum").endswith("__call__ is not a body that is known")
    other = type("Other", (mixtral.MixtralSparseMoeBlock,), {})
    assert "is not the class" in refusal(other, "experts_sum")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y, scores: y + scores,
        lambda y, scores: (y * scores[..., None]).sum(axis=-1),
        lambda y, scores: y.sum(axis=-2),
    ],
    ids=["no sum", "another axis", "no scores"],
)
def test_results_that_are_only_to_be_added_up(wrong: Callable[..., object]) -> None:
    """Whatever else a block did with them would fail; it would not compute something else."""
    y = Summands(lambda scores: scores.sum(axis=-1, keepdims=True), mx.float16)
    scores = mx.array([[1.0, 2.0], [3.0, 5.0]])
    assert (y * scores[..., None]).sum(axis=-2).tolist() == [[3.0], [8.0]]
    assert y.dtype == mx.float16
    with pytest.raises((AssertionError, TypeError, ValueError)):
        wrong(y, scores)


METHODS = {
    "return self.k(self.q(x)) + self.v(x)": ("q", "v"),
    "y = self.norm(self.q(x))\n    return y * mx.sigmoid(self.gate(x))": ("q", "gate"),
    "x = self.q(x)\n    return x + self.k(x)": ("q",),
    "x[0] = 1\n    return self.q(x)": (),
    "x += 1\n    return self.q(x)": (),
    "y = x\n    return self.q(y)": (),
    "if self.on:\n        y = self.q(x)\n    return self.k(x)": ("k",),
    "return self.q(x) if self.on else self.k(x)": (),
    "f = lambda: self.q(x)\n    return f()": (),
    "return [self.q(x) for _ in range(2)]": (),
    "return self.q(x) + self.q(x) + self.k(x)": ("k",),
    "return self.q(x).reshape(self.k.weight.shape) + self.k(x)": ("q",),
    "return self.q(x, 2) + self.k(x, mask=x) + self.v(cache)": (),
    "return self.on and self.q(x)": (),
}


@pytest.mark.parametrize(("text", "names"), METHODS.items())
def test_what_is_called_once_with_the_input_as_it_came(
    text: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of these, and of no others, may be computed before the method runs."""
    source = f"def __call__(self, x, cache=None):\n    {text}\n"
    monkeypatch.setattr(certify_module, "_parsed", lambda cls, call: parse(source))
    assert certify_module._inputs(type(text, (), {}), None) == names


def test_inputs_of_attentions() -> None:
    assert inputs(ministral3.Attention) == ("q_proj", "k_proj", "v_proj")
    assert inputs(muse_glimmer.Attention) == ("q_proj", "k_proj", "v_proj", "gate_proj")
    with pytest.raises(NotFusible, match="is not the class that its module has"):
        inputs(type("Other", (ministral3.Attention,), {}))


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
    assert certify(llama.MLP, "mlp").names["DOWN"] == "down_proj"
    assert refusal(llama.MLP, "attention") == "llama.MLP.__call__ is not a body that is known"
    assert "not a body" in refusal(nn.Linear, "mlp")
    monkeypatch.setattr(llama, "Louder", type("Louder", (llama.MLP,), {}), raising=False)
    llama.Louder.__module__ = llama.__name__
    assert "subclass" in refusal(llama.Louder, "mlp")
    monkeypatch.setattr(llama, "MLP", nn.Linear)
    assert "not the class" in refusal(type_of_mlp, "mlp")
    exec(compile(MLP.replace("swiglu(", "print("), "<text>", "exec"), scope := {})
    monkeypatch.setattr(type_of_mlp, "__call__", scope["__call__"])
    monkeypatch.setattr(llama, "MLP", type_of_mlp)
    assert refusal(type_of_mlp, "mlp") == "llama.MLP.__call__ has no source"


type_of_mlp = llama.MLP
