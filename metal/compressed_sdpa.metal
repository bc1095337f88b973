// Attention of a few queries over compressed keys and values.
//
// The rows of the problem are the queries of all heads that share a KV head. A threadgroup takes
// some of a KV head's tokens, or the plain ones, and up to 32 rows. SIMD-group (group, slice) has
// `rows` rows and every `slices`-th run of tokens. Where several groups need the same tokens, the
// threadgroup copies them to its own memory tile by tile, whole and once, and its SIMD-groups
// decode them from there; where none do, they decode them where they lie.
//
// `size` holds the queries of a head, the rows, the KV heads, the most splits, whether attention is
// causal, the window (0: none), the capacities of `tail` and `sink`, the keys in the mask and its
// strides of batch, head and query, then the strides in the batch of `counts` and of what follows:
// capacity and splits of each sequence's `rows`. `counts` holds the tokens of `rows`, `tail` and
// `sink` in use, and the left padding.

//@ parts:
METAL_FUNC float masked(float score, bool seen) {
  return seen ? score : -INFINITY;
}
template <typename M>
METAL_FUNC float masked(float score, M added) {
  return score + float(added);
}

// What a lane's score needs to know of its row: keys from `first` to `last` are seen, and
// element `mask` + key of the mask, of which there are `keys`, is its own.
struct Row {
  int first;
  int last;
  ulong mask;
  int keys;
};

// Tokens of `words` words each, of which the value's side takes word `v` for its first.
template <int words, int v, typename P>
struct Rows {
  P from;
  METAL_FUNC P keys(uint t) const thread {
    return from + ulong(t) * words;
  }
  METAL_FUNC P values(uint t) const thread {
    return from + ulong(t) * words + v;
  }
};

// The run of tokens from t on, as far as `end`; `before` is added to a token for its key.
template <typename K, typename V, bool has_mask, typename A, typename R, typename Source,
          typename M>
METAL_FUNC void attend_run(
    thread A& state, R tokens, Source source, uint before, uint t, uint end, Row row, M mask,
    float softcap, uint lane) {
  float score = state.template score<K>(tokens, t, end, lane);
  const uint token = t + A::token(lane);
  const int key = int(source.key(before + token));
  if (softcap > 0.0f) {
    score = softcap * metal::precise::tanh(score / softcap);
  }
  const bool seen = token < end && key >= row.first && key <= row.last && key < row.keys;
  if (!seen) {
    score = -INFINITY;
  } else if (has_mask) {
    score = masked(score, mask[row.mask + key]);
  }
  state.template add<V>(tokens, t, end, state.weigh(score), lane);
}

//@ direct: parts
// The tokens from `first` to `end` of a source, where they lie.
template <typename K, typename V, bool has_mask, int slices, typename A, typename Source,
          typename M>
METAL_FUNC void attend(
    thread A& state, Source source, uint first, uint end, Row row, M mask, float softcap,
    uint slice, uint lane) {
  for (uint t = first + run * slice; t < end; t += run * slices) {
    attend_run<K, V, has_mask>(state, source, source, 0, t, end, row, mask, softcap, lane);
  }
}

//@ staged: parts
// The same by way of `tile` tokens in the threadgroup's memory.
template <typename K, typename V, bool has_mask, int slices, int tile, typename A,
          typename Source, typename M>
METAL_FUNC void attend(
    thread A& state, Source source, uint first, uint end, Row row, M mask, float softcap,
    threadgroup uint4* scratch, uint me, uint threads, uint slice, uint lane) {
  const auto tokens = source.template staged<tile>((const threadgroup uint*)scratch);
  for (uint base = first; base < end; base += tile) {
    const uint count = metal::min(uint(tile), end - base);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    source.template stage<tile>(base, count, scratch, me, threads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint t = run * slice; t < count; t += run * slices) {
      attend_run<K, V, has_mask>(
          state, tokens, source, base, t, count, row, mask, softcap, lane);
    }
  }
}

//@ heads: parts
// What all threadgroups of a KV head share.
struct Head {
  uint queries;
  uint rows;
  uint batch;
  uint head;
  int sinks;
  int packed;
  int tails;
  int keys;
  int left;
  uint capacity;
  uint splits;
};

template <typename Z, typename C>
METAL_FUNC Head head_of(Z size, uint at, bool fresh, C counts) {
  const uint b = at / uint(size[2]);
  const uint own = b * uint(size[12]);
  const uint place = 14 + b * uint(size[13]);
  const int packs = metal::clamp(int(counts[own]), 0, int(size[place]));
  const int tails = metal::clamp(int(counts[own + 1]), 0, int(size[6]));
  const int sinks = metal::clamp(int(counts[own + 2]), 0, int(size[7]));
  return Head{uint(size[0]),
              uint(size[1]),
              b,
              at % uint(size[2]),
              sinks,
              packs,
              tails,
              sinks + packs + tails + (fresh ? int(size[0]) : 0),
              int(counts[own + 3]),
              uint(size[place]),
              uint(size[place + 1])};
}

