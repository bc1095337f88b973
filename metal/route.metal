// The best experts of a row of logits and their weights: a SIMD-group for each row, of which lane
// i holds experts i + 32 p. `size` holds the experts and how many are chosen, at most 32 of them.

//@ choice:
// Of two experts the one that goes first: the larger logit, or of equal ones the lower number.
// Experts from `end` on are none.
METAL_FUNC bool before(float a, uint at, float b, uint other, uint end) {
  return at < end && (other >= end || a > b || (a == b && at < other));
}

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
  uint taken = 0;  // bit p: the lane's expert p
  uint own = 0;    // of lane r, the expert that was chosen as the r-th
  float score = 0.0f;
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
    // Lanes may differ where a logit is a NaN.
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

//@ gate:
// The weight of an expert that all rows get, from its own logit.
template <typename T, typename P>
METAL_FUNC void gate_row(P gate, uint row, uint lane, device T* shared) {
  if (lane == 0) {
    shared[row] = static_cast<T>(1.0f / (1.0f + metal::fast::exp(-float(gate[row]))));
  }
}
