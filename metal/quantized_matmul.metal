// y = epilogue(x W^T) for W in any format of formats.h; float32 accumulation.
//
// W is one or more parts (row ranges: q, k and v; gate and up), each in one set of streams.
// A SIMD-group computes rows of one part, decoded by F from p. A gated activation takes the same
// rows of two parts: those of the gate, then those of up, decoded by G from q, which may be of
// another format. Elsewhere G and q are F and p again, and not used.

// The input `size` holds a Size, then a Part for each part.
// outputs: of a row of x, before the next one is used; 1 but for experts. Where results are summed
// over experts, rows of x of an output.
struct Size {
  uint columns, rows, outputs;
};

// A part's first row in its streams, its rows, its first tile in the grid, its first column in
// its output, the columns of that output and its first column in the bias.
struct Part {
  uint first, rows, tile, column, stride, bias;
};

struct None {
  static constexpr constant bool gated = false;
  static float apply(float v, float) {
    return v;
  }
};

// What each row's sum is multiplied by: 1, or a number for each row of the streams.
struct Unscaled {};
template <typename P>
struct Factors {
  P values;
};
METAL_FUNC float factor(Unscaled, uint) {
  return 1.0f;
}
template <typename P>
METAL_FUNC float factor(Factors<P> factors, uint row) {
  return factors.values[row];
}
METAL_FUNC Unscaled factors() {
  return Unscaled{};
}
template <typename P>
METAL_FUNC Factors<P> factors(P values) {
  return Factors<P>{values};
}

// Where results go, and what is done to a sum before; `fa` and `fb` belong to the rows of a and b.
// `add`: 1 where the residual is added, 2 where it multiplies, 0 where there is none.
template <
    typename A, bool shift, int add, typename T, typename B, typename R, typename M, typename N>
struct Output {
  static constexpr constant bool gated = A::gated;
  static constexpr constant bool biased = shift;
  static constexpr constant int added = add;
  using Activation = A;
  using Result = T;
  Part a, b;
  M fa;
  N fb;
  B bias;
  R residual;
  device T* out;
};
template <
    typename A, bool biased, int added, typename T, typename B, typename R, typename M, typename N>
METAL_FUNC Output<A, biased, added, T, B, R, M, N> output(
    Part a, Part b, M fa, N fb, B bias, R residual, device T* out) {
  return Output<A, biased, added, T, B, R, M, N>{a, b, fa, fb, bias, residual, out};
}

// Sum v of row n of a part, times the row's factor, with its bias.
template <typename Y, typename M>
METAL_FUNC float shifted(Y y, Part part, M factors, float v, uint n) {
  v *= factor(factors, part.first + n);
  return Y::biased ? v + float(y.bias[part.bias + n]) : v;
}

// Result v for row `to` and column n.
template <typename Y>
METAL_FUNC void store(Y y, float v, uint n, uint to) {
  const ulong at = ulong(to) * y.a.stride + y.a.column + n;
  if constexpr (Y::added != 0) {
    const float r = float(y.residual[at]);
    v = Y::added == 1 ? v + r : v * r;
  }
  y.out[at] = static_cast<typename Y::Result>(v);
}

// Sum v of row n of the part (gated: and the sum of up's) for row `to` of the outputs.
template <typename Y>
METAL_FUNC void put(Y y, float v, float up, uint n, uint to) {
  const float gate = shifted(y, y.a, y.fa, v, n);
  store(y, Y::Activation::apply(gate, Y::gated ? shifted(y, y.b, y.fb, up, n) : 0.0f), n, to);
}

//@ Silu:
struct Silu {
  static constexpr constant bool gated = false;
  static float apply(float v, float) {
    return v / (1.0f + metal::precise::exp(-v));
  }
};

//@ Relu2:
struct Relu2 {
  static constexpr constant bool gated = false;
  static float apply(float v, float) {
    v = metal::max(v, 0.0f);
    return v * v;
  }
};

