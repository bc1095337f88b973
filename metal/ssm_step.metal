// One token of Mamba-2's recurrence. A threadgroup for each head, of which a SIMD-group updates four
// rows of the state at once; each lane holds `pieces` values of a row. `whole`: rows have 32 `pieces`
// values and begin at a multiple of four.

// `sizes` holds the heads, the groups of heads that share B and C, and the sizes of a row of the
// state and of a head; `numbers` the least and the greatest step.
template <
    int pieces, bool whole, typename T, typename Q, typename A, typename L, typename D,
    typename K, typename H, typename N, typename S>
METAL_FUNC void ssm_step(
    Q xbc, A dt, L a_log, D dt_bias, K skip, H state, N numbers, S sizes, uint head, uint sequence,
    uint group, uint groups, uint lane, device T* y, device float* next) {
  const uint heads = uint(sizes[0]);
  const uint parts = uint(sizes[1]);
  const uint columns = uint(sizes[2]);
  const uint size = uint(sizes[3]);
  const ulong inner = ulong(heads) * size;
  const ulong first = sequence * (inner + 2 * ulong(parts) * columns);
  const ulong shared = first + inner + ulong(head / (heads / parts)) * columns;
  float b[pieces];
  float c[pieces];
  load_piece<pieces, whole, T>(xbc + shared, columns, lane, b);
  load_piece<pieces, whole, T>(xbc + shared + ulong(parts) * columns, columns, lane, c);
  const float wanted = softplus(float(dt[sequence * heads + head]) + float(dt_bias[head]));
  const float step = metal::clamp(wanted, numbers[0], numbers[1]);
  const float decay = metal::precise::exp(-metal::precise::exp(float(a_log[head])) * step);
  const float through = float(skip[head]);
  const ulong rows = (ulong(sequence) * heads + head) * size;
  for (uint at = 4 * group; at < size; at += 4 * groups) {
    UNROLL
    for (int r = 0; r < 4; r++) {
      const uint row = metal::min(at + r, size - 1);
      const float x = float(xbc[first + ulong(head) * size + row]);
      float held[pieces];
      load_piece<pieces, whole, float>(state + (rows + row) * columns, columns, lane, held);
      UNROLL
      for (int p = 0; p < pieces; p++) {
        held[p] = fma(x * step, b[p], decay * held[p]);
      }
      const float read = simd_sum(product<pieces>(held, c));
      if (at + r < size) {
        store_piece<pieces, whole>(held, columns, lane, next + (rows + row) * columns);
        if (lane == 0) {
          y[rows + row] = static_cast<T>(fma(x, through, read));
        }
      }
    }
  }
}
