// simdgroup_matrix (MSL specification 6.7): 8 x 8, two elements a lane.
#pragma once
namespace metal {
// Lane l holds two neighbours of row fm = (l/4 & 4) + (l/2 % 4), column fn = (l/4 & 2)*2 + l%2*2.
template <class T, int C, int R>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "simdgroup_matrix: only 8x8 exists");
  vec<T, 2> __e;
  simdgroup_matrix() thread = default;
  explicit simdgroup_matrix(T v) thread;
  thread vec<T, 2> &thread_elements() thread { return __e; }
  const thread vec<T, 2> &thread_elements() const thread { return __e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
METAL_FUNC unsigned __fm() {
  unsigned l = __msl_lane();
  return (l / 4 & 4) + (l / 2 & 3);
}
METAL_FUNC unsigned __fn() {
  unsigned l = __msl_lane();
  return (l / 4 & 2) * 2 + (l & 1) * 2;
}
template <class T, int C, int R>
simdgroup_matrix<T, C, R>::simdgroup_matrix(T v) thread {
  unsigned r = __fm(), c = __fn();
  __e[0] = r == c ? v : T(0);
  __e[1] = r == c + 1 ? v : T(0);
}
template <class T, int C, int R = C>
METAL_FUNC simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> m;
  m.__e[0] = v;
  m.__e[1] = v;
  return m;
}
#if defined(MSL_CHECKED)
#define MSL_MEET __msl_simdgroup_barrier(0x100)  // only to detect divergence
#else
#define MSL_MEET (void)0
#endif
#define MSL_LS(AS)                                                                      \
  template <class T>                                                                    \
  METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8> &d, const AS T *src,  \
                                 ulong ld = 8, ulong2 org = 0, bool tr = false) {       \
    MSL_MEET;                                                                           \
    ulong r = __fm(), c = __fn();                                                       \
    if (tr) {                                                                           \
      src += org.y + org.x * ld;                                                        \
      d.__e[0] = src[c * ld + r];                                                       \
      d.__e[1] = src[(c + 1) * ld + r];                                                 \
    } else {                                                                            \
      src += org.y * ld + org.x;                                                        \
      d.__e[0] = src[r * ld + c];                                                       \
      d.__e[1] = src[r * ld + c + 1];                                                   \
    }                                                                                   \
  }                                                                                     \
  template <class T>                                                                    \
  METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> s, AS T *dst, ulong ld = 8, \
                                  ulong2 org = 0, bool tr = false) {                    \
    MSL_MEET;                                                                           \
    ulong r = __fm(), c = __fn();                                                       \
    if (tr) {                                                                           \
      dst += org.y + org.x * ld;                                                        \
      dst[c * ld + r] = s.__e[0];                                                       \
      dst[(c + 1) * ld + r] = s.__e[1];                                                 \
    } else {                                                                            \
      dst += org.y * ld + org.x;                                                        \
      dst[r * ld + c] = s.__e[0];                                                       \
      dst[r * ld + c + 1] = s.__e[1];                                                   \
    }                                                                                   \
  }
MSL_LS(device)
MSL_LS(threadgroup)
#undef MSL_LS
#if defined(__NVPTX__)
    template <class D, class A, class B, class Cc>
    METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8> &d,
                                                  simdgroup_matrix<A, 8, 8> a,
                                                  simdgroup_matrix<B, 8, 8> b,
                                                  simdgroup_matrix<Cc, 8, 8> c) {
  float s0 = (float)c.__e[0], s1 = (float)c.__e[1];
  uint r = __fm(), cc = __fn();
  for (uint k = 0; k < 8; k++) {  // element (i, j) lives in lane (i & 4) * 4 + (j & 4) * 2 + (i &
                                  // 3) * 2 + (j / 2 & 1), slot j & 1
    uint la = (r & 4) * 4 + (k & 4) * 2 + (r & 3) * 2 + (k / 2 & 1),
         lb = (k & 4) * 4 + (cc & 4) * 2 + (k & 3) * 2 + (cc / 2 & 1);
    float a0 = __shfl((float)a.__e[0], la), a1 = __shfl((float)a.__e[1], la), av = k & 1 ? a1 : a0;
    s0 += av * __shfl((float)b.__e[0], lb);
    s1 += av * __shfl((float)b.__e[1], lb);
  }
  d.__e[0] = (D)s0;
  d.__e[1] = (D)s1;
}
#else
    struct __msl_mma {
  float a[2], b[2], c[2], d[2];
};
MSL_RT void __msl_mma8x8(thread __msl_mma *m);
template <class D, class A, class B, class Cc>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8> &d,
                                              simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b,
                                              simdgroup_matrix<Cc, 8, 8> c) {
  __msl_mma m;
  for (int i = 0; i < 2; i++) {
    m.a[i] = (float)a.__e[i];
    m.b[i] = (float)b.__e[i];
    m.c[i] = (float)c.__e[i];
  }
  __msl_mma8x8(&m);
  d.__e[0] = (D)m.d[0];
  d.__e[1] = (D)m.d[1];
}
#endif
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8> &d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}
template <class T>
METAL_FUNC simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a,
                                               simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
