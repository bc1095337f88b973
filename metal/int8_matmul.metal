// y = epilogue(x W^T) for rows x of int8 codes and W in a format whose weights are integers
// times scales. 32 weights and their activations are a group g, whose sum of products isum is
// exact in int32, and in float32 too, since |isum| < 2^24 for every format. Then
//
//   y = sum over g of scale[g] * x_scale[g] * isum[g] + bias[g] * x_sum[g]
//
// in float32: lane l of a SIMD-group adds groups l, l + 32, l + 64, ... in this order, each by
// one fma for the product and one for the bias; simd_sum adds the lanes. So an output has the
// same bits whatever the other rows of x and W are. The tiles add the groups in order instead.

template <typename C, typename S, typename M>
struct Int8Rows {
  C codes;
  S scales;
  M sums;
};
template <typename C, typename S, typename M>
METAL_FUNC Int8Rows<C, S, M> int8_rows(C codes, S scales, M sums) {
  return Int8Rows<C, S, M>{codes, scales, sums};
}

// 32 weights. Weight i is scale * times[i / 16] * code i + bias; `times` counts for F::halves.
struct Group {
  uint codes[8];
  int2 times;
  float scale;
  float bias;
};

// What F has as unsigned bytes with an offset, as signed bytes without.
template <typename F>
struct Signed {
  static uint word(const thread F& f, int q) {
    constexpr uint offset = 0x01010101u * uint(F::offset);
    return F::offset ? ((f.word(q) | 0x80808080u) - offset) ^ 0x80808080u : f.word(q);
  }
  static float bias(const thread F& f) {
    return f.bias(0);
  }
};

// The sum of products of 4 codes.
METAL_FUNC int dot4(uint w, uint x, int sum) {
  const int4 products = int4(as_type<char4>(w)) * int4(as_type<char4>(x));
  return sum + products.x + products.y + products.z + products.w;
}

// The one place that multiplies codes: isum of a group, for 8 words x of codes. Instructions
// that multiply int8 matrices take the same operands.
template <bool halves>
METAL_FUNC int dot32(const thread Group& w, const thread uint* x) {
  int2 sums = int2(0);
  UNROLL
  for (int q = 0; q < 8; q++) {
    sums[q >> 2] = dot4(w.codes[q], x[q], sums[q >> 2]);
  }
  return halves ? w.times.x * sums.x + w.times.y * sums.y : sums.x + sums.y;
}

template <bool biased>
METAL_FUNC float add_group(float sum, const thread Group& w, int isum, float scale, float x_sum) {
  sum = fma(w.scale * scale, float(isum), sum);
  return biased ? fma(w.bias, x_sum, sum) : sum;
}

// Words 0 to 7 of a group of x.
template <typename C>
METAL_FUNC void load_codes(C codes, ulong group, thread uint* x) {
  UNROLL
  for (int i = 0; i < 2; i++) {
    const uint4 four = elements<uint4>(codes)[2 * group + i];
    UNROLL
    for (int q = 0; q < 4; q++) {
      x[4 * i + q] = four[q];
    }
  }
}

//@ Affine8:
// Codes up to 255: 128 less is a signed byte, and 128 scales more are in the bias.
template <int units>
struct Signed<Unit<Packed<8>, AffineScales<units>>> {
  using F = Unit<Packed<8>, AffineScales<units>>;
  static uint word(const thread F& f, int q) {
    return f.word(q) ^ 0x80808080u;
  }
  static float bias(const thread F& f) {
    return fma(128.0f, f.scale(0), f.bias(0));
  }
};

//@ group:
// Group g of the row of W whose first group is `first`.
template <typename F, typename P>
METAL_FUNC void load_group(P p, uint first, uint g, thread Group& group) {
  constexpr int units = 32 / F::width;
  UNROLL
  for (int u = 0; u < units; u++) {
    const F f(p, units * first, units * g + u);
    UNROLL
    for (int q = 0; q < F::width / 4; q++) {
      group.codes[u * (F::width / 4) + q] = Signed<F>::word(f, q);
    }
    if constexpr (F::halves) {
      group.scale = f.scales.d;
      group.times = f.scales.times;
    } else {
      group.scale = f.scale(0);
      group.times = int2(1);
    }
    group.bias = Signed<F>::bias(f);
  }
}

