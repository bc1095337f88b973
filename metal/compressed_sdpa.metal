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
constant constexpr int run = 8;

// One lane's part of n values, each spread over `lanes` lanes, summed: the lane's own value is
// number (lane % lanes) / (lanes / n).
template <int n, int lanes>
METAL_FUNC float folded(thread float* part, uint lane) {
  UNROLL
  for (int h = n / 2; h >= 1; h /= 2) {
    const int bit = lanes / n * h;
    UNROLL
    for (int i = 0; i < h; i++) {
      const float keep = lane & uint(bit) ? part[i + h] : part[i];
      const float send = lane & uint(bit) ? part[i] : part[i + h];
      part[i] = keep + simd_shuffle_xor(send, ushort(bit));
    }
  }
  float sum = part[0];
  UNROLL
  for (int bit = lanes / n / 2; bit >= 1; bit /= 2) {
    sum += simd_shuffle_xor(sum, ushort(bit));
  }
  return sum;
}

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

// The state of a SIMD-group's online softmax. A lane has one score of each run, of row
// (lane / same) % rows.
template <int dk, int dv, int rows>
struct Softmax {
  typedef Spread<dk> Keys;
  typedef Spread<dv> Values;
  static constexpr constant int n = run / Keys::tokens * rows;
  static constexpr constant int same = Keys::lanes / n;
  float q[rows][8 * Keys::each];
  float q_sum[rows][Keys::each];
  float o[rows][8 * Values::each];
  float most;
  float total;

  static uint row(uint lane) {
    return lane / same % rows;
  }
  // The token of a run that a lane's score is of.
  static uint token(uint lane) {
    return lane % Keys::lanes / same / rows * Keys::tokens + lane / Keys::lanes;
  }
  // The lane that has the score of a token of a run.
  static uint lane_of(uint token, uint row) {
    return token % Keys::tokens * Keys::lanes + (token / Keys::tokens * rows + row) * same;
  }

  void start() thread {
    most = -INFINITY;
    total = 0.0f;
    UNROLL
    for (int r = 0; r < rows; r++) {
      UNROLL
      for (int i = 0; i < 8 * Values::each; i++) {
        o[r][i] = 0.0f;
      }
    }
  }

  template <typename T>
  void load(const device T* from, uint first, uint end, float scale, uint lane) thread {
    UNROLL
    for (int r = 0; r < rows; r++) {
      UNROLL
      for (int j = 0; j < Keys::each; j++) {
        const uint unit = Keys::unit(lane, j);
        const bool here = first + r < end && unit < uint(Keys::units);
        UNROLL
        for (int e = 0; e < 8; e++) {
          q[r][8 * j + e] = here ? scale * float(from[(first + r) * dk + 8 * unit + e]) : 0.0f;
        }
      }
    }
  }

  // The queries as the keys are, and their sums for the bias.
  template <int block>
  void prepare(uint lane) thread {
    UNROLL
    for (int r = 0; r < rows; r++) {
      hadamard<dk, block>(q[r], lane);
      UNROLL
      for (int j = 0; j < Keys::each; j++) {
        q_sum[r][j] = 0.0f;
        UNROLL
        for (int e = 0; e < 8; e++) {
          q_sum[r][j] += q[r][8 * j + e];
        }
      }
    }
  }

  template <typename K, int words>
  float score(const threadgroup uint* tile, uint first, uint count, uint lane) const thread {
    float part[n];
    UNROLL
    for (int i = 0; i < run / Keys::tokens; i++) {
      UNROLL
      for (int r = 0; r < rows; r++) {
        part[i * rows + r] = 0.0f;
      }
      const uint t = first + i * Keys::tokens + lane / Keys::lanes;
      if (t < count) {
        UNROLL
        for (int j = 0; j < Keys::each; j++) {
          // A lane beyond the last unit has queries of zeros.
          const uint unit = metal::min(Keys::unit(lane, j), uint(Keys::units - 1));
          const threadgroup uint* from = tile + t * words;
          float v[8];
          K::load(from, unit, v);
          float2 scale = float2(1.0f, 0.0f);
          if constexpr (K::scaled) {
            scale = K::scale(from, unit);
          }
          UNROLL
          for (int r = 0; r < rows; r++) {
            float sum = 0.0f;
            UNROLL
            for (int e = 0; e < 8; e++) {
              sum = fma(v[e], q[r][8 * j + e], sum);
            }
            if constexpr (K::scaled) {
              sum = fma(scale.x, sum, scale.y * q_sum[r][j]);
            }
            part[i * rows + r] += sum;
          }
        }
      }
    }
    return folded<n, Keys::lanes>(part, lane);
  }

