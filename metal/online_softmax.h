// The softmax of a SIMD-group over tokens that come run by run, and the sum of their values.
// Keys and values are decoded by the sides of kv_rows.h; all is computed in float32.

constant constexpr int run = 8;

// Of two values that lanes have a part of, a lane goes on with the one that its bit chooses.
METAL_FUNC float halved(float a, float b, int bit, uint lane) {
  const float keep = lane & uint(bit) ? b : a;
  const float send = lane & uint(bit) ? a : b;
  return keep + simd_shuffle_xor(send, ushort(bit));
}

// The same of n values, n / 2 apart, down to one.
template <int n, int bit>
METAL_FUNC float folded(thread float* part, uint lane) {
  if constexpr (n == 1) {
    return part[0];
  } else {
    UNROLL
    for (int i = 0; i < n / 2; i++) {
      part[i] = halved(part[i], part[i + n / 2], bit, lane);
    }
    return folded<n / 2, bit / 2>(part, lane);
  }
}

// The state of a SIMD-group's online softmax. A lane has one score of each run, of row
// (lane / same) % rows.
template <int dk, int dv, int rows>
struct Softmax {
  typedef Spread<dk> Keys;
  typedef Spread<dv> Values;
  static constexpr constant int n = run / Keys::tokens * rows;
  static constexpr constant int same = Keys::lanes / n;
  // Whether a key's bias multiplies the sum of the queries; with many rows, that costs more
  // registers than it saves.
  static constexpr constant bool many = rows * Keys::each > 2;
  float q[rows][8 * Keys::each];
  float q_sum[rows][Keys::each];
  float o[rows][8 * Values::each];
  float most;
  float total;

  static METAL_FUNC uint row(uint lane) {
    return lane / same % rows;
  }
  // The token of a run that a lane's score is of.
  static METAL_FUNC uint token(uint lane) {
    return lane % Keys::lanes / same / rows * Keys::tokens + lane / Keys::lanes;
  }
  // The lane that has the score of a token of a run.
  static METAL_FUNC uint lane_of(uint token, uint row) {
    return token % Keys::tokens * Keys::lanes + (token / Keys::tokens * rows + row) * same;
  }

