// Rows of a quantised matrix as T.

// Unit `at` of the result, which is unit i of row `row`. Lanes have neighbouring units, so up to 16
// weights of each go by way of the SIMD-group's `room`: then neighbouring lanes write neighbouring
// weights. Where rows are `scaled`, each has a factor.
template <typename F, bool scaled, typename T, typename P, typename M>
METAL_FUNC void dequantize_unit(
    P p, M factors, device T* out, uint row, uint units, uint i, uint at, uint total,
    threadgroup vec<T, 4>* room, uint lane) {
  constexpr int most = F::width / 4 < 4 ? F::width / 4 : 4;  // quads of a unit at a time
  const F f(p, row * units, i);
  device vec<T, 4>* quads = (device vec<T, 4>*)out;
  UNROLL
  for (int first = 0; first < F::width / 4; first += most) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int q = first; q < first + most; q++) {
      const int h = q >> 2;
      float4 v = f.scale(h) * (f.quad(q) - float(F::offset));
      v = F::biased ? v + f.bias(h) : v;
      room[most * lane + q - first] = vec<T, 4>(scaled ? v * float(factors[row]) : v);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (uint n = lane; n < 32 * most; n += 32) {
      const uint to = at - lane + n / most;
      if (to < total) {
        quads[ulong(to) * (F::width / 4) + first + n % most] = room[n];
      }
    }
  }
}
