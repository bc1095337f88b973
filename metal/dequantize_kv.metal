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
  for (int i = 0; i < 2 * At::each; i++) {
    const uint unit = At::unit(lane, i / 2);
    if (lane < uint(At::lanes) && unit < uint(At::units)) {
      *(device vec<T, 4>*)(to + 8 * unit + 4 * (i % 2)) =
          vec<T, 4>(float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]));
    }
  }
}
