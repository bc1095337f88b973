// Keys and values as packed rows: a SIMD-group for each token of a head. The arithmetic of
// `quantize_kv`; the first lanes hold the token, the others the same once more. The rows of a
// threadgroup are put together in its memory, so that they are stored in whole pieces.

template <int dim, int block, typename T>
METAL_FUNC void load_token(const device T* from, thread float* x, uint lane) {
  typedef Spread<dim> At;
  UNROLL
  for (int j = 0; j < At::each; j++) {
    const uint unit = At::unit(lane, j);
    UNROLL
    for (int i = 0; i < 2; i++) {
      float4 four = float4(0.0f);
      if (unit < uint(At::units)) {
        four = float4(*(const device vec<T, 4>*)(from + 8 * unit + 4 * i));
      }
      UNROLL
      for (int e = 0; e < 4; e++) {
        x[8 * j + 4 * i + e] = four[e];
      }
    }
  }
  hadamard<dim, block>(x, lane);
}

// A side that is not quantised.
template <typename S, int dim, int block>
struct Values {
  template <typename T>
  static METAL_FUNC void write(
      const device T* from, threadgroup uint* codes, threadgroup uint* scales, uint lane) {
    typedef Spread<dim> At;
    float x[8 * At::each];
    load_token<dim, block>(from, x, lane);
    UNROLL
    for (int j = 0; j < At::each; j++) {
      const uint unit = At::unit(lane, j);
      if (lane < uint(At::lanes) && unit < uint(At::units)) {
        UNROLL
        for (int e = 0; e < 8; e++) {
          ((threadgroup S*)codes)[8 * unit + e] = static_cast<S>(x[8 * j + e]);
        }
      }
    }
  }
};

template <typename S, int dim, int block, int bits, int group, bool symmetric>
struct Quantized {
  typedef Spread<dim> At;
  static constexpr constant bool whole = group == dim;
  // Lanes of a group; a group of all units also joins those of one lane.
  static constexpr constant int lanes = whole ? At::lanes : group / 8;

  // The least and the largest of the values in a lane's unit j, or of all its units.
  static METAL_FUNC float2 range(const thread float* x, int j, uint lane) {
    float2 found = float2(INFINITY, -INFINITY);
    UNROLL
    for (int i = 0; i < 8 * At::each; i++) {
      const bool here = At::unit(lane, i / 8) < uint(At::units);
      if (here && (whole || i / 8 == j)) {
        found = float2(metal::min(found.x, x[i]), metal::max(found.y, x[i]));
      }
    }
    UNROLL
    for (int bit = 1; bit < lanes; bit *= 2) {
      found.x = metal::min(found.x, simd_shuffle_xor(found.x, ushort(bit)));
      found.y = metal::max(found.y, simd_shuffle_xor(found.y, ushort(bit)));
    }
    return found;
  }

  template <typename T>
  static METAL_FUNC void write(
      const device T* from, threadgroup uint* codes, threadgroup uint* scales, uint lane) {
    constexpr int least = symmetric ? 1 : 0;
    constexpr int most = (1 << bits) - 1;
    constexpr int zero = symmetric ? 1 << (bits - 1) : 0;
    constexpr float steps = 1.0f / (symmetric ? zero - 1 : most);
    constexpr int numbers = dim / group * (symmetric ? 1 : 2);
    float x[8 * At::each];
    load_token<dim, block>(from, x, lane);
    UNROLL
    for (int j = 0; j < At::each; j++) {
      const float2 found = range(x, j, lane);
      const S scale = static_cast<S>(
          (symmetric ? metal::max(metal::abs(found.x), metal::abs(found.y)) : found.y - found.x) *
          steps);
      const S bias = static_cast<S>(symmetric ? 0.0f : found.x);
      const float inverse = float(scale) > 1e-30f ? 1.0f / float(scale) : 0.0f;
      uint words[2] = {0, 0};
      UNROLL
      for (int e = 0; e < 8; e++) {
        const float code = metal::rint((x[8 * j + e] - float(bias)) * inverse) + float(zero);
        const uint c = uint(metal::clamp(code, float(least), float(most)));
        words[e * bits / 32] |= c << (e * bits % 32);
      }
      const uint unit = At::unit(lane, j);
      if (lane < uint(At::lanes) && unit < uint(At::units)) {
        UNROLL
        for (int i = 0; i < bits / 4; i++) {
          codes[unit * (bits / 4) + i] = words[i];
        }
        const uint g = unit * 8 / group;
        if (unit * 8 % group == 0) {
          threadgroup S* to = (threadgroup S*)scales;
          to[symmetric ? g : 2 * g] = scale;
          if (!symmetric) {
            to[2 * g + 1] = bias;
          }
          if (numbers * sizeof(S) % 4 && g == dim / group - 1) {
            to[numbers] = S(0);
          }
        }
      }
    }
  }
};

// The rows of the threadgroup's tokens, from `first` on, as far as there are any.
template <int row_words, int each>
METAL_FUNC void store_rows(
    const threadgroup uint* from, device uint* rows, uint first, uint tokens, uint me) {
  const uint many = metal::min(uint(each), tokens - first);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = me; i < many * row_words; i += 32 * many) {
    rows[ulong(first) * row_words + i] = from[i];
  }
}