//@ GeluTanh:
struct GeluTanh {
  static constexpr constant bool gated = false;
  static float apply(float v, float) {
    // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)), which does not cancel for negative v.
    const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
    return v / (1.0f + metal::precise::exp(-2.0f * u));
  }
};

//@ Gelu:
// 0.5 v (1 + erf(v / sqrt(2))) by Abramowitz and Stegun 7.1.26, |error of erf| <= 1.5e-7.
struct Gelu {
  static constexpr constant bool gated = false;
  static float apply(float v, float) {
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
template <typename A>
struct Gated {
  static constexpr constant bool gated = true;
  static float apply(float v, float up) {
    return A::apply(v, 0.0f) * up;
  }
};

//@ ClippedSwiglu:
// gpt-oss's: silu with a slope of 1.702 times up + 1, of clipped values. A NaN stays one.
struct ClippedSwiglu {
  static constexpr constant bool gated = true;
  static float apply(float v, float up) {
    v = v > 7.0f ? 7.0f : v;
    up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
    return (up + 1.0f) * v / (1.0f + metal::precise::exp(-1.702f * v));
  }
};

//@ lanes:
// Lane r gets the SIMD-group's sum of sums[r].
template <int slots>
METAL_FUNC float sum_of_lane(const thread float* sums, uint lane) {
  float mine = 0.0f;
  UNROLL
  for (int r = 0; r < slots; r++) {
    const float sum = simd_sum(sums[r]);
    mine = lane == uint(r) ? sum : mine;
  }
  return mine;
}

//@ decoded:
// Weights 4 q to 4 q + 3 of a unit.
template <typename F>
METAL_FUNC float4 decoded(F f, int q) {
  const float4 v = f.scale(q >> 2) * (f.quad(q) - float(F::offset));
  return F::biased ? v + f.bias(q >> 2) : v;
}

//@ vector: lanes
// One row of x by `slots` rows of W from row n on; a lane takes a unit of each at a time.
template <typename F, int slots, typename T, typename P>
METAL_FUNC float vector_dots(P p, const device T* x, uint n, uint columns, uint lane) {
  constexpr int scales = F::halves ? 2 : 1;
  constexpr int each = F::width / scales;
  const uint units = columns / F::width;
  float sums[slots] = {0.0f};
  for (uint i = lane; i < units; i += 32) {
    const device vec<T, 4>* quads = (const device vec<T, 4>*)(x + i * F::width);
    float v[F::width];
    float total[scales] = {0.0f};
    UNROLL
    for (int q = 0; q < F::width / 4; q++) {
      const float4 quad = float4(quads[q]);
      UNROLL
      for (int e = 0; e < 4; e++) {
        total[4 * q / each] += quad[e];
        v[4 * q + e] = quad[e] * unshifted(F::shift(4 * q + e));
      }
    }
    UNROLL
    for (int r = 0; r < slots; r++) {
      const F f(p, (n + r) * units, i);
      UNROLL
      for (int h = 0; h < scales; h++) {
        float dot = 0.0f;
        UNROLL
        for (int e = h * each; e < (h + 1) * each; e++) {
          dot = fma(f.code(e), v[e], dot);
        }
        if (F::offset) {
          dot = fma(-float(F::offset), total[h], dot);
        }
        sums[r] = fma(f.scale(h), dot, sums[r]);
        if (F::biased) {
          sums[r] = fma(f.bias(h), total[h], sums[r]);
        }
      }
    }
  }
  return sum_of_lane<slots>(sums, lane);
}

//@ vector_tile:
// For a vector_dots that precedes.
template <typename F, typename G, int slots, typename Y, typename T, typename P, typename Q>
METAL_FUNC void vector_rows(
    P p, Q q, const device T* x, Y y, uint n, uint columns, uint to, uint lane) {
  const float v = vector_dots<F, slots>(p, x, y.a.first + n, columns, lane);
  float up = 0.0f;
  if (Y::gated) {
    up = vector_dots<G, slots>(q, x, y.b.first + n, columns, lane);
  }
  if (lane < slots) {
    put(y, v, up, n + lane, to);
  }
}

template <
    typename F, typename G, int slots, int groups, typename Y, typename T, typename P, typename Q>
METAL_FUNC void vector_tile(
    P p, Q q, const device T* x, const device Size* size, Y y, uint3 tile, uint group, uint lane) {
  const uint columns = size->columns;
  x += ulong(tile.y / size->outputs) * columns;
  uint n = ((tile.x - y.a.tile) * groups + group) * slots;
  if (n + slots <= y.a.rows) {
    vector_rows<F, G, slots>(p, q, x, y, n, columns, tile.y, lane);
  } else {
    for (; n < y.a.rows; n++) {
      vector_rows<F, G, 1>(p, q, x, y, n, columns, tile.y, lane);
    }
  }
}

//@ experts:
// Rows of x with an expert each: `a` and `b` are the rows of an expert's matrix in the streams of
// either part, `bias` the values of its bias.
template <typename X, typename I, typename S>
struct Chosen {
  X x;
  I experts;
  S scores;
  uint a, b, bias;
};
template <typename X, typename I, typename S>
METAL_FUNC Chosen<X, I, S> chosen(X x, I experts, S scores, uint a, uint b, uint bias) {
  return Chosen<X, I, S>{x, experts, scores, a, b, bias};
}

// Lets y be for the results of an expert, which has its own rows and bias.
template <typename Y, typename X>
METAL_FUNC void choose(thread Y& y, X x, uint expert) {
  y.a.first += expert * x.a;
  y.b.first += expert * x.b;
  y.a.bias += expert * x.bias;
  y.b.bias += expert * x.bias;
}

//@ gathered: experts
template <
    typename F, typename G, int slots, int groups, typename Y, typename X, typename P, typename Q>
METAL_FUNC void gathered_tile(
    P p, Q q, X x, const device Size* size, Y y, uint3 tile, uint group, uint lane) {
  choose(y, x, uint(x.experts[tile.y]));
  vector_tile<F, G, slots, groups>(p, q, x.x, size, y, tile, group, lane);
}

//@ summed: experts
// The sum of an output's rows, each times its score, of `slots` columns. SIMD-group g takes rows g,
// g + groups and so on in this order; then the groups' sums are added in theirs.
template <
    typename F, typename G, int slots, int groups, typename Y, typename X, typename P, typename Q>
METAL_FUNC void summed_tile(
    P p, Q, X x, const device Size* size, Y y, uint3 tile, uint group, uint me,
    threadgroup float* sums) {
  const uint columns = size->columns;
  const uint lane = me % 32;
  const uint n = tile.x * slots;
  float sum = 0.0f;
  for (uint i = tile.y * size->outputs + group; i < (tile.y + 1) * size->outputs; i += groups) {
    Y own = y;
    choose(own, x, uint(x.experts[i]));
    float v = 0.0f;
    if (n + slots <= y.a.rows) {
      v = vector_dots<F, slots>(p, x.x + ulong(i) * columns, own.a.first + n, columns, lane);
    } else {
      for (uint r = 0; n + r < y.a.rows; r++) {
        const float dot = simd_sum(vector_dots<F, 1>(
            p, x.x + ulong(i) * columns, own.a.first + n + r, columns, lane));
        v = lane == r ? dot : v;
      }
    }
    if (lane < slots && n + lane < y.a.rows) {
      sum = fma(float(x.scores[i]), shifted(own, own.a, own.fa, v, n + lane), sum);
    }
  }
  if (lane < slots) {
    sums[group * slots + lane] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (me < slots && n + me < y.a.rows) {
    for (uint g = 1; g < groups; g++) {
      sum += sums[g * slots + me];
    }
    store(y, sum, n + me, tile.y);
  }
}

//@ batch: lanes decoded
// Four or eight values, eight of two bytes in one load of 16.
template <int count, typename T>
METAL_FUNC void read_values(const device T* x, thread float4* v) {
  if constexpr (count == 2 && sizeof(T) == 2) {
    const uint4 words = *(const device uint4*)x;
    v[0] = float4(as_type<vec<T, 4>>(words.xy));
    v[1] = float4(as_type<vec<T, 4>>(words.zw));
  } else {
    UNROLL
    for (int i = 0; i < count; i++) {
      v[i] = float4(((const device vec<T, 4>*)x)[i]);
    }
  }
}

// The rows of W that a SIMD-group multiplies: unit i of each.
template <typename F, int slots>
struct Units {
  F first;
  Units<F, slots - 1> rest;
  template <typename P>
  METAL_FUNC Units(P p, Part a, uint n, uint units, uint i)
      : first(p, (a.first + metal::min(n, a.rows - 1)) * units, i),
        rest(p, a, n + 1, units, i) {}
  METAL_FUNC void decode(int q, thread float4* w) const thread {
    w[0] = decoded(first, q);
    rest.decode(q, w + 1);
  }
};
template <typename F>
struct Units<F, 0> {
  template <typename P>
  METAL_FUNC Units(P, Part, uint, uint, uint) {}
  METAL_FUNC void decode(int, thread float4*) const thread {}
};

// `many` rows of x, from `to` on, by `slots` rows of a part: a unit of W is decoded once for all,
// up to 8 weights at a time. Rows past the last are the last again. Lane `slots` m + r gets the
// sum of rows m and r.
template <typename F, int slots, int many, typename T, typename P>
METAL_FUNC float batch_dots(
    P p, const device T* x, const device Size* size, Part a, uint n, uint to, uint lane) {
  constexpr int count = F::width > 4 ? 2 : 1;
  const uint units = size->columns / F::width;
  float sums[many * slots] = {0.0f};
  for (uint i = lane; i < units; i += 32) {
    const Units<F, slots> rows(p, a, n, units, i);
    UNROLL
    for (int q = 0; q < F::width / 4; q += count) {
      float4 w[count][slots];
      UNROLL
      for (int i = 0; i < count; i++) {
        rows.decode(q + i, w[i]);
      }
      UNROLL
      for (int m = 0; m < many; m++) {
        const uint row = metal::min(to + m, size->rows - 1);
        float4 v[count];
        read_values<count>(x + (row * size->columns + i * F::width + 4 * q), v);
        UNROLL
        for (int r = 0; r < slots; r++) {
          UNROLL
          for (int e = 0; e < 4 * count; e++) {
            float4 quad = w[e / 4][r];
            sums[m * slots + r] = fma(quad[e % 4], v[e / 4][e % 4], sums[m * slots + r]);
          }
        }
      }
    }
  }
  return sum_of_lane<many * slots>(sums, lane);
}

//@ batch_tile:
// For x of any kind that a batch_dots precedes for.
template <
    typename F, typename G, int slots, int groups, int many, typename Y, typename X, typename P,
    typename Q>
METAL_FUNC void batch_tile(
    P p, Q q, X x, const device Size* size, Y y, uint3 tile, uint group, uint lane) {
  const uint n = ((tile.x - y.a.tile) * groups + group) * slots;
  const uint to = tile.y * many;
  if (n < y.a.rows) {
    const float v = batch_dots<F, slots, many>(p, x, size, y.a, n, to, lane);
    float up = 0.0f;
    if (Y::gated) {
      up = batch_dots<G, slots, many>(q, x, size, y.b, n, to, lane);
    }
    const uint m = to + lane / slots;
    const uint column = n + lane % slots;
    if (lane < many * slots && m < size->rows && column < y.a.rows) {
      put(y, v, up, column, m);
    }
  }
}

//@ floor: lanes
// Address floors, for measuring: what the functions of these names load, with next to no
// arithmetic. The result is nothing.
template <typename F>
METAL_FUNC float loaded_codes(F f) {
  float found = 0.0f;
  UNROLL
  for (int q = 0; q < F::width / 4; q++) {
    found += f.code(4 * q);
  }
  return found;
}

template <typename F>
METAL_FUNC float loaded(F f) {
  constexpr int last = F::halves ? 1 : 0;
  return loaded_codes(f) + f.scale(0) + f.scale(last) + f.bias(0) + f.bias(last);
}

template <int count, typename T>
METAL_FUNC uint loaded_values(const device T* x) {
  uint found = 0;
  UNROLL
  for (int q = 0; q < count / 4; q++) {
    const vec<uint, sizeof(T)> words = ((const device vec<uint, sizeof(T)>*)x)[q];
    UNROLL
    for (int e = 0; e < int(sizeof(T)); e++) {
      found ^= words[e];
    }
  }
  return found;
}

//@ vector_floor: floor
template <typename F, int slots, typename T, typename P>
METAL_FUNC float vector_dots(P p, const device T* x, uint n, uint columns, uint lane) {
  const uint units = columns / F::width;
  float sums[slots] = {0.0f};
  uint words = 0;
  for (uint i = lane; i < units; i += 32) {
    words ^= loaded_values<F::width>(x + i * F::width);
    UNROLL
    for (int r = 0; r < slots; r++) {
      sums[r] += loaded(F(p, (n + r) * units, i));
    }
  }
  sums[0] += float(words);
  return sum_of_lane<slots>(sums, lane);
}

//@ batch_floor: floor
template <typename F, int slots, int many, typename T, typename P>
METAL_FUNC float batch_dots(
    P p, const device T* x, const device Size* size, Part a, uint n, uint to, uint lane) {
  const uint units = size->columns / F::width;
  float sum = 0.0f;
  float sums[many];
  uint words[many] = {0};
  for (uint i = lane; i < units; i += 32) {
    UNROLL
    for (int r = 0; r < slots; r++) {
      sum += loaded(F(p, (a.first + metal::min(n + r, a.rows - 1)) * units, i));
    }
    UNROLL
    for (int m = 0; m < many; m++) {
      const ulong row = metal::min(to + m, size->rows - 1);
      words[m] ^= loaded_values<F::width>(x + row * size->columns + i * F::width);
    }
  }
  UNROLL
  for (int m = 0; m < many; m++) {
    sums[m] = sum + float(words[m]);
  }
  return sum_of_lane<many>(sums, lane / slots);
}

//@ tiles: decoded
// `many` rows of x by `across` rows of W (gated: half of them the gate's, half up's) for `groups`
// SIMD-groups: two side by side along the rows of W, all pairs along those of x. A step of K is
// decoded and copied to threadgroup memory by all threads, or by some each, and then multiplied.

// Weights k to k + 31 of row n of W, zeros if that is outside.
template <typename F, typename T, typename P>
METAL_FUNC void decode_run(
    P p, uint n, uint k, uint columns, bool inside, threadgroup vec<T, 4>* to) {
  constexpr int quads = F::width / 4;
  UNROLL
  for (int u = 0; u < 8 / quads; u++) {
    if (inside) {
      const F f(p, n * (columns / F::width), k / F::width + u);
      UNROLL
      for (int q = 0; q < quads; q++) {
        to[u * quads + q] = vec<T, 4>(decoded(f, q));
      }
    } else {
      UNROLL
      for (int q = 0; q < quads; q++) {
        to[u * quads + q] = vec<T, 4>(T(0));
      }
    }
  }
}

template <typename T, int many>
struct Step {
  static constexpr constant int depth = many > 64 || sizeof(T) == 4 ? 32 : 64;
  static constexpr constant int pitch = depth + 8;
};

// All threads decode and copy a step of K, from k on, of a tile that begins at row `row` of W: `here`
// rows of x, and zeros up to `filled`.
template <
    typename F, typename G, int many, int across, int groups, typename Y, typename T, typename P,
    typename Q>
METAL_FUNC void stage_step(
    P p, Q q, const device T* x, uint columns, Y y, uint row, uint k, uint here, uint filled,
    uint me, threadgroup T* xs, threadgroup T* ws) {
  constexpr int depth = Step<T, many>::depth;
  constexpr int pitch = Step<T, many>::pitch;
  constexpr uint count = Y::gated ? across / 2 : across;  // of a part's rows
  constexpr uint runs = across * depth / 32;              // to decode, by the first threads
  constexpr uint busy = runs < 32 * groups ? runs : 0;    // threads that copy nothing of x
  constexpr uint piece = 16 / sizeof(T);
  constexpr uint pieces = depth / piece;
  if (me < runs) {
    const uint r = me / (depth / 32);
    const uint at = 32 * (me % (depth / 32));
    const uint n = row + r % count;
    const bool inside = n < y.a.rows && k + at < columns;
    threadgroup vec<T, 4>* run = (threadgroup vec<T, 4>*)(ws + r * pitch + at);
    if (Y::gated && r >= count) {
      decode_run<G, T>(q, y.b.first + n, k + at, columns, inside, run);
    } else {
      decode_run<F, T>(p, y.a.first + n, k + at, columns, inside, run);
    }
  }
  if (me >= busy) {
    UNROLL
    for (uint e = me - busy; e < many * pieces; e += 32 * groups - busy) {
      const uint m = e / pieces;
      const uint from = e % pieces * piece;
      if (m < filled) {
        const bool inside = m < here && k + from < columns;
        *(threadgroup uint4*)(xs + m * pitch + from) =
            inside ? *(const device uint4*)(x + m * columns + k + from) : uint4(0);
      }
    }
  }
}

// Rows `to` to `rows` - 1 of x, `many` at most.
template <
    typename F, typename G, int many, int across, int groups, typename Y, typename T, typename P,
    typename Q>
METAL_FUNC void matrix_rows(
    P p, Q q, const device T* x, uint columns, Y y, uint tile, uint to, uint rows, uint group,
    uint me, threadgroup float4* scratch) {
  constexpr int depth = Step<T, many>::depth;
  constexpr int pitch = Step<T, many>::pitch;
  constexpr uint count = Y::gated ? across / 2 : across;  // of a part's rows
  constexpr int down = many / (4 * groups);  // matrices of 8 x 8 of a SIMD-group: along x
  constexpr int wide = across / 16;          // and along W
  constexpr uint width = count / 2;          // columns of a SIMD-group's results
  constexpr uint result_pitch = across / 2 + 8;
  const uint row = (tile - y.a.tile) * count;
  const uint here = rows - to;
  const uint filled = metal::min((here + 7) / 8 * 8, uint(many));
  x += ulong(to) * columns;
  threadgroup T* xs = (threadgroup T*)scratch;
  threadgroup T* ws = xs + many * pitch;
  simdgroup_matrix<float, 8, 8> sums[down][wide];
  UNROLL
  for (int i = 0; i < down; i++) {
    UNROLL
    for (int j = 0; j < wide; j++) {
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  for (uint k = 0; k < columns; k += depth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage_step<F, G, many, across, groups>(
        p, q, x, columns, y, row, k, here, filled, me, xs, ws);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int kk = 0; kk < depth; kk += 8) {
      simdgroup_matrix<T, 8, 8> mw[wide];
      UNROLL
      for (int j = 0; j < wide; j++) {
        const uint n = Y::gated ? j / (wide / 2) * count + group % 2 * width + j % (wide / 2) * 8
                                : group % 2 * width + j * 8;
        simdgroup_load(mw[j], ws + n * pitch + kk, pitch, ulong2(0, 0), true);
      }
      UNROLL
      for (int i = 0; i < down; i++) {
        const uint m = 8 * (i * (groups / 2) + group / 2);
        if (m < here) {
          simdgroup_matrix<T, 8, 8> mx;
          simdgroup_load(mx, xs + m * pitch + kk, pitch);
          UNROLL
          for (int j = 0; j < wide; j++) {
            simdgroup_multiply_accumulate(sums[i][j], mx, mw[j], sums[i][j]);
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Eight rows at a time, by way of the SIMD-group's own memory.
  threadgroup float* mine = (threadgroup float*)scratch + group * 8 * result_pitch;
  UNROLL
  for (int i = 0; i < down; i++) {
    const uint m = 8 * (i * (groups / 2) + group / 2);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int j = 0; j < wide; j++) {
      simdgroup_store(sums[i][j], mine + 8 * j, result_pitch);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = me % 32; e < 8 * width; e += 32) {
      const threadgroup float* sum = mine + e / width * result_pitch + e % width;
      const uint n = row + group % 2 * width + e % width;
      if (m + e / width < here && n < y.a.rows) {
        put(y, sum[0], Y::gated ? sum[width] : 0.0f, n, to + m + e / width);
      }
    }
  }
}

//@ matrix: tiles
template <
    typename F, typename G, int many, int across, int groups, typename Y, typename T, typename P,
    typename Q>
METAL_FUNC void matrix_tile(
    P p, Q q, const device T* x, const device Size* size, Y y, uint3 tile, uint group, uint me,
    threadgroup float4* scratch) {
  matrix_rows<F, G, many, across, groups>(
      p, q, x, size->columns, y, tile.x, tile.y * many, size->rows, group, me, scratch);
}

//@ sorted: experts
// Rows of x sorted by expert, with the last row and the last tile, both excluded, of each expert.
template <typename X, typename I>
struct Sorted {
  X x;
  I row_ends;
  I tile_ends;
  uint experts, a, b, bias;
};
template <typename X, typename I>
METAL_FUNC Sorted<X, I> sorted(
    X x, I row_ends, I tile_ends, uint experts, uint a, uint b, uint bias) {
  return Sorted<X, I>{x, row_ends, tile_ends, experts, a, b, bias};
}

// The rows of x in a tile, from `to` to `end` - 1, all of one expert; none where to == end.
struct Span {
  uint expert, to, end;
};
template <typename X>
METAL_FUNC Span span_of(X x, uint tile, uint many) {
  uint expert = 0;  // the first whose tiles end after this one
  uint last = x.experts;
  while (expert < last) {
    const uint middle = (expert + last) / 2;
    if (uint(x.tile_ends[middle]) <= tile) {
      expert = middle + 1;
    } else {
      last = middle;
    }
  }
  if (expert == x.experts) {
    return Span{0, 0, 0};
  }
  const uint tiles = expert ? uint(x.tile_ends[expert - 1]) : 0;
  const uint rows = expert ? uint(x.row_ends[expert - 1]) : 0;
  const uint to = rows + (tile - tiles) * many;
  return Span{expert, to, metal::min(to + many, uint(x.row_ends[expert]))};
}

//@ grouped: tiles sorted
template <
    typename F, typename G, int many, int across, int groups, typename Y, typename X, typename P,
    typename Q>
METAL_FUNC void grouped_tile(
    P p, Q q, X x, const device Size* size, Y y, uint3 tile, uint group, uint me,
    threadgroup float4* scratch) {
  const Span span = span_of(x, tile.y, many);
  if (span.to < span.end) {
    choose(y, x, span.expert);
    matrix_rows<F, G, many, across, groups>(
        p, q, x.x, size->columns, y, tile.x, span.to, span.end, group, me, scratch);
  }
}