  // The weight of a lane's score; the sums so far are scaled to the new largest score.
  float weigh(float score) thread {
    float now = metal::max(most, score);
    UNROLL
    for (int bit = same * rows; bit < 32; bit *= 2) {
      now = metal::max(now, simd_shuffle_xor(now, ushort(bit)));
    }
    const float shift = now == -INFINITY ? 0.0f : now;
    const float decay = most == -INFINITY ? 0.0f : metal::fast::exp(most - shift);
    const float p = score == -INFINITY ? 0.0f : metal::fast::exp(score - shift);
    total = fma(total, decay, p);
    most = now;
    UNROLL
    for (int r = 0; r < rows; r++) {
      const float d = simd_shuffle(decay, ushort(lane_of(0, r)));
      UNROLL
      for (int i = 0; i < 8 * Values::each; i++) {
        o[r][i] *= d;
      }
    }
    return p;
  }

  template <typename V, int words>
  void add(const threadgroup uint* tile, uint first, uint count, float p, uint lane) thread {
    UNROLL
    for (int i = 0; i < run / Values::tokens; i++) {
      const uint token = i * Values::tokens + lane / Values::lanes;
      float weight[rows];
      UNROLL
      for (int r = 0; r < rows; r++) {
        weight[r] = simd_shuffle(p, ushort(lane_of(token, r)));
      }
      if (first + token < count) {
        UNROLL
        for (int j = 0; j < Values::each; j++) {
          const uint unit = metal::min(Values::unit(lane, j), uint(Values::units - 1));
          const threadgroup uint* from = tile + (first + token) * words;
          float v[8];
          V::load(from, unit, v);
          if constexpr (V::scaled) {
            const float2 scale = V::scale(from, unit);
            UNROLL
            for (int e = 0; e < 8; e++) {
              v[e] = fma(scale.x, v[e], scale.y);
            }
          }
          UNROLL
          for (int r = 0; r < rows; r++) {
            UNROLL
            for (int e = 0; e < 8; e++) {
              o[r][8 * j + e] = fma(weight[r], v[e], o[r][8 * j + e]);
            }
          }
        }
      }
    }
  }

  // Sums over the lanes, turned back, and written for the rows from `first` to `end`.
  template <int block>
  void finish(device float* sums, device float* stats, uint first, uint end, uint lane) thread {
    UNROLL
    for (int bit = same * rows; bit < 32; bit *= 2) {
      total += simd_shuffle_xor(total, ushort(bit));
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
      UNROLL
      for (int i = 0; i < 8 * Values::each; i++) {
        UNROLL
        for (int bit = Values::lanes; bit < 32; bit *= 2) {
          o[r][i] += simd_shuffle_xor(o[r][i], ushort(bit));
        }
      }
      hadamard<dv, block>(o[r], lane);
      if (first + r < end) {
        UNROLL
        for (int j = 0; j < Values::each; j++) {
          const uint unit = Values::unit(lane, j);
          if (lane < uint(Values::lanes) && unit < uint(Values::units)) {
            UNROLL
            for (int q = 0; q < 2; q++) {
              *(device float4*)(sums + (first + r) * dv + 8 * unit + 4 * q) =
                  float4(o[r][8 * j + 4 * q], o[r][8 * j + 4 * q + 1], o[r][8 * j + 4 * q + 2],
                         o[r][8 * j + 4 * q + 3]);
            }
          }
        }
      }
    }
    if (lane == lane_of(0, row(lane)) && first + row(lane) < end) {
      stats[2 * (first + row(lane))] = most;
      stats[2 * (first + row(lane)) + 1] = total;
    }
  }
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

//@ merge:
// Element `i` of one row: the parts of the softmax, and of the logit that has no value, together.
// `size` holds the rows of a KV head, the parts, the queries of a head and the heads of queries.
template <int dv, bool has_sinks, typename T, typename Z, typename L>
METAL_FUNC void merge_row(
    const device float* sums, const device float* stats, L sinks, Z size, uint row, uint i,
    device T* out) {
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
