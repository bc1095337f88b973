// SIMD-group and quad-group functions (MSL specification 6.9.2): 32 lanes, 4 to a quad.
#pragma once
namespace metal {
template <class T>
METAL_FUNC T __lane(const thread __msl_xchg *x, unsigned l) {
  T r;
  __builtin_memcpy(&r, x->v[l & 31], sizeof(T));
  return r;
}
template <class T>
METAL_FUNC thread __msl_xchg *__table(T v) {
  return __msl_exchange(&v, sizeof(T));
}
// Metal has these functions for scalars and vectors of 8, 16 and 32 bits, not for bool or 64 bits.
template <class T>
METAL_FUNC thread __msl_xchg *__x(T v) {
  using E = typename __vt<T>::elem;
  static_assert(is_arithmetic_v<E>, "SIMD-group functions take scalars and vectors");
  static_assert(!__is_same(E, bool) && sizeof(E) <= 4,
                "SIMD-group functions take no bool and no 64-bit type");
  return __table(v);
}
#define MSL_RED(name, INIT, EXPR)                                                              \
  template <class T>                                                                           \
  METAL_FUNC T name(T v) {                                                                     \
    thread __msl_xchg *x = __x(v);                                                             \
    T b[32];                                                                                   \
    for (unsigned i = 0; i < 32; i++) b[i] = (x->mask >> i & 1) ? __lane<T>(x, i) : (T)(INIT); \
    for (unsigned s = 16; s; s >>= 1)                                                          \
      for (unsigned i = 0; i < s; i++) {                                                       \
        T p = b[i], q = b[i + s];                                                              \
        b[i] = (T)(EXPR);                                                                      \
      }                                                                                        \
    return b[0];                                                                               \
  }
template <class T>
METAL_FUNC T __max(T a, T b) {
  return a > b || (b != b) ? a : b;
}
template <class T>
METAL_FUNC T __min(T a, T b) {
  return a < b || (b != b) ? a : b;
}
MSL_RED(simd_sum, T(0), p + q)
MSL_RED(simd_product, T(1), p *q)
MSL_RED(simd_or, T(0), p | q)
MSL_RED(simd_xor, T(0), p ^ q)
MSL_RED(simd_and, T(~T(0)), p &q)
MSL_RED(simd_max, v, (p > q || q != q) ? p : q)
MSL_RED(simd_min, v, (p < q || q != q) ? p : q)
#undef MSL_RED
template <class T>
METAL_FUNC T simd_shuffle(T v, ushort l) {
  auto x = __x(v);
  return __lane<T>(x, l);
}
template <class T>
METAL_FUNC T simd_broadcast(T v, ushort l) {
  auto x = __x(v);
  return __lane<T>(x, l);
}
template <class T>
METAL_FUNC T simd_broadcast_first(T v) {
  auto x = __x(v);
  return __lane<T>(x, __builtin_ctz(x->mask));
}
template <class T>
METAL_FUNC T simd_shuffle_xor(T v, ushort m) {
  auto x = __x(v);
  return __lane<T>(x, x->lane ^ m);
}
template <class T>
METAL_FUNC T simd_shuffle_up(T v, ushort d) {
  auto x = __x(v);
  return x->lane >= d ? __lane<T>(x, x->lane - d) : v;
}
template <class T>
METAL_FUNC T simd_shuffle_down(T v, ushort d) {
  auto x = __x(v);
  return x->lane + d < 32 ? __lane<T>(x, x->lane + d) : v;
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_up(T v, ushort d) {
  auto x = __x(v);
  return __lane<T>(x, x->lane - d);
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_down(T v, ushort d) {
  auto x = __x(v);
  return __lane<T>(x, x->lane + d);
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T v, T f, ushort d, ushort m = 32) {
  struct P {
    T a, b;
  } p{v, f};
  static_assert(sizeof(typename __vt<T>::elem) <= 4, "SIMD-group functions take no 64-bit type");
  auto x = __table(p);
  unsigned l = x->lane, r = l % m;
  return r >= d ? __lane<P>(x, l - d).a : __lane<P>(x, l - d + m).b;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T v, T f, ushort d, ushort m = 32) {
  struct P {
    T a, b;
  } p{v, f};
  static_assert(sizeof(typename __vt<T>::elem) <= 4, "SIMD-group functions take no 64-bit type");
  auto x = __table(p);
  unsigned l = x->lane, r = l % m;
  return r + d < m ? __lane<P>(x, l + d).a : __lane<P>(x, l + d - m).b;
}
#define MSL_SCAN(name, INIT, EXPR, INCL)   \
  template <class T>                       \
  METAL_FUNC T name(T v) {                 \
    auto x = __x(v);                       \
    T p = (T)(INIT);                       \
    for (unsigned i = 0; i < 32; i++) {    \
      if (i == x->lane && !INCL) return p; \
      if (x->mask >> i & 1) {              \
        T q = __lane<T>(x, i);             \
        p = (T)(EXPR);                     \
      }                                    \
      if (i == x->lane) return p;          \
    }                                      \
    return p;                              \
  }
MSL_SCAN(simd_prefix_inclusive_sum, T(0), p + q, 1)
MSL_SCAN(simd_prefix_exclusive_sum, T(0), p + q, 0)
    MSL_SCAN(simd_prefix_inclusive_product, T(1), p *q, 1)
        MSL_SCAN(simd_prefix_exclusive_product, T(1), p *q, 0)
#undef MSL_SCAN
            struct simd_vote {
  ulong m;
  simd_vote() = default;
  explicit constexpr simd_vote(ulong v) : m(v) {}
  bool all() const { return m == 0xffffffffu; }
  bool any() const { return m != 0; }
  explicit constexpr operator ulong() const { return m; }
  typedef ulong vote_t;
};
METAL_FUNC ulong __ballot(bool b) {
  uint u = b;
  auto x = __x(u);
  ulong r = 0;
  for (unsigned i = 0; i < 32; i++)
    if ((x->mask >> i & 1) && __lane<uint>(x, i)) r |= 1ul << i;
  return r;
}
METAL_FUNC simd_vote simd_ballot(bool b) { return simd_vote(__ballot(b)); }
METAL_FUNC bool simd_any(bool b) { return __ballot(b) != 0; }
METAL_FUNC bool simd_all(bool b) {
  uint u = b;
  auto x = __x(u);
  for (unsigned i = 0; i < 32; i++)
    if ((x->mask >> i & 1) && !__lane<uint>(x, i)) return false;
  return true;
}
METAL_FUNC simd_vote simd_active_threads_mask() {
  uint u = 0;
  auto x = __x(u);
  return simd_vote(x->mask);
}
METAL_FUNC bool simd_is_first() {
  uint u = 0;
  auto x = __x(u);
  return (uint)__builtin_ctz(x->mask) == x->lane;
}
template <class T>
METAL_FUNC T quad_shuffle_xor(T v, ushort m) {
  auto x = __x(v);
  return __lane<T>(x, (x->lane & ~3u) | ((x->lane ^ m) & 3));
}
template <class T>
METAL_FUNC T quad_broadcast(T v, ushort l) {
  auto x = __x(v);
  return __lane<T>(x, (x->lane & ~3u) | (l & 3));
}
template <class T>
METAL_FUNC T quad_sum(T v) {
  auto x = __x(v);
  unsigned b = x->lane & ~3u;
  return (T)((__lane<T>(x, b) + __lane<T>(x, b + 2)) + (__lane<T>(x, b + 1) + __lane<T>(x, b + 3)));
}
template <class T>
METAL_FUNC T quad_shuffle(T v, ushort l) {
  auto x = __x(v);
  return __lane<T>(x, (x->lane & ~3u) | (l & 3));
}
template <class T>
METAL_FUNC T quad_min(T v) {
  auto x = __x(v);
  unsigned b = x->lane & ~3u;
  T r = __lane<T>(x, b);
  for (int i = 1; i < 4; i++) r = __min(r, __lane<T>(x, b + i));
  return r;
}
template <class T>
METAL_FUNC T quad_max(T v) {
  auto x = __x(v);
  unsigned b = x->lane & ~3u;
  T r = __lane<T>(x, b);
  for (int i = 1; i < 4; i++) r = __max(r, __lane<T>(x, b + i));
  return r;
}

}  // namespace metal
