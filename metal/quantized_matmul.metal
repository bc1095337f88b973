// y = epilogue(x W^T) for W in any format of formats.h; float32 accumulation.
//
// W is one or more parts (row ranges: q, k and v; gate and up), each in one set of streams.
// `size` holds K, the rows of x, the rows of x before the next one is
// used (experts: outputs for each row of x; else 1), then six numbers for each part: its first
// row in its streams, its rows, its first tile in the grid, its first column in its output, the
// columns of that output and its first column in the bias.

struct Part {
  uint first;
  uint rows;
  uint tile;
  uint column;
  uint stride;
  uint bias;
};

template <typename S>
METAL_FUNC Part part_of(S size, uint j) {
  const uint at = 6 * j + 3;
  return Part{uint(size[at]),     uint(size[at + 1]), uint(size[at + 2]),
              uint(size[at + 3]), uint(size[at + 4]), uint(size[at + 5])};
}

// Epilogue<A, bias, residual, T>: A is None or an activation of the sections below.
template <typename A, bool biased, bool residual>
struct Epilogue {
  typedef A Activation;
  template <typename B>
  static float add_bias(float v, B bias, uint at) {
    return biased ? v + float(bias[at]) : v;
  }
  template <typename T, typename R>
  static T finish(float v, R added, ulong at) {
    return static_cast<T>(residual ? v + float(added[at]) : v);
  }
};

struct None {
  static constexpr constant bool gated = false;
  static float apply(float v) {
    return v;
  }
};

//@ Silu:
struct Silu {
  static constexpr constant bool gated = false;
  static float apply(float v) {
    return v / (1.0f + metal::precise::exp(-v));
  }
};

//@ Relu2:
struct Relu2 {
  static constexpr constant bool gated = false;
  static float apply(float v) {
    const float r = metal::max(v, 0.0f);
    return r * r;
  }
};

//@ GeluTanh:
struct GeluTanh {
  static constexpr constant bool gated = false;
  static float apply(float v) {
    // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)), which does not cancel for negative v.
    const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
    return v / (1.0f + metal::precise::exp(-2.0f * u));
  }
};

//@ Gelu:
// 0.5 v (1 + erf(v / sqrt(2))) by Abramowitz and Stegun 7.1.26, |error of erf| <= 1.5e-7.
struct Gelu {
  static constexpr constant bool gated = false;
  static float apply(float v) {
    const float z = metal::abs(v) * 0.7071067811865476f;
    const float t = 1.0f / fma(0.3275911f, z, 1.0f);
    float p = fma(t, 1.061405429f, -1.453152027f);
    p = fma(t, p, 1.421413741f);
    p = fma(t, p, -0.284496736f);
    p = fma(t, p, 0.254829592f);
    const float complement = t * p * metal::precise::exp(-z * z);
    return 0.5f * v * (v < 0.0f ? complement : 2.0f - complement);
  }
};

//@ Gated:
// act(gate) * up; the first half of a tile's rows are rows of the gate.
template <typename A>
struct Gated {
  static constexpr constant bool gated = true;
  static float apply(float v) {
    return A::apply(v);
  }
};

//@ rows:
// Row of W that slot r of `slots` computes for output row `row`; gate and up share a tile.
template <bool gated>
METAL_FUNC uint weight_row(Part a, Part b, uint row, uint r, uint slots) {
  if (gated) {
    return r < slots / 2 ? a.first + row + r : b.first + row + r - slots / 2;
  }
  return a.first + row + r;
}

// Lane r of the SIMD-group holds the sum of slot r, all of them inside W; writes the outputs of
// one row of x.
template <typename E, int slots, typename T, typename B, typename R>
METAL_FUNC void write_rows(
    float sum, Part a, Part b, uint row, uint to, uint lane, B bias, R added, device T* out) {
  constexpr bool gated = E::Activation::gated;
  constexpr uint count = gated ? slots / 2 : slots;
  float up = 0.0f;
  if (gated) {
    up = simd_shuffle_down(sum, ushort(slots / 2));
  }
  if (lane < count) {
    const uint n = row + lane;
    float v = E::Activation::apply(E::add_bias(sum, bias, a.bias + n));
    if (gated) {
      v *= E::add_bias(up, bias, b.bias + n);
    }
    const ulong at = ulong(to) * a.stride + a.column + n;
    out[at] = E::template finish<T>(v, added, at);
  }
}

