// The best experts of a row of logits and their weights: a SIMD-group for each row, of which lane
// i holds experts i + 32 p. `size` holds the experts and how many are chosen, at most 32 of them.

//@ choice:
// Of two experts the one that goes first: the larger logit, or of equal ones the lower number.
// Experts from `end` on are none.
METAL_FUNC bool before(float a, uint at, float b, uint other, uint end) {
  return at < end && (other >= end || a > b || (a == b && at < other));
}

// The `chosen` experts that go first, from v with a lane's experts: lane r gets the r-th one's
// number and value.
template <int pieces>
METAL_FUNC void choose(
    const thread float* v, uint end, uint chosen, uint lane, thread uint& own,
    thread float& score) {
  uint taken = 0;  // bit p: the lane's expert p
  for (uint r = 0; r < chosen; r++) {
    float best = -INFINITY;
    uint at = end;
    UNROLL
    for (int p = 0; p < pieces; p++) {
      const uint e = (taken >> p) & 1 ? end : lane + 32 * p;
      if (before(v[p], e, best, at, end)) {
        best = v[p];
        at = e;
      }
    }
    UNROLL
    for (int bit = 16; bit >= 1; bit /= 2) {
      const float b = simd_shuffle_xor(best, ushort(bit));
      const uint other = simd_shuffle_xor(at, ushort(bit));
      if (before(b, other, best, at, end)) {
        best = b;
        at = other;
      }
    }
    // Lanes may differ where a value is a NaN.
    at = simd_broadcast_first(at);
    best = simd_broadcast_first(best);
    if (at % 32 == lane) {
      taken |= 1u << (at / 32);
    }
    if (lane == r) {
      own = at;
      score = best;
    }
  }
}

//@ softmax: choice
// `whole`: weights are those of a softmax over all experts, else over the chosen ones.
// `multiplied`: each is multiplied by its expert's factor.
template <
    int pieces, bool whole, bool multiplied, typename T, typename P, typename F, typename Z>
METAL_FUNC void route(
    P logits, F factors, Z size, uint row, uint lane, device uint* ids, device T* scores) {
  const uint end = uint(size[0]);
  const uint chosen = uint(size[1]);
  float v[pieces];
  float most = -INFINITY;
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const uint e = lane + 32 * p;
    v[p] = e < end ? float(logits[ulong(row) * end + e]) : -INFINITY;
    most = metal::max(most, v[p]);
  }
  most = simd_max(most);
  float total = 0.0f;
  if (whole) {
    UNROLL
    for (int p = 0; p < pieces; p++) {
      total += lane + 32 * p < end ? metal::fast::exp(v[p] - most) : 0.0f;
    }
    total = simd_sum(total);
  }
  uint own = 0;
  float score = 0.0f;
  choose<pieces>(v, end, chosen, lane, own, score);
  const float weight = lane < chosen ? metal::fast::exp(score - most) : 0.0f;
  if (!whole) {
    total = simd_sum(weight);
  }
  if (lane < chosen) {
    const ulong to = ulong(row) * chosen + lane;
    ids[to] = own;
    const float share = weight / total;
    scores[to] = static_cast<T>(multiplied ? share * float(factors[own]) : share);
  }
}

//@ sigmoid: choice
// The sum of the two largest values of a group of experts; -INFINITY stands for none.
template <int pieces>
METAL_FUNC float best_two(const thread float* v, uint first, uint last, uint lane) {
  float most = -INFINITY;
  float second = -INFINITY;
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const uint e = lane + 32 * p;
    const float own = e >= first && e < last ? v[p] : -INFINITY;
    second = metal::max(second, metal::min(most, own));
    most = metal::max(most, own);
  }
  UNROLL
  for (int bit = 16; bit >= 1; bit /= 2) {
    const float a = simd_shuffle_xor(most, ushort(bit));
    const float b = simd_shuffle_xor(second, ushort(bit));
    second = metal::max(metal::max(second, b), metal::min(most, a));
    most = metal::max(most, a);
  }
  return most + second;
}

// Values of groups that are not among the best `kept` of `groups` become zeros.
template <int pieces>
METAL_FUNC void drop_groups(thread float* v, uint end, uint groups, uint kept, uint lane) {
  const uint each = end / groups;
  float own = -INFINITY;
  for (uint g = 0; g < groups; g++) {
    const float found = best_two<pieces>(v, g * each, (g + 1) * each, lane);
    own = lane == g ? found : own;
  }
  // Of equal groups the one with the lower number is dropped first, as MLX sorts them.
  uint rank = 0;
  for (uint g = 0; g < groups; g++) {
    const float other = simd_shuffle(own, ushort(g));
    rank += other < own || (other == own && g < lane) ? 1 : 0;
  }
  const bool stays = rank >= groups - kept;
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const uint e = lane + 32 * p;
    const bool held = simd_shuffle(uint(stays), ushort(metal::min(e / each, groups - 1))) != 0;
    v[p] = held ? v[p] : 0.0f;
  }
}

// Experts by the sigmoid of their logits plus a bias, which the weights do without. `size` also
// holds the groups and how many of them stay, `numbers` the factor of the weights and what is
// added to their sum.
template <
    int pieces, bool grouped, bool whole, typename T, typename P, typename B, typename N,
    typename Z>
METAL_FUNC void route_sigmoid(
    P logits, B bias, N numbers, Z size, uint row, uint lane, device uint* ids, device T* scores) {
  const uint end = uint(size[0]);
  const uint chosen = uint(size[1]);
  float v[pieces];
  UNROLL
  for (int p = 0; p < pieces; p++) {
    const uint e = lane + 32 * p;
    v[p] = -INFINITY;
    if (e < end) {
      const float x = float(logits[ulong(row) * end + e]);
      v[p] = 1.0f / (1.0f + metal::precise::exp(-x)) + float(bias[e]);
    }
  }
  if (grouped) {
    drop_groups<pieces>(v, end, uint(size[2]), uint(size[3]), lane);
  }
  uint own = 0;
  float score = 0.0f;
  choose<pieces>(v, end, chosen, lane, own, score);
  float weight = 0.0f;
  if (lane < chosen) {
    const float x = float(logits[ulong(row) * end + own]);
    weight = 1.0f / (1.0f + metal::precise::exp(-x));
  }
  if (!whole) {
    weight /= simd_sum(weight) + numbers[1];
  }
  if (lane < chosen) {
    const ulong to = ulong(row) * chosen + lane;
    ids[to] = own;
    scores[to] = static_cast<T>(weight * numbers[0]);
  }
}

//@ gate:
// The weight of an expert that all rows get, from its own logit.
template <typename T, typename P>
METAL_FUNC void gate_row(P gate, uint row, uint lane, device T* shared) {
  if (lane == 0) {
    shared[row] = static_cast<T>(1.0f / (1.0f + metal::fast::exp(-float(gate[row]))));
  }
}
