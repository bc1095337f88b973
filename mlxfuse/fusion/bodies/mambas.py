"""The methods of Mamba-2 mixers, and the norm behind their gate: see `bodies`."""

from __future__ import annotations

from .mlps import MX, NN, SWIGLU, Body

_CALL = """
def __call__(self, hidden_states, mask, cache=None):
    projected = self.in_proj(hidden_states)
    gate, conv_input, dt = mx.split(
        projected, [self.intermediate_size, self.intermediate_size + self.conv_dim], axis=-1
    )
    conv_output = self._conv(conv_input, cache, mask)
    hidden_states_ssm, B, C = mx.split(
        conv_output,
        [self.intermediate_size, self.intermediate_size + self.n_groups * self.ssm_state_size],
        axis=-1,
    )
    y = self._ssm(hidden_states_ssm, B, C, dt, cache, mask)
    if cache:
        cache.advance(y.shape[1])
    y = self.norm(y, gate)
    return self.out_proj(y)
"""
_NAMED = _CALL.replace("hidden_states_ssm", "hidden_states").replace(
    "dt, cache, mask)", "dt, cache, mask=mask)"
)
_CONV = """
def _conv(self, conv_input, cache, mask):
    if mask is not None:
        conv_input = mx.where(mask[..., None], conv_input, 0)
    if cache is not None:
        if cache[0] is None:
            conv_state = mx.zeros(
                (conv_input.shape[0], self.conv_kernel_size - 1, self.conv_dim),
                dtype=conv_input.dtype,
            )
        else:
            conv_state = cache[0]
        padded_input = mx.concatenate([conv_state, conv_input], axis=1)
        n_keep = self.conv_kernel_size - 1
        if cache.lengths is not None:
            t = padded_input.shape[1]
            ends = mx.clip(cache.lengths, 0, t - n_keep)
            positions = (ends[:, None] + mx.arange(n_keep))[..., None]
            cache[0] = mx.take_along_axis(padded_input, positions, axis=1)
        else:
            cache[0] = padded_input[:, -n_keep:, :]
    else:
        padded_input = mx.pad(conv_input, [(0, 0), (self.conv_kernel_size - 1, 0), (0, 0)])
    conv_output = self.conv1d(padded_input)
    return nn.silu(conv_output)
"""
_SHAPED = """
def _ssm(self, hidden_states, B, C, dt, cache, mask):
    batch_size, seq_len, _ = hidden_states.shape
    hidden_states = hidden_states.reshape(batch_size, seq_len, self.num_heads, self.head_dim)
    B = B.reshape(batch_size, seq_len, self.n_groups, self.ssm_state_size)
    C = C.reshape(batch_size, seq_len, self.n_groups, self.ssm_state_size)
"""
_KEPT = """
    if cache:
        cache[1] = state
    return y.reshape(batch_size, seq_len, self.intermediate_size)
"""
# nemotron_h
_STATE = """
    if cache:
        state = cache[1]
    else:
        state = None
    y, state = ssm_update(
        hidden_states, self.A_log, B, C, self.D.astype(hidden_states.dtype), dt, self.dt_bias,
        state, self.time_step_limit, mask,
    )
"""
# granitemoehybrid, and ours of nemotron_h
_LENGTHS = """
    if cache:
        state = cache[1]
        lengths = cache.lengths
    else:
        state, lengths = None, None
    y, state = ssm_update(
        hidden_states, self.A_log, B, C, self.D.astype(hidden_states.dtype), dt, self.dt_bias,
        state, self.time_step_limit, mask, lengths,
    )
"""
# mamba2
_AS_IT_IS = _LENGTHS.replace("self.D.astype(hidden_states.dtype)", "self.D")

_UPDATE = {"ssm_update": "mlx_lm.models.ssm.ssm_update"}
# Of a mixer's methods, those that are known.
MIXER: dict[str, tuple[Body, ...]] = {
    "__call__": (
        Body("mixer", _CALL, MX),
        Body("mixer", _NAMED, MX),
    ),
    "_conv": (Body("mixer", _CONV, MX | NN),),
    "_ssm": tuple(
        Body("mixer", _SHAPED + text + _KEPT, _UPDATE) for text in (_STATE, _LENGTHS, _AS_IT_IS)
    ),
}
MAMBAS: tuple[Body, ...] = (
    # nemotron_h
    Body(
        "group_norm",
        """
def __call__(self, x, gate=None):
    if gate is not None:
        x = swiglu(gate, x)
    x = mx.unflatten(x, axis=-1, shape=(-1, self.SIZE))
    x = mx.fast.rms_norm(x, weight=None, eps=self.EPS)
    return self.weight * x.flatten(-2)
""",
        MX | SWIGLU,
    ),
    # granitemoehybrid, mamba2
    Body(
        "group_norm",
        """
def __call__(self, hidden_states, gate=None):
    if gate is not None:
        hidden_states = swiglu(gate, hidden_states)
    return mx.fast.rms_norm(hidden_states, self.weight, self.EPS)
""",
        MX | SWIGLU,
    ),
)