//@ batch: group
// As for floats: `many` rows of x, those of the outputs from `to` on, by `slots` rows of a part, a
// lane one group at a time. Rows past the last are the last again.
template <typename F, int slots, int many, typename P, typename C, typename S, typename M>
METAL_FUNC float batch_dots(
    P p, Int8Rows<C, S, M> x, const device Size* size, Part a, uint n, uint to, uint lane) {
  const uint groups = size->columns / 32;
  ulong from[many];
  float sums[many * slots] = {0.0f};
  UNROLL
  for (int m = 0; m < many; m++) {
    from[m] = ulong(metal::min(to + m, size->rows - 1) / size->outputs) * groups;
  }
  for (uint g = lane; g < groups; g += 32) {
    Group w[slots];
    UNROLL
    for (int r = 0; r < slots; r++) {
      load_group<F>(p, (a.first + metal::min(n + r, a.rows - 1)) * groups, g, w[r]);
    }
    UNROLL
    for (int m = 0; m < many; m++) {
      uint codes[8];
      load_codes(x.codes, from[m] + g, codes);
      const float scale = x.scales[from[m] + g];
      const float x_sum = F::biased ? x.sums[from[m] + g] : 0.0f;
      UNROLL
      for (int r = 0; r < slots; r++) {
        const int isum = dot32<F::halves>(w[r], codes);
        thread float& sum = sums[m * slots + r];
        sum = add_group<F::biased>(sum, w[r], isum, scale, x_sum);
      }
    }
  }
  return sum_of_lane<many * slots>(sums, lane);
}

//@ batch_floor:
// The address floor of batch_dots: see quantized_matmul.metal.
template <typename F, int slots, int many, typename P, typename C, typename S, typename M>
METAL_FUNC float batch_dots(
    P p, Int8Rows<C, S, M> x, const device Size* size, Part a, uint n, uint to, uint lane) {
  constexpr int units = 32 / F::width;
  const uint groups = size->columns / 32;
  float sum = 0.0f;
  float sums[many] = {0.0f};
  for (uint g = lane; g < groups; g += 32) {
    UNROLL
    for (int r = 0; r < slots; r++) {
      const uint first = (a.first + metal::min(n + r, a.rows - 1)) * groups;
      UNROLL
      for (int u = 0; u < units; u++) {
        const F f(p, units * first, units * g + u);
        sum += u < units - 1 ? loaded_codes(f) : loaded(f);  // a group's scale is its last unit's
      }
    }
    UNROLL
    for (int m = 0; m < many; m++) {
      const ulong at = ulong(metal::min(to + m, size->rows - 1) / size->outputs) * groups + g;
      const uint4 a = elements<uint4>(x.codes)[2 * at];
      const uint4 b = elements<uint4>(x.codes)[2 * at + 1];
      const uint4 words = a ^ b;
      sums[m] += x.scales[at] + (F::biased ? x.sums[at] : 0.0f);
      sums[m] += float(words.x ^ words.y ^ words.z ^ words.w);
    }
  }
  UNROLL
  for (int m = 0; m < many; m++) {
    sums[m] += sum;
  }
  return sum_of_lane<many>(sums, lane / slots);
}

//@ gathered:
// For a batch_tile of one row of x, and the experts of quantized_matmul.metal, that precede.
template <
    typename F, typename G, int slots, int groups, int many, typename Y, typename X, typename P,
    typename Q>
METAL_FUNC void gathered_tile(
    P p, Q q, X x, const device Size* size, Y y, uint3 tile, uint group, uint lane) {
  choose(y, x, uint(x.experts[tile.y]));
  batch_tile<F, G, slots, groups, many>(p, q, x.x, size, y, tile, group, lane);
}