//@ vector: rows
// One row of x. Each SIMD-group computes `slots` rows of W, each lane one unit at a time.
template <typename F, int slots, typename T, typename P>
METAL_FUNC void vector_dots(
    P p, const device T* x, const thread uint* first, uint units, uint lane, thread float* sums) {
  UNROLL
  for (int r = 0; r < slots; r++) {
    sums[r] = 0.0f;
  }
  for (uint base = 0; base < units; base += 32) {
    const uint i = base + lane;
    if (i < units) {
      float v[F::width];
      float total[2] = {0.0f, 0.0f};
      const device vec<T, 4>* quads = (const device vec<T, 4>*)(x + i * F::width);
      UNROLL
      for (int q = 0; q < F::width / 4; q++) {
        const float4 quad = float4(quads[q]);
        UNROLL
        for (int e = 0; e < 4; e++) {
          total[q >> 2] += quad[e];
          v[4 * q + e] = quad[e] * (1.0f / float(1u << F::shift(4 * q + e)));
        }
      }
      UNROLL
      for (int r = 0; r < slots; r++) {
        const F f(p, first[r], i);
        float part[2] = {0.0f, 0.0f};
        UNROLL
        for (int e = 0; e < F::width; e++) {
          part[e >> 4] = fma(f.code(e), v[e], part[e >> 4]);
        }
        if (F::halves) {
          UNROLL
          for (int h = 0; h < 2; h++) {
            sums[r] = fma(f.scale(h), fma(-float(F::offset), total[h], part[h]), sums[r]);
            if (F::biased) {
              sums[r] = fma(f.bias(h), total[h], sums[r]);
            }
          }
        } else {
          const float t = total[0] + total[1];
          const float s = part[0] + part[1];
          sums[r] = fma(f.scale(0), F::offset ? fma(-float(F::offset), t, s) : s, sums[r]);
          if (F::biased) {
            sums[r] = fma(f.bias(0), t, sums[r]);
          }
        }
      }
    }
  }
}

template <typename F, typename E, int slots, typename T, typename P, typename B, typename R>
METAL_FUNC void vector_slots(
    P p, const device T* x, Part a, Part b, uint row, uint units, uint skip, uint to, uint lane,
    B bias, R added, device T* out) {
  uint first[slots];
  UNROLL
  for (int r = 0; r < slots; r++) {
    first[r] = (skip + weight_row<E::Activation::gated>(a, b, row, r, slots)) * units;
  }
  float sums[slots];
  vector_dots<F, slots>(p, x, first, units, lane, sums);
  float mine = 0.0f;
  UNROLL
  for (int r = 0; r < slots; r++) {
    const float sum = simd_sum(sums[r]);
    mine = lane == uint(r) ? sum : mine;
  }
  write_rows<E, slots>(mine, a, b, row, to, lane, bias, added, out);
}

// `skip` rows of W precede the ones to use: those of the experts before the chosen one.
template <typename F, typename E, typename T, typename P, typename S, typename B, typename R>
METAL_FUNC void vector_tile(
    P p, const device T* x, S size, Part a, Part b, uint skip, uint3 tile, uint group, uint lane,
    B bias, R added, device T* out) {
  constexpr uint slots = 4;
  constexpr uint least = E::Activation::gated ? 2 : 1;
  constexpr uint count = E::Activation::gated ? slots / 2 : slots;
  const uint units = uint(size[0]) / F::width;
  const device T* from = x + ulong(tile.y / uint(size[2])) * units * F::width;
  const uint row = ((tile.x - a.tile) * 2 + group) * count;
  if (row + count <= a.rows) {
    vector_slots<F, E, slots>(
        p, from, a, b, row, units, skip, tile.y, lane, bias, added, out);
  } else {
    for (uint n = row; n < a.rows; n++) {
      vector_slots<F, E, least>(p, from, a, b, n, units, skip, tile.y, lane, bias, added, out);
    }
  }
}

