// The SIMD-group functions as warp shuffles of an NVIDIA GPU.
#pragma once
namespace metal {
template <class T>
METAL_FUNC T __shfl(T v, uint src) {
  constexpr int n = (sizeof(T) + 3) / 4;
  int w[n] = {};
  __builtin_memcpy(w, &v, sizeof(T));
  for (int i = 0; i < n; i++) w[i] = __nvvm_shfl_sync_idx_i32(0xffffffffu, w[i], src & 31, 0x1f);
  __builtin_memcpy(&v, w, sizeof(T));
  return v;
}
#define MSL_RED(name, EXPR)                     \
  template <class T>                            \
  METAL_FUNC T name(T v) {                      \
    for (uint s = 16; s; s >>= 1) {             \
      T p = v, q = __shfl(v, __msl_lane() ^ s); \
      v = (T)(EXPR);                            \
    }                                           \
    return v;                                   \
  }
template <class T>
METAL_FUNC T __max(T a, T b) {
  return a > b || (b != b) ? a : b;
}
MSL_RED(simd_sum, p + q)
MSL_RED(simd_product, p *q) MSL_RED(simd_or, p | q) MSL_RED(simd_xor, p ^ q) MSL_RED(simd_and, p &q)
    MSL_RED(simd_max, (p > q || q != q) ? p : q) MSL_RED(simd_min, (p < q || q != q) ? p : q)
#undef MSL_RED
        template <class T>
        METAL_FUNC T simd_shuffle(T v, ushort l) {
  return __shfl(v, l);
}
template <class T>
METAL_FUNC T simd_broadcast(T v, ushort l) {
  return __shfl(v, l);
}
template <class T>
METAL_FUNC T simd_broadcast_first(T v) {
  return __shfl(v, 0);
}
template <class T>
METAL_FUNC T simd_shuffle_xor(T v, ushort m) {
  return __shfl(v, __msl_lane() ^ m);
}
template <class T>
METAL_FUNC T simd_shuffle_up(T v, ushort d) {
  T r = __shfl(v, __msl_lane() - d);
  return __msl_lane() >= d ? r : v;
}
template <class T>
METAL_FUNC T simd_shuffle_down(T v, ushort d) {
  T r = __shfl(v, __msl_lane() + d);
  return __msl_lane() + d < 32 ? r : v;
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_up(T v, ushort d) {
  return __shfl(v, __msl_lane() - d);
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_down(T v, ushort d) {
  return __shfl(v, __msl_lane() + d);
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T v, T f, ushort d, ushort m = 32) {
  uint l = __msl_lane(), r = l % m;
  T a = __shfl(v, l - d), b = __shfl(f, l - d + m);
  return r >= d ? a : b;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T v, T f, ushort d, ushort m = 32) {
  uint l = __msl_lane(), r = l % m;
  T a = __shfl(v, l + d), b = __shfl(f, l + d - m);
  return r + d < m ? a : b;
}
template <class T>
METAL_FUNC T simd_prefix_inclusive_sum(T v) {
  for (uint d = 1; d < 32; d *= 2) {
    T u = __shfl(v, __msl_lane() - d);
    if (__msl_lane() >= d) v += u;
  }
  return v;
}
template <class T>
METAL_FUNC T simd_prefix_exclusive_sum(T v) {
  T i = simd_prefix_inclusive_sum(v);
  T u = __shfl(i, __msl_lane() - 1);
  return __msl_lane() ? u : T(0);
}
template <class T>
METAL_FUNC T simd_prefix_inclusive_product(T v) {
  for (uint d = 1; d < 32; d *= 2) {
    T u = __shfl(v, __msl_lane() - d);
    if (__msl_lane() >= d) v *= u;
  }
  return v;
}
template <class T>
METAL_FUNC T simd_prefix_exclusive_product(T v) {
  T i = simd_prefix_inclusive_product(v);
  T u = __shfl(i, __msl_lane() - 1);
  return __msl_lane() ? u : T(1);
}
struct simd_vote {
  ulong m;
  simd_vote() = default;
  explicit constexpr simd_vote(ulong v) : m(v) {}
  bool all() const { return m == 0xffffffffu; }
  bool any() const { return m != 0; }
  explicit constexpr operator ulong() const { return m; }
  typedef ulong vote_t;
};
METAL_FUNC simd_vote simd_ballot(bool b) {
  return simd_vote(__nvvm_vote_ballot_sync(0xffffffffu, b));
}
METAL_FUNC bool simd_any(bool b) { return __nvvm_vote_any_sync(0xffffffffu, b); }
METAL_FUNC bool simd_all(bool b) { return __nvvm_vote_all_sync(0xffffffffu, b); }
METAL_FUNC bool simd_is_first() { return __msl_lane() == 0; }
template <class T>
METAL_FUNC T quad_shuffle_xor(T v, ushort m) {
  return __shfl(v, (__msl_lane() & ~3u) | ((__msl_lane() ^ m) & 3));
}
template <class T>
METAL_FUNC T quad_broadcast(T v, ushort l) {
  return __shfl(v, (__msl_lane() & ~3u) | (l & 3));
}
template <class T>
METAL_FUNC T quad_sum(T v) {
  v += __shfl(v, __msl_lane() ^ 1);
  return v + __shfl(v, __msl_lane() ^ 2);
}
}  // namespace metal
