// What the kernels use of Metal 4's tensor operations: one SIMD-group, 16 x 32 x 16, b transposed.
// Lanes hold a piece of 16 x 16 as MLX's steel/gemm/nax.h lays it out, which is not tested here: a
// kernel that loads and stores in that order is right on a GPU that has it.
namespace metal {
struct execution_simdgroup {};
}  // namespace metal
namespace mpp {
namespace tensor_ops {
struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
};
// A number, since this language has no template arguments that are structs.
constexpr ulong matmul2d_descriptor(int m, int n, int k, bool left, bool right, bool relaxed,
                                    enum matmul2d_descriptor::mode mode) {
  return m | n << 8 | k << 16 | left << 24 | right << 25 | relaxed << 26 | int(mode) << 27;
}
template <class T, int n>
struct __cooperative {
  T __e[n];
  thread T &operator[](int i) thread { return __e[i]; }
};
template <ulong descriptor, class Scope>
struct matmul2d {
  static_assert((descriptor & 0xffffff) == (16 | 32 << 8 | 16 << 16), "another shape");
  static_assert((descriptor >> 24 & 3) == 2, "b, and only b, is transposed");
  static_assert(descriptor >> 27 == 1, "sums are added to");
  template <class A, class B, class C>
  __cooperative<A, 8> get_left_input_cooperative_tensor() thread {
    return __cooperative<A, 8>{};
  }
  template <class A, class B, class C>
  __cooperative<B, 16> get_right_input_cooperative_tensor() thread {
    return __cooperative<B, 16>{};
  }
  template <class A, class B, class C>
  __cooperative<C, 16> get_destination_cooperative_tensor() thread {
    return __cooperative<C, 16>{};
  }
  // The lane that holds row r, columns c to c + 3, of a piece.
  static ushort __holder(uint r, uint c) {
    return (r & 4) * 4 + (c & 8) + (r & 3) * 2 + (c / 4 & 1);
  }
  template <class T>
  void run(thread __cooperative<T, 8> &a, thread __cooperative<T, 16> &b,
           thread __cooperative<float, 16> &sums) thread {
    const uint lane = __msl_lane();
    const uint row = (lane / 4 & 4) + (lane / 2 & 3);
    const uint column = (lane / 4 & 2) * 4 + (lane & 1) * 4;
    for (uint k = 0; k < 16; k += 4) {
      float x[2][4];
      for (uint e = 0; e < 8; e++) {
        x[e / 4][e % 4] = metal::simd_shuffle(float(a.__e[e]), __holder(row, k));
      }
      // Rows `column` to `column` + 3 of both pieces of b: one of them has 8 rows in 4 lanes.
      for (uint n = 0; n < 4; n++) {
        const uint r = column + n;
        for (uint piece = 0; piece < 2; piece++) {
          for (uint i = 0; i < 4; i++) {
            const float low = metal::simd_shuffle(float(b.__e[8 * piece + i]), __holder(r, k));
            const float high = metal::simd_shuffle(float(b.__e[8 * piece + 4 + i]), __holder(r, k));
            const float w = r < 8 ? low : high;
            sums.__e[8 * piece + n] += x[0][i] * w;
            sums.__e[8 * piece + 4 + n] += x[1][i] * w;
          }
        }
      }
    }
  }
};
}  // namespace tensor_ops
}  // namespace mpp
