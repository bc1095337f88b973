"""The `__call__` bodies of decoder layers that norm or multiply what their halves give: see
`bodies`.
"""

from __future__ import annotations

from .mlps import Body

_CALL = "def __call__(self, x, mask=None, cache=None):"
# gemma2
_FOUR = f"""
{_CALL}
    r = self.ATTENTION(self.NORM1(x), mask, cache)
    h = x + self.POST1(r)
    r = self.MLP(self.NORM2(h))
    return h + self.POST2(r)
"""
# gemma3_text
_CLIPPED = _FOUR.replace("x + self.POST1(r)", "clip_residual(x, self.POST1(r))").replace(
    "h + self.POST2(r)", "clip_residual(h, self.POST2(r))"
)
# glm4
_AT_ONCE = f"""
{_CALL}
    x = x + self.POST1(self.ATTENTION(self.NORM1(x), mask, cache))
    residual = x
    x = self.POST2(self.MLP(self.NORM2(x))) + residual
    return x
"""
# afmoe
_REASSIGNED = f"""
{_CALL}
    r = self.ATTENTION(self.NORM1(x), mask, cache)
    r = self.POST1(r)
    h = x + r
    r = self.MLP(self.NORM2(h))
    r = self.POST2(r)
    return h + r
"""
# muse_glimmer
_STEPS = f"""
{_CALL}
    residual = x
    h = self.NORM1(x)
    h = self.ATTENTION(h, mask, cache)
    h = self.POST1(h)
    h = residual + h
    residual = h
    h = self.NORM2(h)
    h = self.MLP(h)
    h = self.POST2(h)
    return residual + h
"""
# olmo2, olmo3
_AFTER = f"""
{_CALL}
    r = self.POST1(self.ATTENTION(x, mask, cache))
    h = x + r
    r = self.POST2(self.MLP(h))
    return h + r
"""
# exaone4
_AFTER_ADDED = f"""
{_CALL}
    r = self.ATTENTION(x, mask, cache)
    h = x + self.POST1(r)
    r = self.MLP(h)
    return h + self.POST2(r)
"""
# granite, granitemoe
_MULTIPLIED = f"""
{_CALL}
    r = self.ATTENTION(self.NORM1(x), mask, cache)
    h = x + r * self.FACTOR
    r = self.MLP(self.NORM2(h))
    return h + r * self.FACTOR
"""
# minicpm, minicpm3
_BY_DEPTH = _MULTIPLIED.replace("self.FACTOR", "(self.FACTOR / self.PARTS**0.5)")

LAYERS: tuple[Body, ...] = (
    *(Body("post_norm", text) for text in (_FOUR, _AT_ONCE, _REASSIGNED, _STEPS)),
    *(Body("post_norm", text) for text in (_AFTER, _AFTER_ADDED)),
    *(Body("post_norm", text) for text in (_MULTIPLIED, _BY_DEPTH)),
    Body(
        "post_norm",
        _CLIPPED,
        {"clip_residual": "mlx_lm.models.gemma3_text.clip_residual"},
        {"clips": True},
    ),
)
