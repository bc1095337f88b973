"""What a row of the table of architectures says, and what a file's configuration does.

Data only: neither mlx nor mlx-lm is imported. Tensor names are those of llama.cpp
(``gguf-py/gguf/constants.py``), module paths those of mlx-lm. Shapes are given by the names of
sizes (see `Config.sizes`), row-major.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .keys import Keys
from .rope import Rope


@dataclass(frozen=True, slots=True)
class Weight:
    """Where one GGUF tensor goes.

    module   path of the mlx-lm module, below ``model.layers.N.`` for a layer's tensor.
    shape    names of the sizes: one for a norm, two for a matrix, three for experts' matrices.
             Where a size is 0, in a layer or in the whole file, there is no such tensor.
    bias     ``no``, ``optional`` or ``required``: NAME.bias must not, may or must be there.
    optional a file may lack the tensor; mlx-lm's class is told so, or has no such module then.
    zero     where a file lacks the tensor the array keeps mlx-lm's zeros; it is ``optional``.
    bare     ``module`` is no layer that has a weight but an array of its own.
    heads    name of the size that counts the heads whose rotary rows may be stored in pairs.
    tiled    name of the size that counts the rows of a value head, if its last rows are those of
             value heads, which the file has tiled over the key heads and mlx-lm next to each other.
    dense    always dequantised.
    headed   a matrix for each head, by which mlx-lm's class multiplies, and by its transpose.
    suffix   what follows the tensor's name.
    float32  a bare array that stays in float32.
    log      the file has ``-exp(x)`` of what the model wants.
    offset   of a norm: what the file's weight has on top of mlx-lm's.
    """

    module: str
    shape: tuple[str, ...]
    bias: str = "no"
    heads: str = ""
    bare: bool = False
    dense: bool = False
    headed: bool = False
    tiled: str = ""
    suffix: str = ".weight"
    float32: bool = False
    log: bool = False
    offset: float = 0.0
    optional: bool = False
    zero: bool = False


Weights = Mapping[str, Weight]

OUTER: Weights = {
    "token_embd": Weight("model.embed_tokens", ("vocab", "embd")),
    "output_norm": Weight("model.norm", ("embd",)),
    "output": Weight("lm_head", ("vocab", "embd")),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One supported value of ``general.architecture``.

    name         as in the file.
    models       names of models of it that people look for.
    module       Python module with mlx-lm's ``Model`` and ``ModelArgs``.
    layer        tensors of one layer, named without ``blk.N.``.
    other_layers kind -> tensors of the layers that are of another kind (see `Config.kinds`).
    outer        tensors outside the layers.
    layers_at    path of the list of layers.
    attention_at path of a layer's attention below it, which has the rotary embedding.
    groups       name -> tensors with the same input, which a fused kernel reads as one weight.
    args         fields of mlx-lm's ``ModelArgs`` that every file of the architecture has alike.
    keys         field of ``ModelArgs`` -> the file's key and llama.cpp's default, whose type is
                 the key's.
    same         field of ``ModelArgs`` -> name of the size that it is.
    present      field of ``ModelArgs`` -> the tensor whose presence it tells.
    rope_layout  how the rotary rows of a head lie in the file and in mlx-lm's class:
                 ``halves``     components i and i + dims/2 belong together in both.
                 ``paired``     the file has 2i and 2i+1 next to each other, the converter's work;
                                they are taken apart into halves, the order mlx-lm rotates.
                 ``interleaved`` 2i and 2i+1 belong together in both (``traditional`` in MLX).
    yarn_log     llama.cpp reads the YaRN keys ``yarn_log_multiplier``, which is multiplied by this,
                 ``yarn_beta_fast`` and ``yarn_beta_slow`` of the architecture's files; 0 if not.
    rope_types   rotary scalings that are supported besides none.
    partial_rope part of a head may be rotated.
    layer_norm   norms subtract the mean (``nn.LayerNorm``); the epsilon has another key.
    float16      whether float16's range is known to hold its values: True, False where they are
                 known to leave it, or None.
    whole_experts each expert has the feed-forward length, whatever else the file says.
    gatings      values of ``expert_gating_func`` that mlx-lm's class computes, llama.cpp's default
                 first: 1 softmax, 2 sigmoid, 3 softmax over the chosen ones. Empty: not read.
    groups_too   experts may be chosen by groups.
    dense_too    files without experts are of it too, although its table has them.
    uneven       keys whose values may differ between layers.
    attention_free no layer has attention or an MLP of its own, and no positions are rotated.
    value_heads  heads of values may have another size than those of keys.
    latent       keys and values are made of a latent vector (MLA): a head's sizes have keys of
                 their own, and there is one key-value head in the cache.
    fixed_head   mlx-lm's class takes the head size from the width, and knows no other.
    may_tie      mlx-lm's class can use the embedding as its output head.
    configure    what the architecture's files say beside what all have alike.
    choose       another row for files that say the same name but need another class, or None.
    """

    name: str
    module: str
    layer: Weights
    groups: Mapping[str, tuple[str, ...]]
    models: str = ""
    other_layers: Mapping[str, Weights] = field(default_factory=dict)
    outer: Weights = field(default_factory=lambda: OUTER)
    layers_at: str = "model.layers"
    attention_at: str = "self_attn"
    args: Mapping[str, object] = field(default_factory=dict)
    keys: Mapping[str, tuple[str, float | int | str]] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    rope_layout: str = "halves"
    rope_types: tuple[str, ...] = ("linear", "yarn")
    yarn_log: float = 0.0
    partial_rope: bool = False
    layer_norm: bool = False
    float16: bool | None = None
    whole_experts: bool = False
    gatings: tuple[int, ...] = ()
    groups_too: bool = False
    dense_too: bool = False
    uneven: tuple[str, ...] = ()
    fixed_head: bool = False
    attention_free: bool = False
    value_heads: bool = False
    latent: bool = False
    may_tie: bool = True
    configure: Callable[[Keys, Config], Config] | None = None
    choose: Callable[[Keys], Architecture | None] | None = None

    @property
    def tables(self) -> tuple[Weights, ...]:
        """The tensors of its layers, kind by kind."""
        return (self.layer, *self.other_layers.values())

    @property
    def metal_dtype(self) -> str:
        """The type of its activations on Metal unless the caller says otherwise."""
        return "float16" if self.float16 else "bfloat16"

    @property
    def experts(self) -> bool:
        """Whether its layers have experts."""
        return any("ffn_gate_inp" in table for table in self.tables)


