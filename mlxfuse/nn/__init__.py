"""What a module of a model becomes: layers of a GGUF file's weights, and patched modules.

* layers: ``quantized`` and ``experts`` over the file's bytes, ``cpu`` for MLX's CPU back-end;
  ``kv`` has the compressed caches;
* patched modules: ``attention``, ``mlp``, ``moe``, ``delta_net``, ``embedding`` and ``block``, on
  ``fused``; what they are made of: ``projection`` (linears together), ``rotation`` and ``norm``;
* what keeps them true and fast: ``snapshot`` (arrays that have changed) and ``kept_graph``.

Which modules are patched, and why others are not, is decided in ``fusion``.
"""
