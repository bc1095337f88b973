// One token of a gated delta net: the norms of q and k, the gates, the state, and the norm behind
// it with its gate. A threadgroup for each head of values, of which a SIMD-group updates four rows
// of the state at once; each lane holds `pieces` values of a row. `whole`: rows have 32 `pieces`
// values; else some lanes hold fewer.

struct Heads {
  uint key_heads;
  uint heads;
  uint key_size;
  uint size;
};

// As many neighbouring values as a lane loads at once, of a row with as many for every lane.
METAL_FUNC constexpr int width_of(int pieces, bool whole) {
  return !whole || pieces % 2 ? 1 : pieces % 4 ? 2 : 4;
}

// Values of a row as floats, zeros behind its end.
template <int pieces, bool whole, typename T, typename P>
METAL_FUNC void load_piece(P row, uint size, uint lane, thread float* v) {
  constexpr int width = width_of(pieces, whole);
  UNROLL
  for (int p = 0; p < pieces / width; p++) {
    const uint at = 32 * p + lane;
    if constexpr (width == 1) {
      v[p] = whole || at < size ? float(row[at]) : 0.0f;
    } else {
      const vec<T, width> some = elements<vec<T, width>>(row)[at];
      UNROLL
      for (int e = 0; e < width; e++) {
        v[width * p + e] = float(some[e]);
      }
    }
  }
}

template <int pieces, bool whole>
METAL_FUNC void store_piece(const thread float* v, uint size, uint lane, device float* row) {
  constexpr int width = width_of(pieces, whole);
  UNROLL
  for (int p = 0; p < pieces / width; p++) {
    const uint at = 32 * p + lane;
    if constexpr (width == 1) {
      if (whole || at < size) {
        row[at] = v[p];
      }
    } else {
      vec<float, width> some;
      UNROLL
      for (int e = 0; e < width; e++) {
        some[e] = v[width * p + e];
      }
      ((device vec<float, width>*)row)[at] = some;
    }
  }
}

template <int pieces>
METAL_FUNC float product(const thread float* a, const thread float* b) {
  float sum = 0.0f;
  UNROLL
  for (int p = 0; p < pieces; p++) {
    sum = fma(a[p], b[p], sum);
  }
  return sum;
}

// A row of length 1, but for `eps`, which is added to the sum of its squares.
template <int pieces>
METAL_FUNC void normalize(float eps, float scale, thread float* v) {
  const float factor = scale * metal::precise::rsqrt(simd_sum(product<pieces>(v, v)) + eps);
  UNROLL
  for (int p = 0; p < pieces; p++) {
    v[p] *= factor;
  }
}

// log(1 + exp(x)), also where exp(x) is small against 1.
METAL_FUNC float softplus(float x) {
  const float e = metal::precise::exp(-metal::abs(x));
  const float more = e < 1e-3f ? e * (1.0f - 0.5f * e) : metal::precise::log(1.0f + e);
  return metal::max(x, 0.0f) + more;
}

METAL_FUNC float sigmoid(float x) {
  return 1.0f / (1.0f + metal::precise::exp(-x));
}

// `numbers` holds what is added to the squares of q and of k, and the epsilon of the norm behind.
// `tiled`: in z and y the heads of values of one key head are not neighbours.
template <
    int pieces, bool whole, bool tiled, typename T, typename Q, typename Z, typename A, typename B,
    typename L, typename D, typename W, typename H, typename N, typename S>
METAL_FUNC void delta_step(
    Q qkv, Z z, A a, B b, L a_log, D dt_bias, W weight, H state, N numbers, S sizes, uint head,
    uint sequence, uint group, uint groups, uint lane, threadgroup float* out, device T* y,
    device float* next) {
  const Heads n = {uint(sizes[0]), uint(sizes[1]), uint(sizes[2]), uint(sizes[3])};
  const uint each = n.heads / n.key_heads;
  const uint key_head = head / each;
  const ulong keys = ulong(n.key_heads) * n.key_size;
  const ulong first = sequence * (2 * keys + ulong(n.heads) * n.size);
  float q[pieces];
  float k[pieces];
  load_piece<pieces, whole, T>(qkv + first + key_head * n.key_size, n.key_size, lane, q);
  load_piece<pieces, whole, T>(qkv + first + keys + key_head * n.key_size, n.key_size, lane, k);
  normalize<pieces>(numbers[0], metal::precise::rsqrt(float(n.key_size)), q);
  normalize<pieces>(numbers[0], 1.0f, k);
  const float both = simd_sum(product<pieces>(q, k));
  const uint gate = sequence * n.heads + head;
  const float decay = metal::precise::exp(
      -metal::precise::exp(float(a_log[head])) * softplus(float(a[gate]) + float(dt_bias[head])));
  const float beta = sigmoid(float(b[gate]));
  const ulong values = first + 2 * keys + ulong(head) * n.size;
  const ulong rows = (ulong(sequence) * n.heads + head) * n.size;
  for (uint at = 4 * group; at < n.size; at += 4 * groups) {
    float held[4][pieces];
    float known[4];
    float read[4];
    UNROLL
    for (int r = 0; r < 4; r++) {
      const uint row = metal::min(at + r, n.size - 1);
      load_piece<pieces, whole, float>(
          state + (rows + row) * n.key_size, n.key_size, lane, held[r]);
      UNROLL
      for (int p = 0; p < pieces; p++) {
        held[r][p] *= decay;
      }
      known[r] = product<pieces>(held[r], k);
      read[r] = product<pieces>(held[r], q);
    }
    UNROLL
    for (int r = 0; r < 4; r++) {
      const uint row = metal::min(at + r, n.size - 1);
      const float delta = (float(qkv[values + row]) - simd_sum(known[r])) * beta;
      const float result = fma(both, delta, simd_sum(read[r]));
      UNROLL
      for (int p = 0; p < pieces; p++) {
        held[r][p] = fma(k[p], delta, held[r][p]);
      }
      if (at + r < n.size) {
        store_piece<pieces, whole>(held[r], n.key_size, lane, next + (rows + row) * n.key_size);
        if (lane == 0) {
          out[row] = result;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float squares = 0.0f;
  for (uint i = lane; i < n.size; i += 32) {
    squares = fma(out[i], out[i], squares);
  }
  const float inverse =
      metal::precise::rsqrt(simd_sum(squares) / float(n.size) + numbers[1]);
  const uint place = tiled ? head % each * n.key_heads + key_head : head;
  const ulong to = (ulong(sequence) * n.heads + place) * n.size;
  for (uint i = 32 * group + lane; i < n.size; i += 32 * groups) {
    const float v = float(z[to + i]);
    y[to + i] = static_cast<T>(out[i] * inverse * float(weight[i]) * v * sigmoid(v));
  }
}