//@ batch: rows
// `many` rows of x at a time: a unit of W is decoded once for all of them.
template <typename F, typename E, int slots, int many, typename T, typename P, typename B,
          typename R>
METAL_FUNC void batch_slots(
    P p, const device T* x, Part a, Part b, uint row, uint units, uint to, uint rows, uint lane,
    B bias, R added, device T* out) {
  uint first[slots];
  UNROLL
  for (int r = 0; r < slots; r++) {
    first[r] = weight_row<E::Activation::gated>(a, b, row, r, slots) * units;
  }
  ulong from[many];
  UNROLL
  for (int m = 0; m < many; m++) {
    from[m] = ulong(metal::min(to + m, rows - 1)) * units * F::width;
  }
  float sums[slots][many];
  UNROLL
  for (int r = 0; r < slots; r++) {
    UNROLL
    for (int m = 0; m < many; m++) {
      sums[r][m] = 0.0f;
    }
  }
  for (uint base = 0; base < units; base += 32) {
    const uint i = base + lane;
    if (i < units) {
      float4 w[slots][F::width / 4];
      UNROLL
      for (int r = 0; r < slots; r++) {
        const F f(p, first[r], i);
        UNROLL
        for (int q = 0; q < F::width / 4; q++) {
          w[r][q] = f.scale(q >> 2) * (f.quad(q) - float(F::offset));
          if (F::biased) {
            w[r][q] += f.bias(q >> 2);
          }
        }
      }
      UNROLL
      for (int m = 0; m < many; m++) {
        const device vec<T, 4>* quads = (const device vec<T, 4>*)(x + from[m] + i * F::width);
        UNROLL
        for (int q = 0; q < F::width / 4; q++) {
          const float4 v = float4(quads[q]);
          UNROLL
          for (int r = 0; r < slots; r++) {
            UNROLL
            for (int e = 0; e < 4; e++) {
              sums[r][m] = fma(w[r][q][e], v[e], sums[r][m]);
            }
          }
        }
      }
    }
  }
  UNROLL
  for (int m = 0; m < many; m++) {
    float mine = 0.0f;
    UNROLL
    for (int r = 0; r < slots; r++) {
      const float sum = simd_sum(sums[r][m]);
      mine = lane == uint(r) ? sum : mine;
    }
    if (to + m < rows) {
      write_rows<E, slots>(mine, a, b, row, to + m, lane, bias, added, out);
    }
  }
}

template <typename F, typename E, int many, typename T, typename P, typename S, typename B,
          typename R>
METAL_FUNC void batch_tile(
    P p, const device T* x, S size, Part a, Part b, uint3 tile, uint group, uint lane, B bias,
    R added, device T* out) {
  constexpr uint slots = 2;
  constexpr uint least = E::Activation::gated ? 2 : 1;
  constexpr uint count = E::Activation::gated ? slots / 2 : slots;
  const uint units = uint(size[0]) / F::width;
  const uint rows = uint(size[1]);
  const uint row = ((tile.x - a.tile) * 2 + group) * count;
  const uint to = tile.y * many;
  if (row + count <= a.rows) {
    batch_slots<F, E, slots, many>(
        p, x, a, b, row, units, to, rows, lane, bias, added, out);
  } else if (row < a.rows) {
    batch_slots<F, E, least, many>(p, x, a, b, row, units, to, rows, lane, bias, added, out);
  }
}

//@ tiles: rows
// 32 rows of x by 64 rows of W (gated: 32 of the gate, 32 of up) for 4 SIMD-groups, K in steps
// of 64. Each thread decodes the 32 weights of one row of the tile.
constant constexpr int tile_pitch = 72;

