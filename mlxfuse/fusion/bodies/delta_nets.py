"""The `__call__` bodies of gated delta nets: see `bodies`.

The norm behind the recurrence is a module with a body of its own.
"""

from __future__ import annotations

from .mlps import MX, NN, Body

_CONVOLUTION = """
    if cache is not None and cache[0] is not None:
        conv_state = cache[0]
    else:
        conv_state = mx.zeros(
            (B, self.conv_kernel_size - 1, self.conv_dim),
            dtype=inputs.dtype,
        )
"""
_RECURRENCE = """
    if cache is not None:
        n_keep = self.conv_kernel_size - 1
        if cache.lengths is not None:
            ends = mx.clip(cache.lengths, 0, S)
            positions = (ends[:, None] + mx.arange(n_keep))[..., None]
            cache[0] = mx.take_along_axis(conv_input, positions, axis=1)
        else:
            cache[0] = mx.contiguous(conv_input[:, -n_keep:, :])
    conv_out = nn.silu(self.conv1d(conv_input))
    q, k, v = [
        t.reshape(B, S, h, d)
        for t, h, d in zip(
            mx.split(conv_out, [self.key_dim, 2 * self.key_dim], -1),
            [self.num_k_heads, self.num_k_heads, self.num_v_heads],
            [self.head_k_dim, self.head_k_dim, self.head_v_dim],
        )
    ]
    state = cache[1] if cache else None
    q, k = normalize_qk(q, k, inv_scale=self.head_k_dim**-0.5, eps=1e-6)
    out, state = gated_delta_update(
        q, k, v, a, b, self.A_log, self.dt_bias, state, mask, use_kernel=not self.training
    )
    if cache is not None:
        cache[1] = state
        cache.advance(S)
    out = self.norm(out, z)
"""
_QWEN3_5 = (
    """
def __call__(self, inputs, mask=None, cache=None):
    B, S, _ = inputs.shape
    if self.sharding_group is not None:
        inputs = sum_gradients(self.sharding_group)(inputs)
    qkv = self.QKV(inputs)
    z = self.Z(inputs).reshape(B, S, self.num_v_heads, self.head_v_dim)
    b = self.B(inputs)
    a = self.A(inputs)
"""
    + _CONVOLUTION
    + """
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    conv_input = mx.concatenate([conv_state, qkv], axis=1)
"""
    + _RECURRENCE
    + """
    out = self.OUT(out.reshape(B, S, -1))
    if self.sharding_group is not None:
        out = mx.distributed.all_sum(out, group=self.sharding_group)
    return out
"""
)
_QWEN3_NEXT = (
    """
def __call__(self, inputs, mask=None, cache=None):
    B, S, _ = inputs.shape
    q, k, v, z, b, a = self.fix_query_key_value_ordering(self.QKVZ(inputs), self.BA(inputs))
"""
    + _CONVOLUTION
    + """
    mixed_qkv = mx.concatenate(
        [q.reshape(B, S, -1), k.reshape(B, S, -1), v.reshape(B, S, -1)], axis=-1
    )
    if mask is not None:
        mixed_qkv = mx.where(mask[..., None], mixed_qkv, 0)
    conv_input = mx.concatenate([conv_state, mixed_qkv], axis=1)
"""
    + _RECURRENCE
    + """
    return self.OUT(out.reshape(B, S, -1))
"""
)

_GATED_NORM = """
def __call__(self, hidden_states, gate=None):
    x = mx.fast.rms_norm(hidden_states, self.WEIGHT, self.EPS)
    if gate is not None:
        return precise_swiglu(hidden_states, gate, x)
    else:
        return x.astype(hidden_states.dtype)
"""
# mlxfuse's own, from value heads that are neighbours to tiled ones
_TILING_NORM = """
def __call__(self, hidden_states, gate):
    x = mx.fast.rms_norm(hidden_states, self.WEIGHT, self.EPS)
    x = mx.unflatten(x, 2, (self.KEY_HEADS, -1)).swapaxes(2, 3)
    y: mx.array = precise_swiglu(hidden_states, gate.reshape(x.shape), x)
    return y.reshape(gate.shape)
"""
_NAMES = {
    **MX,
    **NN,
    "normalize_qk": "mlx_lm.models.gated_delta.normalize_qk",
    "gated_delta_update": "mlx_lm.models.gated_delta.gated_delta_update",
}
_NORM_NAMES = {**MX, "precise_swiglu": "mlx_lm.models.activations.precise_swiglu"}

DELTA_NETS: tuple[Body, ...] = (
    Body("delta_net", _QWEN3_5, _NAMES, {"linears": ("QKV", "Z", "B", "A")}),
    Body("delta_net", _QWEN3_NEXT, _NAMES, {"linears": ("QKVZ", "BA")}),
    Body("gated_norm", _GATED_NORM, _NORM_NAMES, {"tiled": False}),
    Body("gated_norm", _TILING_NORM, _NORM_NAMES, {"tiled": True}),
)
