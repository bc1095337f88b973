// Rotary embedding of q and k, behind an RMSNorm of each head or of all heads where they have one:
// [B, L, heads D] to [B, heads, L, D].
//
// A SIMD-group has one position and some heads of q and k, which share its angles. `size` holds the
// heads of q, those of k, D, the pairs that turn, L, what to advance in the offsets for each row of
// B, which is 0 if they share one, and the heads of a SIMD-group. `numbers` holds the scale of
// positions, what rotated values are multiplied by, eps of the norm, what is added to its weights,
// and what q is multiplied by if it has none.

// Lane i holds both sides of the pairs i + 32 j of a head in slots j and pairs + j, and in those
// after them the values i + 32 j of the rest.
template <int pairs, bool traditional>
struct Slots {
  uint columns;
  uint count;
  uint lane;
  uint at(int s) const {
    const uint i = lane + 32 * (s % pairs);
    if (s < pairs) {
      return traditional ? 2 * i : i;
    }
    if (s < 2 * pairs) {
      return traditional ? 2 * i + 1 : i + count;
    }
    return 2 * count + lane + 32 * (s - 2 * pairs);
  }
  bool inside(int s) const {
    return s < 2 * pairs ? lane + 32 * (s % pairs) < count : at(s) < columns;
  }
};

// N is one of the norms below.
template <typename N, int pairs, int rest, bool traditional, typename T, typename F, typename O,
          typename S, typename M>
METAL_FUNC void norm_rope(
    const device T* q, const device T* k, N norm, F freqs, O offset, S size, M numbers,
    uint2 thread_at, uint lane, device T* q_out, device T* k_out) {
  constexpr int count = 2 * pairs + rest;
  const uint heads = uint(size[0]);
  const uint kv_heads = uint(size[1]);
  const uint length = uint(size[4]);
  const uint b = thread_at.y / length;
  const uint l = thread_at.y % length;
  const Slots<pairs, traditional> slots = {uint(size[2]), uint(size[3]), lane};
  const float position = numbers[0] * float(int(offset[b * uint(size[5])]) + int(l));
  float cosine[pairs];
  float sine[pairs];
  UNROLL
  for (int j = 0; j < pairs; j++) {
    const float turn = position * (1.0f / freqs[metal::min(lane + 32 * j, slots.count - 1)]);
    cosine[j] = metal::precise::cos(turn);
    sine[j] = metal::precise::sin(turn);
  }
  const uint each = uint(size[6]);
  const uint first = thread_at.x / 32 * each;
  const uint last = metal::min(first + each, heads + kv_heads);
  for (uint head = first; head < last; head++) {
    const bool is_q = head < heads;
    const uint h = is_q ? head : head - heads;
    const uint n = is_q ? heads : kv_heads;
    const device T* x = (is_q ? q : k) + (ulong(thread_at.y) * n + h) * slots.columns;
    device T* out = (is_q ? q_out : k_out) + ((ulong(b) * n + h) * length + l) * slots.columns;
    T v[count];
    UNROLL
    for (int s = 0; s < count; s++) {
      v[s] = slots.inside(s) ? x[slots.at(s)] : T(0);
    }
    norm.template apply<count>(slots, is_q, h, numbers, v);
    UNROLL
    for (int j = 0; j < pairs; j++) {
      const float factor = numbers[1];
      const float a = float(static_cast<T>(float(v[j]) * factor));
      const float c = float(static_cast<T>(float(v[pairs + j]) * factor));
      v[j] = static_cast<T>(fma(a, cosine[j], -(c * sine[j])));
      v[pairs + j] = static_cast<T>(fma(a, sine[j], c * cosine[j]));
    }
    UNROLL
    for (int s = 0; s < count; s++) {
      if (slots.inside(s)) {
        out[slots.at(s)] = v[s];
      }
    }
  }
}

//@ values: inverse
// RMSNorm of the heads of v without weights and without a rotation, by the SIMD-groups behind those
// of q and k, of which there are `before`. A head has at most 32 `count` values.
template <int count, typename T, typename S, typename M>
METAL_FUNC void norm_values(
    const device T* v, S size, M numbers, uint before, uint2 thread_at, uint lane,
    device T* v_out) {
  const uint heads = uint(size[1]);
  const uint columns = uint(size[2]);
  const uint length = uint(size[4]);
  const uint each = uint(size[6]);
  const uint first = (thread_at.x / 32 - before) * each;
  const uint last = metal::min(first + each, heads);
  for (uint head = first; head < last; head++) {
    const device T* x = v + (ulong(thread_at.y) * heads + head) * columns;
    device T* out =
        v_out + ((ulong(thread_at.y / length) * heads + head) * length + thread_at.y % length) * columns;
    T some[count];
    UNROLL
    for (int s = 0; s < count; s++) {
      some[s] = lane + 32 * s < columns ? x[lane + 32 * s] : T(0);
    }
    const float inverse = inverse_rms<count>(some, columns, numbers[2]);
    UNROLL
    for (int s = 0; s < count; s++) {
      if (lane + 32 * s < columns) {
        out[lane + 32 * s] = static_cast<T>(float(some[s]) * inverse);
      }
    }
  }
}