//@ tiles: group
// 32 rows of x by 64 rows of W (gated: 32 of the gate, 32 of up) for 128 threads, two groups at
// a time. Each thread decodes one group and computes 4 rows by 4 columns: me / 16 and me % 16,
// one each of 4.
constant constexpr uint int8_pitch = 17;
struct Int8Tile {
  uint x[32 * int8_pitch];
  uint w[64 * int8_pitch];
  float x_scale[64];
  float x_sum[64];
  float scale[128];
  float bias[128];
  short2 times[128];
};

template <typename F, typename G, typename Y, typename X, typename P, typename Q>
METAL_FUNC void int8_tile(
    P p, Q q, X x, const device Size* size, Y y, uint3 tile, uint group, uint me,
    threadgroup Int8Tile& held) {
  constexpr uint count = Y::gated ? 32 : 64;
  constexpr bool biased = F::biased || G::biased;
  const uint groups = size->columns / 32;
  const uint rows = size->rows;
  const uint to = tile.y * 32;
  const uint row = (tile.x - y.a.tile) * count;
  const uint u = me % 2;
  const uint n = me / 2;
  const uint yours = row + n % count;
  const uint ym = 4 * (me / 16);
  const uint yn = me % 16;
  float sums[4][4];
  UNROLL
  for (int i = 0; i < 4; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) {
      sums[i][j] = 0.0f;
    }
  }
  for (uint k = 0; k < groups; k += 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bool here = k + u < groups;
    if (me < 64) {
      uint codes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      const bool inside = here && to + n < rows;
      const ulong at = ulong(to + n) * groups + k + u;
      if (inside) {
        load_codes(x.codes, at, codes);
      }
      UNROLL
      for (int q = 0; q < 8; q++) {
        held.x[n * int8_pitch + 8 * u + q] = codes[q];
      }
      held.x_scale[me] = inside ? x.scales[at] : 0.0f;
      held.x_sum[me] = biased && inside ? x.sums[at] : 0.0f;
    }
    Group mine = {};
    if (here && yours < y.a.rows) {
      if (Y::gated && group >= 2) {
        load_group<G>(q, (y.b.first + yours) * groups, k + u, mine);
      } else {
        load_group<F>(p, (y.a.first + yours) * groups, k + u, mine);
      }
    }
    UNROLL
    for (int q = 0; q < 8; q++) {
      held.w[n * int8_pitch + 8 * u + q] = mine.codes[q];
    }
    held.scale[me] = mine.scale;
    held.bias[me] = mine.bias;
    held.times[me] = short2(mine.times);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint v = 0; v < 2; v++) {
      uint codes[4][8];
      UNROLL
      for (int i = 0; i < 4; i++) {
        UNROLL
        for (int q = 0; q < 8; q++) {
          codes[i][q] = held.x[(ym + i) * int8_pitch + 8 * v + q];
        }
      }
      UNROLL
      for (int j = 0; j < 4; j++) {
        const uint column = yn + 16 * j;
        Group w;
        UNROLL
        for (int q = 0; q < 8; q++) {
          w.codes[q] = held.w[column * int8_pitch + 8 * v + q];
        }
        w.times = int2(held.times[2 * column + v]);
        w.scale = held.scale[2 * column + v];
        w.bias = held.bias[2 * column + v];
        UNROLL
        for (int i = 0; i < 4; i++) {
          const uint at = 2 * (ym + i) + v;
          const int isum = dot32<F::halves || G::halves>(w, codes[i]);
          sums[i][j] = add_group<biased>(sums[i][j], w, isum, held.x_scale[at], held.x_sum[at]);
        }
      }
    }
  }
  UNROLL
  for (int i = 0; i < 4; i++) {
    UNROLL
    for (int j = 0; j < (Y::gated ? 2 : 4); j++) {
      const uint at = row + yn + 16 * j;
      if (to + ym + i < rows && at < y.a.rows) {
        put(y, sums[i][j], sums[i][(j + 2) % 4], at, to + ym + i);
      }
    }
  }
}
