// Attention of a few queries over compressed keys and values.
//
// The rows of the problem are the queries of all heads that share a KV head. A threadgroup takes
// some of a KV head's tokens, or the plain ones, and up to 32 rows: it copies the packed tokens
// to its own memory tile by tile, whole and once, and its SIMD-groups decode them from there.
// SIMD-group (group, slice) has `rows` rows and every `slices`-th run of `run` tokens.
//
// `size` holds the queries of a head, the rows, the KV heads, the splits, whether attention is
// causal, the window (0: none), the capacities of `rows`, `tail` and `sink`, the keys in the mask
// and its strides of batch, head and query, then the strides in the batch of the lengths of
// `rows`, `tail` and `sink` and of the left padding.

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

// The tokens from `first` to `end` of a source.
template <typename K, typename V, bool has_mask, int words, int tile, int slices, typename A,
          typename Source, typename M>
METAL_FUNC void attend(
    thread A& state, Source source, uint first, uint end, Row row, M mask, float softcap,
    threadgroup uint4* scratch, uint me, uint threads, uint slice, uint lane) {
  const threadgroup uint* tokens = (const threadgroup uint*)scratch;
  for (uint base = first; base < end; base += tile) {
    const uint count = metal::min(uint(tile), end - base);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    source.stage(base, count, scratch, me, threads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint t = run * slice; t < count; t += run * slices) {
      float score = state.template score<K, words>(tokens, t, count, lane);
      const uint token = t + A::token(lane);
      const int key = int(source.key(base + token));
      if (softcap > 0.0f) {
        score = softcap * metal::precise::tanh(score / softcap);
      }
      const bool seen = token < count && key >= row.first && key <= row.last && key < row.keys;
      if (!seen) {
        score = -INFINITY;
      } else if (has_mask) {
        score = masked(score, mask[row.mask + key]);
      }
      state.template add<V, words>(tokens, t, count, state.weigh(score), lane);
    }
  }
}

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
};

template <typename Z, typename A, typename B, typename C, typename D>
METAL_FUNC Head head_of(Z size, uint at, bool fresh, A packed, B tail, C sink, D left) {
  const uint b = at / uint(size[2]);
  const int packs = metal::clamp(int(packed[b * uint(size[13])]), 0, int(size[6]));
  const int tails = metal::clamp(int(tail[b * uint(size[14])]), 0, int(size[7]));
  const int sinks = metal::clamp(int(sink[b * uint(size[15])]), 0, int(size[8]));
  return Head{uint(size[0]),
              uint(size[1]),
              b,
              at % uint(size[2]),
              sinks,
              packs,
              tails,
              sinks + packs + tails + (fresh ? int(size[0]) : 0),
              int(left[b * uint(size[16])])};
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
  const ulong mask = ulong(h.batch) * uint(size[10]) + ulong(head) * uint(size[11]) +
                     ulong(l) * uint(size[12]);
  return Row{first_seen(size, h, int(l)), last, mask, int(size[9])};
}

// The packed tokens of split `at`: from x to y.
template <typename Z>
METAL_FUNC uint2 span_of(Z size, Head h, uint at) {
  const uint splits = uint(size[3]);
  const uint end = uint(h.packed);
  const uint first = metal::min(uint(metal::max(first_seen(size, h, 0) - h.sinks, 0)), end) & ~3u;
  const uint each = ((end - first + splits - 1) / splits + run - 1) / run * run;
  const uint from = metal::min(first + at * each, end);
  return uint2(from, metal::min(from + each, end));
}

//@ packed:
// Compressed rows, as they lie.
template <int words>
struct Packed {
  const device uint* rows;
  uint before;
  uint key(uint i) const {
    return before + i;
  }
  // `first` is a multiple of 4.
  void stage(uint first, uint count, threadgroup uint4* to, uint me, uint threads) const {
    const device uint4* from = (const device uint4*)(rows + ulong(first) * words);
    for (uint i = me; i < (count * words + 3) / 4; i += threads) {
      to[i] = from[i];
    }
  }
};

//@ plain:
// Plain rows of the sink, the tail and what is not yet in the tail, which is put side by side there.
template <typename S, int dk, int dv, bool has_fresh>
struct Plain {
  static constexpr constant uint width = (dk + dv) * sizeof(S) / 16;
  static constexpr constant uint k_width = dk * sizeof(S) / 16;
  const device uint4* sink;
  const device uint4* tail;
  const device uint4* k;
  const device uint4* v;
  device uint4* fresh;
  bool writes;
  uint sinks;
  uint tails;
  uint between;
  uint key(uint i) const {
    return i < sinks ? i : i + between;
  }
  void stage(uint first, uint count, threadgroup uint4* to, uint me, uint threads) const {
    for (uint i = me; i < count * width; i += threads) {
      const uint t = first + i / width;
      const uint at = i % width;
      if (t < sinks) {
        to[i] = sink[t * width + at];
      } else if (!has_fresh || t < sinks + tails) {
        to[i] = tail[(t - sinks) * width + at];
      } else {
        const uint f = t - sinks - tails;
        to[i] = at < k_width ? k[f * k_width + at] : v[f * (width - k_width) + at - k_width];
        if (writes) {
          fresh[f * width + at] = to[i];
        }
      }
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