//@ NoNorm:
struct NoNorm {
  template <int count, typename L, typename M, typename T>
  void apply(L, bool, uint, M, thread T*) const {}
};

//@ inverse:
template <int count, typename T>
METAL_FUNC float inverse_rms(const thread T* v, uint columns, float eps) {
  float sum = 0.0f;
  UNROLL
  for (int s = 0; s < count; s++) {
    sum = fma(float(v[s]), float(v[s]), sum);
  }
  return metal::precise::rsqrt(simd_sum(sum) / float(columns) + eps);
}

//@ PlainNorm: inverse
// Without weights; q is multiplied by a number, which is of type T.
struct PlainNorm {
  template <int count, typename L, typename M, typename T>
  void apply(L slots, bool is_q, uint, M numbers, thread T* v) const {
    const float inverse = inverse_rms<count>(v, slots.columns, numbers[2]);
    const float factor = is_q ? numbers[4] : 1.0f;
    UNROLL
    for (int s = 0; s < count; s++) {
      v[s] = static_cast<T>(float(static_cast<T>(float(v[s]) * inverse)) * factor);
    }
  }
};

//@ weigh:
// Rounds where mx.fast.rms_norm does.
template <int count, typename L, typename T>
METAL_FUNC void weigh(L slots, float inverse, const device T* w, float offset, thread T* v) {
  UNROLL
  for (int s = 0; s < count; s++) {
    if (slots.inside(s)) {
      const T weight = static_cast<T>(offset + float(w[slots.at(s)]));
      v[s] = static_cast<T>(float(static_cast<T>(float(v[s]) * inverse)) * float(weight));
    }
  }
}

//@ Norm: inverse weigh
template <typename T>
struct Norm {
  const device T* q_weight;
  const device T* k_weight;
  template <int count, typename L, typename M>
  void apply(L slots, bool is_q, uint, M numbers, thread T* v) const {
    const float inverse = inverse_rms<count>(v, slots.columns, numbers[2]);
    weigh<count>(slots, inverse, is_q ? q_weight : k_weight, numbers[3], v);
  }
};

//@ WideNorm: weigh
// Of all heads of q together, and of all heads of k: a threadgroup has a whole position.
template <typename T>
struct WideNorm {
  const device T* q_weight;
  const device T* k_weight;
  float q_inverse;
  float k_inverse;
  template <int count, typename L, typename M>
  void apply(L slots, bool is_q, uint h, M numbers, thread T* v) const {
    const device T* w = (is_q ? q_weight : k_weight) + h * slots.columns;
    weigh<count>(slots, is_q ? q_inverse : k_inverse, w, numbers[3], v);
  }
};

// The norm of the position `row`; `partial` holds two numbers for each of the SIMD-groups.
template <typename T, typename S, typename M>
METAL_FUNC WideNorm<T> wide_norm(
    const device T* q, const device T* k, const device T* q_weight, const device T* k_weight,
    S size, M numbers, uint row, uint lane, uint group, uint groups, threadgroup float* partial) {
  const uint of_q = uint(size[0]) * uint(size[2]);
  const uint of_k = uint(size[1]) * uint(size[2]);
  float a = 0.0f;
  for (uint i = 32 * group + lane; i < of_q; i += 32 * groups) {
    const float x = float(q[ulong(row) * of_q + i]);
    a = fma(x, x, a);
  }
  float b = 0.0f;
  for (uint i = 32 * group + lane; i < of_k; i += 32 * groups) {
    const float x = float(k[ulong(row) * of_k + i]);
    b = fma(x, x, b);
  }
  a = simd_sum(a);
  b = simd_sum(b);
  if (lane == 0) {
    partial[group] = a;
    partial[groups + group] = b;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a = simd_sum(lane < groups ? partial[lane] : 0.0f);
  b = simd_sum(lane < groups ? partial[groups + lane] : 0.0f);
  const float q_inverse = metal::precise::rsqrt(a / float(of_q) + numbers[2]);
  const float k_inverse = metal::precise::rsqrt(b / float(of_k) + numbers[2]);
  return {q_weight, k_weight, q_inverse, k_inverse};
}