// The first key that query `l` of a head sees.
template <typename Z>
METAL_FUNC int first_seen(Z size, Head h, int l) {
  return size[5] ? metal::max(h.left, h.keys - int(h.queries) + l - int(size[5]) + 1) : h.left;
}

template <typename Z>
METAL_FUNC Row row_of(Z size, Head h, uint of) {
  const uint r = metal::min(of, h.rows - 1);
  const uint l = r % h.queries;
  const uint head = h.head * (h.rows / h.queries) + r / h.queries;
  const int last = size[4] ? h.keys - int(h.queries) + int(l) : h.keys;
  const ulong mask = ulong(h.batch) * uint(size[9]) + ulong(head) * uint(size[10]) +
                     ulong(l) * uint(size[11]);
  return Row{first_seen(size, h, int(l)), last, mask, int(size[8])};
}

// The packed tokens of split `at`, from x to y: none from the sequence's own splits on.
template <typename Z>
METAL_FUNC uint2 span_of(Z size, Head h, uint at) {
  const uint end = uint(h.packed);
  const uint first = metal::min(uint(metal::max(first_seen(size, h, 0) - h.sinks, 0)), end) & ~3u;
  const uint each = ((end - first + h.splits - 1) / h.splits + run - 1) / run * run;
  const uint from = metal::min(first + at * each, end);
  return uint2(from, metal::min(from + each, end));
}

//@ packed:
// Compressed rows, as they lie.
template <int row_words>
struct Packed {
  static constexpr constant int words = row_words;
  static constexpr constant int v = 0;
  const device uint* rows;
  uint before;
  METAL_FUNC uint key(uint i) const thread {
    return before + i;
  }
  METAL_FUNC const device uint* keys(uint t) const thread {
    return rows + ulong(t) * words;
  }
  METAL_FUNC const device uint* values(uint t) const thread {
    return keys(t);
  }
  // `first` is a multiple of 4.
  template <int tile>
  METAL_FUNC void stage(
      uint first, uint count, threadgroup uint4* to, uint me, uint threads) const thread {
    const device uint4* from = elements<uint4>(keys(first));
    for (uint i = me; i < (count * words + 3) / 4; i += threads) {
      to[i] = from[i];
    }
  }
  template <int tile>
  METAL_FUNC Rows<words, v, const threadgroup uint*> staged(
      const threadgroup uint* from) const thread {
    return {from};
  }
};

//@ apart:
// Codes, scales and biases in arrays of their own, as MLX quantises: those of one token.
template <typename P, typename N>
struct Pieces {
  P codes;
  N scales;
  N biases;
};

// A side of such tokens, for the others see kv_rows.h.
template <typename C, int group, int align>
struct Apart {
  static constexpr constant bool scaled = true;
  template <typename P>
  static METAL_FUNC void load(P token, uint unit, thread float* v) {
    C::template load<align>(token.codes, unit, v);
  }
  template <typename P>
  static METAL_FUNC float2 scale(P token, uint unit) {
    const uint g = unit * 8 / group;
    return float2(float(token.scales[g]), float(token.biases[g]));
  }
};

// Keys or values, with `words` words of codes and `groups` scales for each token.
template <int words, int groups, typename P, typename N>
struct Array {
  P codes;
  N scales;
  N biases;
  METAL_FUNC Pieces<P, N> at(uint t) const thread {
    return {codes + ulong(t) * words, scales + ulong(t) * groups, biases + ulong(t) * groups};
  }
};

template <typename K, typename V>
struct Arrays {
  K k;
  V v;
  METAL_FUNC auto keys(uint t) const thread {
    return k.at(t);
  }
  METAL_FUNC auto values(uint t) const thread {
    return v.at(t);
  }
};

template <typename P, typename T>
METAL_FUNC void copy_all(P from, threadgroup T* to, uint count, uint me, uint threads) {
  for (uint i = me; i < count; i += threads) {
    to[i] = from[i];
  }
}

