// Shared by every kernel of mlxfuse. MLX's preamble (metal_stdlib, bfloat16_t) precedes it.
// Rules: C++14 plus `if constexpr`; ASCII only; inputs are template pointer types, because
// MLX binds an input of fewer than 8 elements in `constant` and any other in `device`.