  METAL_FUNC void start() thread {
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

  // The queries, of which `left` are there.
  template <typename T>
  METAL_FUNC void load(const device T* from, uint left, float scale, uint lane) thread {
    UNROLL
    for (int r = 0; r < rows; r++) {
      UNROLL
      for (int j = 0; j < Keys::each; j++) {
        const uint unit = Keys::unit(lane, j);
        const bool here = uint(r) < left && unit < uint(Keys::units);
        UNROLL
        for (int i = 0; i < 2; i++) {
          float4 four = float4(0.0f);
          if (here) {
            four = float4(*(const device vec<T, 4>*)(from + r * dk + 8 * unit + 4 * i));
          }
          UNROLL
          for (int e = 0; e < 4; e++) {
            q[r][8 * j + 4 * i + e] = scale * four[e];
          }
        }
      }
    }
  }

  // The queries as the keys are, and their sums for the bias.
  template <int block>
  METAL_FUNC void prepare(uint lane) thread {
    UNROLL
    for (int r = 0; r < rows; r++) {
      hadamard<dk, block>(q[r], lane);
      UNROLL
      for (int j = 0; j < (many ? 0 : Keys::each); j++) {
        q_sum[r][j] = 0.0f;
        UNROLL
        for (int e = 0; e < 8; e++) {
          q_sum[r][j] += q[r][8 * j + e];
        }
      }
    }
  }

  // A lane's parts of the scores of `count` tokens, of which lane bits below `bit` choose one.
  template <typename K, int count, int bit, typename Rows>
  METAL_FUNC void dots(Rows tokens, uint t, uint end, uint lane, thread float* part) const thread {
    if constexpr (count > 1) {
      float later[rows];
      dots<K, count / 2, bit / 2>(tokens, t, end, lane, part);
      dots<K, count / 2, bit / 2>(tokens, t + count / 2 * Keys::tokens, end, lane, later);
      UNROLL
      for (int r = 0; r < rows; r++) {
        part[r] = halved(part[r], later[r], bit, lane);
      }
    } else {
      UNROLL
      for (int r = 0; r < rows; r++) {
        part[r] = 0.0f;
      }
      if (t < end) {
        UNROLL
        for (int j = 0; j < Keys::each; j++) {
          // A lane beyond the last unit has queries of zeros.
          const uint unit = metal::min(Keys::unit(lane, j), uint(Keys::units - 1));
          float v[8];
          K::load(tokens.keys(t), unit, v);
          float2 scale = float2(1.0f, 0.0f);
          if constexpr (K::scaled) {
            scale = K::scale(tokens.keys(t), unit);
          }
          if constexpr (K::scaled && many) {
            UNROLL
            for (int e = 0; e < 8; e++) {
              v[e] = fma(scale.x, v[e], scale.y);
            }
          }
          UNROLL
          for (int r = 0; r < rows; r++) {
            float sum = 0.0f;
            UNROLL
            for (int e = 0; e < 8; e++) {
              sum = fma(v[e], q[r][8 * j + e], sum);
            }
            if constexpr (K::scaled && !many) {
              sum = fma(scale.x, sum, scale.y * q_sum[r][j]);
            }
            part[r] += sum;
          }
        }
      }
    }
  }

  // Of a lane's token of the run from `first` on and its row; tokens from `end` on have any score.
  template <typename K, typename Rows>
  METAL_FUNC float score(Rows tokens, uint first, uint end, uint lane) const thread {
    constexpr int count = run / Keys::tokens;
    // Of many rows there are few tokens at once, so that their parts are in registers.
    constexpr int few = many ? 1 : count;
    float found = 0.0f;
    _Pragma("clang loop unroll(disable)")
    for (int i = 0; i < count; i += few) {
      float part[rows];
      const uint t = first + i * Keys::tokens + lane / Keys::lanes;
      dots<K, few, same * rows * few / 2>(tokens, t, end, lane, part);
      float sum = folded<rows, same * rows / 2>(part, lane);
      UNROLL
      for (int bit = same / 2; bit >= 1; bit /= 2) {
        sum += simd_shuffle_xor(sum, ushort(bit));
      }
      UNROLL
      for (int bit = same * rows * few; bit < Keys::lanes; bit *= 2) {
        sum += simd_shuffle_xor(sum, ushort(bit));
      }
      found = lane % Keys::lanes / (same * rows * few) == uint(i / few) ? sum : found;
    }
    return found;
  }

  // The weight of a lane's score. Where it is larger than all before, in any row, the sums so far
  // are scaled to it; that is seldom after the first runs.
  METAL_FUNC float weigh(float score) thread {
    float now = metal::max(most, score);
    UNROLL
    for (int bit = same * rows; bit < 32; bit *= 2) {
      now = metal::max(now, simd_shuffle_xor(now, ushort(bit)));
    }
    const float shift = now == -INFINITY ? 0.0f : now;
    if (simd_any(now > most)) {
      const float decay = most == -INFINITY ? 0.0f : metal::fast::exp(most - shift);
      total *= decay;
      UNROLL
      for (int r = 0; r < rows; r++) {
        const float own = simd_shuffle(decay, ushort(lane_of(0, r)));
        UNROLL
        for (int i = 0; i < 8 * Values::each; i++) {
          o[r][i] *= own;
        }
      }
    }
    most = now;
    const float p = score == -INFINITY ? 0.0f : metal::fast::exp(score - shift);
    total += p;
    return p;
  }

  // The values of the run from `first` on, times a lane's weight p of its token and row.
  template <typename V, typename Rows>
  METAL_FUNC void add(Rows tokens, uint first, uint end, float p, uint lane) thread {
    _Pragma("clang loop unroll(disable)")
    for (int i = 0; i < run / Values::tokens; i++) {
      const uint token = i * Values::tokens + lane / Values::lanes;
      float weight[rows];
      UNROLL
      for (int r = 0; r < rows; r++) {
        weight[r] = simd_shuffle(p, ushort(lane_of(token, r)));
      }
      if (first + token < end) {
        UNROLL
        for (int j = 0; j < Values::each; j++) {
          const uint unit = metal::min(Values::unit(lane, j), uint(Values::units - 1));
          float v[8];
          V::load(tokens.values(first + token), unit, v);
          if constexpr (V::scaled) {
            const float2 scale = V::scale(tokens.values(first + token), unit);
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

  // Sums over the lanes, and over the SIMD-groups of the same rows; slice 0 has them then. `room`
  // is those SIMD-groups' own.
  template <int slices>
  METAL_FUNC void join(threadgroup float* room, uint slice, uint lane) thread {
    constexpr int width = 8 * Values::each * Values::lanes;
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
    }
    const uint own = row(lane);
    for (uint s = 1; s < slices; s++) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (slice == s) {
        UNROLL
        for (int i = 0; i < rows * 8 * Values::each; i++) {
          if (lane < uint(Values::lanes)) {
            room[i * Values::lanes + lane] = o[i / (8 * Values::each)][i % (8 * Values::each)];
          }
        }
        if (lane == lane_of(0, own)) {
          room[rows * width + 2 * own] = most;
          room[rows * width + 2 * own + 1] = total;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (slice == 0) {
        const float other = room[rows * width + 2 * own];
        const float now = metal::max(most, other);
        const float mine = most == -INFINITY ? 0.0f : metal::fast::exp(most - now);
        const float theirs = other == -INFINITY ? 0.0f : metal::fast::exp(other - now);
        most = now;
        total = fma(theirs, room[rows * width + 2 * own + 1], mine * total);
        UNROLL
        for (int r = 0; r < rows; r++) {
          const float a = simd_shuffle(mine, ushort(lane_of(0, r)));
          const float b = simd_shuffle(theirs, ushort(lane_of(0, r)));
          UNROLL
          for (int i = 0; i < 8 * Values::each; i++) {
            const uint at = (r * 8 * Values::each + i) * Values::lanes + lane % Values::lanes;
            o[r][i] = fma(b, room[at], a * o[r][i]);
          }
        }
      }
    }
  }

  // Turns the sums back to what values were before their rotation.
  template <int block>
  METAL_FUNC void turn(uint lane) thread {
    UNROLL
    for (int r = 0; r < rows; r++) {
      hadamard<dv, block>(o[r], lane);
    }
  }

  // Writes the sums of the rows, of which `left` are there.
  METAL_FUNC void finish(
      device float* sums, device float* stats, uint left, uint lane) const thread {
    UNROLL
    for (int r = 0; r < rows; r++) {
      const bool here = uint(r) < left && lane < uint(Values::lanes);
      UNROLL
      for (int j = 0; j < Values::each; j++) {
        write_unit<Values>(sums + r * dv, o[r] + 8 * j, j, here, lane);
      }
    }
    const uint own = row(lane);
    if (lane == lane_of(0, own) && own < left) {
      stats[2 * own] = most;
      stats[2 * own + 1] = total;
    }
  }

  // Writes the results of the rows, of which `left` are there, where no other part has tokens.
  template <typename T>
  METAL_FUNC void finish_whole(device T* out, uint left, uint lane) thread {
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    UNROLL
    for (int r = 0; r < rows; r++) {
      const float own = simd_shuffle(inverse, ushort(lane_of(0, r)));
      UNROLL
      for (int i = 0; i < 8 * Values::each; i++) {
        o[r][i] *= own;
      }
      const bool here = uint(r) < left && lane < uint(Values::lanes);
      UNROLL
      for (int j = 0; j < Values::each; j++) {
        write_unit<Values>(out + r * dv, o[r] + 8 * j, j, here, lane);
      }
    }
  }
};