template <int k_words, int k_groups, int v_words, int v_groups, typename S>
struct Quantized {
  template <typename P, typename N>
  using Both = Arrays<Array<k_words, k_groups, P, N>, Array<v_words, v_groups, P, N>>;
  Both<const device uint*, const device S*> held;
  METAL_FUNC uint key(uint i) const thread {
    return i;
  }
  METAL_FUNC auto keys(uint t) const thread {
    return held.keys(t);
  }
  METAL_FUNC auto values(uint t) const thread {
    return held.values(t);
  }
  // Each of the arrays has room for `tile` tokens there.
  template <int tile, typename U, typename N>
  static METAL_FUNC Both<U, N> placed(U words, N) {
    const U v = words + tile * k_words;
    const N numbers = (N)(v + tile * v_words);
    const N more = numbers + 2 * tile * k_groups;
    return {{words, numbers, numbers + tile * k_groups}, {v, more, more + tile * v_groups}};
  }
  template <int tile>
  METAL_FUNC auto staged(const threadgroup uint* from) const thread {
    return placed<tile>(from, (const threadgroup S*)from);
  }
  template <int tile>
  METAL_FUNC void stage(
      uint first, uint count, threadgroup uint4* scratch, uint me, uint threads) const thread {
    const auto to = placed<tile>((threadgroup uint*)scratch, (threadgroup S*)scratch);
    const auto k = held.keys(first);
    const auto v = held.values(first);
    copy_all(k.codes, to.k.codes, count * k_words, me, threads);
    copy_all(v.codes, to.v.codes, count * v_words, me, threads);
    copy_all(k.scales, to.k.scales, count * k_groups, me, threads);
    copy_all(k.biases, to.k.biases, count * k_groups, me, threads);
    copy_all(v.scales, to.v.scales, count * v_groups, me, threads);
    copy_all(v.biases, to.v.biases, count * v_groups, me, threads);
  }
};

//@ plain:
// Plain rows of the sink, the tail and what is not yet in the tail.
template <typename S, int dk, int dv, bool has_fresh>
struct Plain {
  static constexpr constant int words = (dk + dv) * sizeof(S) / 4;
  static constexpr constant int v = dk * sizeof(S) / 4;
  const device uint* sink;
  const device uint* tail;
  const device uint* new_keys;
  const device uint* new_values;
  uint sinks;
  uint tails;
  uint between;
  METAL_FUNC uint key(uint i) const thread {
    return i < sinks ? i : i + between;
  }
  METAL_FUNC bool fresh(uint t) const thread {
    return has_fresh && t >= sinks + tails;
  }
  METAL_FUNC const device uint* held(uint t) const thread {
    return t < sinks ? sink + t * words : tail + (t - sinks) * words;
  }
  METAL_FUNC const device uint* keys(uint t) const thread {
    return fresh(t) ? new_keys + (t - sinks - tails) * v : held(t);
  }
  METAL_FUNC const device uint* values(uint t) const thread {
    return fresh(t) ? new_values + (t - sinks - tails) * (words - v) : held(t) + v;
  }
  // Word 4 `at` of token t and the three after it.
  METAL_FUNC uint4 four(uint t, uint at) const thread {
    return at < v / 4 ? elements<uint4>(keys(t))[at] : elements<uint4>(values(t))[at - v / 4];
  }
  template <int tile>
  METAL_FUNC void stage(
      uint first, uint count, threadgroup uint4* to, uint me, uint threads) const thread {
    for (uint i = me; i < count * (words / 4); i += threads) {
      to[i] = four(first + i / (words / 4), i % (words / 4));
    }
  }
  template <int tile>
  METAL_FUNC Rows<words, v, const threadgroup uint*> staged(
      const threadgroup uint* from) const thread {
    return {from};
  }
  // Puts what is not in the tail yet, of `count` tokens, side by side.
  METAL_FUNC void put(uint count, device uint4* to, uint me, uint threads) const thread {
    for (uint i = me; i < count * (words / 4); i += threads) {
      to[i] = four(sinks + tails + i / (words / 4), i % (words / 4));
    }
  }
};

//@ merge:
// Element `i` of one row: the parts of the softmax, and of the logit that has no value, together.
// `size` holds the rows of a KV head, the parts, the queries of a head and the heads of queries.
template <int dv, bool has_sinks, typename T, typename P, typename L, typename Z>
METAL_FUNC void merge_row(
    const device float* sums, P stats, L sinks, Z size, uint row, uint i, device T* out) {
  const uint rows = uint(size[0]);
  const uint parts = uint(size[1]);
  const ulong first = ulong(row / rows) * parts * rows + row % rows;
  const float extra = has_sinks ? float(sinks[row / uint(size[2]) % uint(size[3])]) : 0.0f;
  float most = has_sinks ? extra : -INFINITY;
  for (uint p = 0; p < parts; p++) {
    most = metal::max(most, stats[2 * (first + p * rows)]);
  }
  float total = has_sinks && most > -INFINITY ? metal::fast::exp(extra - most) : 0.0f;
  float sum = 0.0f;
  for (uint p = 0; p < parts; p++) {
    const ulong at = first + p * rows;
    if (stats[2 * at + 1] != 0.0f) {
      const float weight = metal::fast::exp(stats[2 * at] - most);
      total = fma(weight, stats[2 * at + 1], total);
      sum = fma(weight, sums[at * dv + i], sum);
    }
  }
  out[ulong(row) * dv + i] = static_cast<T>(total == 0.0f ? 0.0f : sum / total);
}