@dataclass(frozen=True, slots=True)
class Config:
    """What a file says about its model.

    layers    number of layers.
    sizes     name -> size, the names used in the architecture tables; and of each layer
              ``cache``   values that it keeps of each token,
              ``window``  tokens that it keeps them of, 0 if of all,
              ``state``   bytes that it keeps however many tokens there were.
    by_layer  for each layer, or empty: sizes that it has in place of those.
    args      fields of mlx-lm's ``ModelArgs``.
    rope      of the layers that see the whole context.
    ropes     for each layer, or empty if all have ``rope``: its own, None where positions are not
              rotated.
    tied      the output head is the embedding.
    kinds     for each layer, or empty: which of the architecture's ``other_layers`` it is, empty
              for its ``layer``.
    unread    tensors that a file may have and nothing reads.
    values    path of a parameter of the model -> its value, of those that no tensor has.
    ignored   blocks of the file after the layers, which predict tokens after the next one.
    """

    architecture: Architecture
    layers: int
    sizes: dict[str, int]
    args: dict[str, Any]
    rope: Rope
    tied: bool
    ropes: tuple[Rope | None, ...] = ()
    kinds: tuple[str, ...] = ()
    ignored: int = 0
    by_layer: tuple[Mapping[str, int], ...] = ()
    unread: frozenset[str] = frozenset()
    values: Mapping[str, float] = field(default_factory=dict)

    def sizes_of(self, layer: int) -> dict[str, int]:
        """The sizes of one layer."""
        return self.sizes | dict(self.by_layer[layer]) if self.by_layer else self.sizes

    def weights_of(self, layer: int) -> Weights:
        """The table that holds the tensors of one layer."""
        kind = self.kinds[layer] if self.kinds else ""
        return self.architecture.other_layers[kind] if kind else self.architecture.layer

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary embedding of one layer."""
        return self.ropes[layer] if self.ropes else self.rope
