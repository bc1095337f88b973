// Rows of a quantised matrix as T.

// Unit i of row `row` as that of row `to` of the result, each of `units`.

template <typename F, typename T, typename P>
METAL_FUNC void dequantize_unit(P p, device T* out, uint row, uint units, uint i, uint to) {
  const F f(p, row * units, i);
  device T* y = out + (ulong(to) * units + i) * F::width;
  UNROLL
  for (int q = 0; q < F::width / 4; q++) {
    const int h = q >> 2;
    const float4 v = f.scale(h) * (f.quad(q) - float(F::offset));
    const float b = F::biased ? f.bias(h) : 0.0f;
    *(device vec<T, 4>*)(y + 4 * q) = vec<T, 4>(F::biased ? v + b : v);
  }
}
