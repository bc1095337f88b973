// RMSNorm of groups of a row's values, each group in the registers of one threadgroup as in
// rms_norm.metal, after their product with the SiLU of a gate.

template <typename T, int pieces, bool whole, typename P>
METAL_FUNC void gate_row(P gate, Row row, thread vec<T, 4>* v) {
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const float4 z = float4(load_quad<T, whole>(gate, row.first, quad_of(row, p), row.columns));
    v[p] = vec<T, 4>(float4(v[p]) * (z / (1.0f + metal::precise::exp(-z))));
  }
}

// `sizes` holds the values of a group and the groups of a row.
template <
    typename T, int pieces, bool whole, typename X, typename G, typename W, typename S, typename N>
METAL_FUNC void gated_norm(
    X x, G gate, W weight, S sizes, N numbers, uint at, uint groups, uint group, uint lane,
    threadgroup float* partial, device T* y) {
  const uint columns = uint(sizes[0]);
  const Row row = {columns, groups, group, lane, ulong(at) * columns};
  vec<T, 4> v[pieces];
  load_row<T, pieces, whole>(x, row, v);
  gate_row<T, pieces, whole>(gate, row, v);
  const float inverse = inverse_rms<T, pieces>(v, row, numbers[0], partial);
  const uint first = at % uint(sizes[1]) * columns;
  weight_row<T, pieces, whole>(weight + first, 0.0f, row, inverse, v);
  store_row<T, pieces, whole>(v, row, y);
}
