// quantized_matmul's tiles by Metal 4's tensor operations: macOS 26.2 and an M5. Only the products
// themselves are other than in the section `tiles`, and the order in which lanes hold the sums.
//
// A SIMD-group multiplies 16 rows of x by 32 rows of W. Lane l holds 4 neighbours of each of two
// rows, 8 apart, of a piece of 16 x 16; of W and of the sums two such pieces.
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

METAL_FUNC uint piece_row(uint lane) {
  return (lane / 4 & 4) + (lane / 2 & 3);
}
METAL_FUNC uint piece_column(uint lane) {
  return (lane / 4 & 2) * 4 + (lane & 1) * 4;
}

// A lane's share of a piece that begins at `from`.
template <typename T>
METAL_FUNC void load_piece(const threadgroup T* from, uint pitch, uint lane, thread T* to) {
  from += piece_row(lane) * pitch + piece_column(lane);
  UNROLL
  for (int r = 0; r < 2; r++) {
    const vec<T, 4> v = *(const threadgroup vec<T, 4>*)(from + r * 8 * pitch);
    UNROLL
    for (int i = 0; i < 4; i++) {
      to[4 * r + i] = v[i];
    }
  }
}

// sums += a b^T, by all lanes of a SIMD-group.
template <typename T>
METAL_FUNC void multiply_pieces(const thread T* a, const thread T* b, thread float* sums) {
  constexpr auto shape = mpp::tensor_ops::matmul2d_descriptor(
      16, 32, 16, false, true, true,
      mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<shape, metal::execution_simdgroup> product;
  auto left = product.template get_left_input_cooperative_tensor<T, T, float>();
  auto right = product.template get_right_input_cooperative_tensor<T, T, float>();
  auto result = product.template get_destination_cooperative_tensor<
      decltype(left), decltype(right), float>();
  UNROLL
  for (int i = 0; i < 8; i++) {
    left[i] = a[i];
  }
  UNROLL
  for (int i = 0; i < 16; i++) {
    right[i] = b[i];
    result[i] = sums[i];
  }
  product.run(left, right, result);
  UNROLL
  for (int i = 0; i < 16; i++) {
    sums[i] = result[i];
  }
}

// Rows `to` to `rows` - 1 of x, `many` at most, by 64 rows of W (gated: 32 of the gate's and 32 of
// up's): two SIMD-groups side by side along W, all pairs along x.
template <
    typename F, typename G, int many, int groups, typename Y, typename T, typename P, typename Q>
METAL_FUNC void tensor_rows(
    P p, Q q, const device T* x, uint columns, Y y, uint tile, uint to, uint rows, uint group,
    uint me, threadgroup float4* scratch) {
  constexpr int depth = Step<T, many>::depth;
  constexpr int pitch = Step<T, many>::pitch;
  constexpr uint count = Y::gated ? 32 : 64;  // of a part's rows
  constexpr uint width = count / 2;           // columns of a SIMD-group's results
  constexpr uint next = Y::gated ? count : 16;  // rows of W from its first piece to its second
  constexpr int down = many / (8 * groups);   // pieces of a SIMD-group along x
  const uint lane = me % 32;
  const uint row = (tile - y.a.tile) * count;
  const uint here = rows - to;
  const uint filled = metal::min((here + 15) / 16 * 16, uint(many));
  x += ulong(to) * columns;
  threadgroup T* xs = (threadgroup T*)scratch;
  threadgroup T* ws = xs + many * pitch;
  float sums[down][16];
  UNROLL
  for (int i = 0; i < down; i++) {
    UNROLL
    for (int e = 0; e < 16; e++) {
      sums[i][e] = 0.0f;
    }
  }
  for (uint k = 0; k < columns; k += depth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage_step<F, G, many, 64, groups>(p, q, x, columns, y, row, k, here, filled, me, xs, ws);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int kk = 0; kk < depth; kk += 16) {
      T b[16];
      UNROLL
      for (int j = 0; j < 2; j++) {
        const threadgroup T* from = ws + (group % 2 * width + j * next) * pitch + kk;
        load_piece(from, pitch, lane, b + 8 * j);
      }
      UNROLL
      for (int i = 0; i < down; i++) {
        const uint m = 16 * (i * (groups / 2) + group / 2);
        if (m < here) {
          T a[8];
          load_piece(xs + m * pitch + kk, pitch, lane, a);
          multiply_pieces(a, b, sums[i]);
        }
      }
    }
  }
  UNROLL
  for (int i = 0; i < down; i++) {
    UNROLL
    for (int e = 0; e < (Y::gated ? 8 : 16); e++) {
      const uint m = 16 * (i * (groups / 2) + group / 2) + piece_row(lane) + e / 4 % 2 * 8;
      const uint n = row + group % 2 * width + e / 8 * 16 + piece_column(lane) + e % 4;
      if (m < here && n < y.a.rows) {
        put(y, sums[i][e], Y::gated ? sums[i][e % 8 + 8] : 0.0f, n, to + m);
      }
    }
  }
}

//@ matrix:
template <
    typename F, typename G, int many, int across, int groups, typename Y, typename T, typename P,
    typename Q>
METAL_FUNC void tensor_tile(
    P p, Q q, const device T* x, const device Size* size, Y y, uint3 tile, uint group, uint me,
    threadgroup float4* scratch) {
  tensor_rows<F, G, many, groups>(
      p, q, x, size->columns, y, tile.x, tile.y * many, size->rows, group, me, scratch);
}

//@ grouped:
template <
    typename F, typename G, int many, int across, int groups, typename Y, typename X, typename P,
    typename Q>
METAL_FUNC void tensor_tile(
    P p, Q q, X x, const device Size* size, Y y, uint3 tile, uint group, uint me,
    threadgroup float4* scratch) {
  const Span span = span_of(x, tile.y, many);
  if (span.to < span.end) {
    choose(y, x, span.expert);
    tensor_rows<F, G, many, groups>(
        p, q, x.x, size->columns, y, tile.x, span.to, span.end, group, me, scratch);
  }
}