template <typename F, typename E, typename T, typename P, typename S, typename B, typename R>
METAL_FUNC void matrix_tile(
    P p, const device T* x, S size, Part a, Part b, uint3 tile, uint me, uint group, B bias,
    R added, device T* out, threadgroup float* scratch) {
  constexpr bool gated = E::Activation::gated;
  constexpr uint count = gated ? 32 : 64;
  const uint columns = uint(size[0]);
  const uint units = columns / F::width;
  const uint rows = uint(size[1]);
  const uint to = tile.y * 32;
  const uint row = (tile.x - a.tile) * count;
  threadgroup T* xs = (threadgroup T*)scratch;
  threadgroup T* ws = xs + 32 * tile_pitch;
  const uint m = me / 4;
  const uint from = 16 * (me % 4);
  const uint n = me / 2;
  const uint at = 32 * (me % 2);
  const bool x_inside = to + m < rows;
  const bool w_inside = row + n % count < a.rows;
  const uint first = weight_row<gated>(a, b, row, n, 64) * units;
  const uint sm = 16 * (group / 2);
  const uint sn = 32 * (group % 2);
  simdgroup_matrix<float, 8, 8> sums[2][4];
  UNROLL
  for (int i = 0; i < 2; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) {
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  for (uint k = 0; k < columns; k += 64) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup vec<T, 4>* px = (threadgroup vec<T, 4>*)(xs + m * tile_pitch + from);
    const bool x_here = x_inside && k + from < columns;
    UNROLL
    for (int q = 0; q < 4; q++) {
      px[q] = x_here ? *(const device vec<T, 4>*)(x + ulong(to + m) * columns + k + from + 4 * q)
                     : vec<T, 4>(T(0));
    }
    threadgroup vec<T, 4>* pw = (threadgroup vec<T, 4>*)(ws + n * tile_pitch + at);
    UNROLL
    for (int u = 0; u < 32 / F::width; u++) {
      if (w_inside && k + at < columns) {
        const F f(p, first, (k + at) / F::width + u);
        UNROLL
        for (int q = 0; q < F::width / 4; q++) {
          float4 v = f.scale(q >> 2) * (f.quad(q) - float(F::offset));
          if (F::biased) {
            v += f.bias(q >> 2);
          }
          pw[u * (F::width / 4) + q] = vec<T, 4>(v);
        }
      } else {
        UNROLL
        for (int q = 0; q < F::width / 4; q++) {
          pw[u * (F::width / 4) + q] = vec<T, 4>(T(0));
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int kk = 0; kk < 64; kk += 8) {
      simdgroup_matrix<T, 8, 8> mx[2];
      simdgroup_matrix<T, 8, 8> mw[4];
      UNROLL
      for (int i = 0; i < 2; i++) {
        simdgroup_load(mx[i], xs + (sm + 8 * i) * tile_pitch + kk, tile_pitch);
      }
      UNROLL
      for (int j = 0; j < 4; j++) {
        simdgroup_load(
            mw[j], ws + (sn + 8 * j) * tile_pitch + kk, tile_pitch, ulong2(0, 0), true);
      }
      UNROLL
      for (int i = 0; i < 2; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) {
          simdgroup_multiply_accumulate(sums[i][j], mx[i], mw[j], sums[i][j]);
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int i = 0; i < 2; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) {
      simdgroup_store(
          sums[i][j], scratch + (sm + 8 * i) * tile_pitch + sn + 8 * j, tile_pitch);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = me; e < 32 * count; e += 128) {
    const uint ym = e / count;
    const uint yn = e % count;
    if (to + ym < rows && row + yn < a.rows) {
      const threadgroup float* y = scratch + ym * tile_pitch + yn;
      float v = E::Activation::apply(E::add_bias(y[0], bias, a.bias + row + yn));
      if (gated) {
        v *= E::add_bias(y[32], bias, b.bias + row + yn);
      }
      const ulong where = ulong(to + ym) * a.stride + a.column + row + yn;
      out[where] = E::template finish<T>(v, added, where);
    }
  }
}
