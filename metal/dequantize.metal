// Rows of a quantised matrix as T.

// Unit `at` of the result, which is unit i of row `row`. Lanes have neighbouring units, so 16 weights
// of each go by way of the SIMD-group's `room`: then neighbouring lanes write neighbouring weights.
template <typename F, typename T, typename P>
METAL_FUNC void dequantize_unit(
    P p, device T* out, uint row, uint units, uint i, uint at, uint total,
    threadgroup vec<T, 4>* room, uint lane) {
  const F f(p, row * units, i);
  device vec<T, 4>* quads = (device vec<T, 4>*)out;
  UNROLL
  for (int h = 0; h < F::width / 16; h++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int q = 4 * h; q < 4 * h + 4; q++) {
      const float4 v = f.scale(h) * (f.quad(q) - float(F::offset));
      const float b = F::biased ? f.bias(h) : 0.0f;
      room[4 * lane + q % 4] = vec<T, 4>(F::biased ? v + b : v);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (uint n = lane; n < 128; n += 32) {
      const uint to = at - lane + n / 4;
      if (to < total) {
        quads[ulong(to) * (F::width / 4) + 4 * h + n % 4] = room[n];
      }
    }
  }
}
