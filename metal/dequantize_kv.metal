// Packed rows as keys and values: a SIMD-group for each token of a head.

template <typename F, int dim, int block, typename T>
METAL_FUNC void dequantize_side(const device uint* row, device T* to, uint lane) {
  typedef Spread<dim> At;
  float x[8 * At::each];
  UNROLL
  for (int j = 0; j < At::each; j++) {
    const uint unit = metal::min(At::unit(lane, j), uint(At::units - 1));
    F::load(row, unit, x + 8 * j);
    if constexpr (F::scaled) {
      const float2 scale = F::scale(row, unit);
      UNROLL
      for (int e = 0; e < 8; e++) {
        x[8 * j + e] = fma(scale.x, x[8 * j + e], scale.y);
      }
    }
  }
  hadamard<dim, block>(x, lane);
  UNROLL
  for (int j = 0; j < At::each; j++) {
    write_unit<At>(to, x + 8 * j, j, lane < uint(At::lanes), lane);
  }
}
