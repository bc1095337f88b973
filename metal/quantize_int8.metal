// Groups of 32 values as int8 codes with their scale and sum: ggml's Q8_1 with float32 scales.
// Eight neighbouring lanes of a SIMD-group hold a group, four values each.

template <typename V>
METAL_FUNC V group_sum(V v) {
  v += simd_shuffle_xor(v, ushort(1));
  v += simd_shuffle_xor(v, ushort(2));
  return v + simd_shuffle_xor(v, ushort(4));
}

//@ codes:
// Lanes that are not `inside` take part in the exchange with zeros and write nothing.
template <typename T>
METAL_FUNC void quantize_quad(
    vec<T, 4> v, ulong at, bool inside, device int8_t* codes, device float* scales,
    device float* sums) {
  const float4 x = float4(v);
  // The bits of a NaN are the largest: it becomes the scale, where max() would drop it.
  uint largest = 0;
  UNROLL
  for (int e = 0; e < 4; e++) {
    largest = metal::max(largest, as_type<uint>(x[e]) & 0x7fffffffu);
  }
  largest = metal::max(largest, simd_shuffle_xor(largest, ushort(1)));
  largest = metal::max(largest, simd_shuffle_xor(largest, ushort(2)));
  largest = metal::max(largest, simd_shuffle_xor(largest, ushort(4)));
  const float exact = as_type<float>(largest) / 127.0f;
  // GPUs flush denormals, by which one could not divide.
  const float scale = exact < 1.17549435e-38f ? 0.0f : exact;
  char4 code = char4(0);
  if (scale > 0.0f && largest < 0x7f800000u) {
    UNROLL
    for (int e = 0; e < 4; e++) {
      code[e] = char(metal::round(x[e] / scale));
    }
  }
  const int sum = group_sum(int(code[0]) + int(code[1]) + int(code[2]) + int(code[3]));
  if (inside) {
    *(device char4*)(codes + at) = code;
    if (at % 32 == 0) {
      scales[at / 32] = scale;
      sums[at / 32] = scale * float(sum);
    }
  }
}
