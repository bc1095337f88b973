// Vector and packed vector types (MSL specification 2.2) and their constructors.
#pragma once
namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define MSL_V(T)                                      \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_V(char)
MSL_V(uchar) MSL_V(short) MSL_V(ushort) MSL_V(int) MSL_V(uint) MSL_V(long) MSL_V(ulong) MSL_V(half)
    MSL_V(float) MSL_V(bfloat)
#undef MSL_V
        typedef int bool2 __attribute__((ext_vector_type(2)));
typedef int bool3 __attribute__((ext_vector_type(3)));
typedef int bool4 __attribute__((ext_vector_type(4)));
#define MSL_P(T, A)                                                        \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(A))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(A))); \
  struct packed_##T##3 {                                                   \
    T x, y, z;                                                             \
    packed_##T##3() = default;                                             \
    packed_##T##3(T##3 v) : x(v.x), y(v.y), z(v.z) {}                      \
    operator T##3() const {                                                \
      T##3 r;                                                              \
      r.x = x;                                                             \
      r.y = y;                                                             \
      r.z = z;                                                             \
      return r;                                                            \
    }                                                                      \
  };
MSL_P(char, 1)
MSL_P(uchar, 1) MSL_P(short, 2) MSL_P(ushort, 2) MSL_P(int, 4) MSL_P(uint, 4) MSL_P(half, 2)
    MSL_P(float, 4)
#undef MSL_P

        template <class V>
        struct __vt {
  using elem = V;
  static constexpr constant int n = 1;
};
#define MSL_VT(N)                                      \
  template <class T>                                   \
  struct __vt<T __attribute__((ext_vector_type(N)))> { \
    using elem = T;                                    \
    static constexpr constant int n = N;               \
  };
MSL_VT(2)
MSL_VT(3) MSL_VT(4) MSL_VT(8) MSL_VT(16)
#undef MSL_VT
    template <class V, class A>
    METAL_FUNC int __put(thread V &r, int i, A a) {
  using E = typename __vt<V>::elem;
  if constexpr (__vt<A>::n == 1) {
    r[i] = static_cast<E>(a);
    return i + 1;
  } else {
    for (int k = 0; k < __vt<A>::n; k++) r[i + k] = static_cast<E>(a[k]);
    return i + __vt<A>::n;
  }
}
template <class... A>
struct __count {
  static constexpr constant int v = 0;
};
template <class A, class... B>
struct __count<A, B...> {
  static constexpr constant int v = __vt<A>::n + __count<B...>::v;
};
// T4(...) construction: splat, conversion from a same-size vector, or concatenation.
template <class V>
METAL_FUNC V __mk() {
  return V{};
}
template <class V, class A>
METAL_FUNC V __mk(A a) {
  using E = typename __vt<V>::elem;
  if constexpr (__vt<A>::n == 1) {
    return V(static_cast<E>(a));
  } else {
    static_assert(__vt<A>::n == __vt<V>::n, "vector constructor: wrong number of components");
    return __builtin_convertvector(a, V);
  }
}
template <class V, class A, class B, class... C>
METAL_FUNC V __mk(A a, B b, C... c) {
  static_assert(__count<A, B, C...>::v == __vt<V>::n,
                "vector constructor: wrong number of components");
  V r;
  int i = __put(r, 0, a);
  i = __put(r, i, b);
  ((i = __put(r, i, c)), ...);
  return r;
}
#define MSL_MK(T)                       \
  template <class... A>                 \
  METAL_FUNC T##2 __mk_##T##2(A... a) { \
    return __mk<T##2>(a...);            \
  }                                     \
  template <class... A>                 \
  METAL_FUNC T##3 __mk_##T##3(A... a) { \
    return __mk<T##3>(a...);            \
  }                                     \
  template <class... A>                 \
  METAL_FUNC T##4 __mk_##T##4(A... a) { \
    return __mk<T##4>(a...);            \
  }
MSL_MK(char)
MSL_MK(uchar) MSL_MK(short) MSL_MK(ushort) MSL_MK(int) MSL_MK(uint) MSL_MK(long) MSL_MK(ulong)
    MSL_MK(half) MSL_MK(float) MSL_MK(bfloat) MSL_MK(bool)
#undef MSL_MK
#define MSL_USE(T)          \
  using metal::T##2;        \
  using metal::T##3;        \
  using metal::T##4;        \
  using metal::__mk_##T##2; \
  using metal::__mk_##T##3; \
  using metal::__mk_##T##4;
}  // namespace metal
MSL_USE(char)
MSL_USE(uchar) MSL_USE(short) MSL_USE(ushort) MSL_USE(int) MSL_USE(uint) MSL_USE(long)
    MSL_USE(ulong) MSL_USE(half) MSL_USE(float) MSL_USE(bfloat) MSL_USE(bool)
#undef MSL_USE
        using metal::packed_char2;
using metal::packed_char3;
using metal::packed_char4;
using metal::packed_float2;
using metal::packed_float3;
using metal::packed_float4;
using metal::packed_half2;
using metal::packed_half3;
using metal::packed_half4;
using metal::packed_int2;
using metal::packed_int3;
using metal::packed_int4;
using metal::packed_short2;
using metal::packed_short3;
using metal::packed_short4;
using metal::packed_uchar2;
using metal::packed_uchar3;
using metal::packed_uchar4;
using metal::packed_uint2;
using metal::packed_uint3;
using metal::packed_uint4;
using metal::packed_ushort2;
using metal::packed_ushort3;
using metal::packed_ushort4;
