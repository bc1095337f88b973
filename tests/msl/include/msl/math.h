// Scalar and vector math, integer and geometric functions, uniform and array (MSL specification 6).
#pragma once
namespace metal {
// One overload per scalar type, as in Metal, so that mixed-type calls resolve (or are ambiguous)
// alike.
#if defined(__NVPTX__)
#define MSL_LIBM(fn) __nv_##fn##f
#define MSL_D1(fn) extern "C" float __nv_##fn##f(float);
#define MSL_D2(fn) extern "C" float __nv_##fn##f(float, float);
MSL_D1(acos)
MSL_D1(acosh) MSL_D1(asin) MSL_D1(asinh) MSL_D1(atan) MSL_D1(atanh) MSL_D1(ceil) MSL_D1(cos)
    MSL_D1(cosh) MSL_D1(exp) MSL_D1(exp2) MSL_D1(fabs) MSL_D1(floor) MSL_D1(log) MSL_D1(log10)
        MSL_D1(log2) MSL_D1(rint) MSL_D1(round) MSL_D1(sin) MSL_D1(sinh) MSL_D1(sqrt) MSL_D1(tan)
            MSL_D1(tanh) MSL_D1(trunc) MSL_D2(atan2) MSL_D2(copysign) MSL_D2(fdim) MSL_D2(fmax)
                MSL_D2(fmin) MSL_D2(fmod) MSL_D2(nextafter) MSL_D2(pow)
#else
#define MSL_LIBM(fn) __builtin_##fn##f
#endif
#define MSL_M1E(name, fn, X)                                            \
  X float name(float x) { return MSL_LIBM(fn)(x); }                     \
  X half name(half x) { return (half)MSL_LIBM(fn)((float)x); }          \
  template <int N>                                                      \
  X vec<float, N> name(vec<float, N> x) {                               \
    vec<float, N> r;                                                    \
    for (int i = 0; i < N; i++) r[i] = MSL_LIBM(fn)(x[i]);              \
    return r;                                                           \
  }                                                                     \
  template <int N>                                                      \
  X vec<half, N> name(vec<half, N> x) {                                 \
    vec<half, N> r;                                                     \
    for (int i = 0; i < N; i++) r[i] = (half)MSL_LIBM(fn)((float)x[i]); \
    return r;                                                           \
  }
#define MSL_M2E(name, fn, X)                                                         \
  X float name(float x, float y) { return MSL_LIBM(fn)(x, y); }                      \
  X half name(half x, half y) { return (half)MSL_LIBM(fn)((float)x, (float)y); }     \
  template <int N>                                                                   \
  X vec<float, N> name(vec<float, N> x, vec<float, N> y) {                           \
    vec<float, N> r;                                                                 \
    for (int i = 0; i < N; i++) r[i] = MSL_LIBM(fn)(x[i], y[i]);                     \
    return r;                                                                        \
  }                                                                                  \
  template <int N>                                                                   \
  X vec<half, N> name(vec<half, N> x, vec<half, N> y) {                              \
    vec<half, N> r;                                                                  \
    for (int i = 0; i < N; i++) r[i] = (half)MSL_LIBM(fn)((float)x[i], (float)y[i]); \
    return r;                                                                        \
  }
#define MSL_MATH1                                                                                \
  MSL_M1(acos)                                                                                   \
  MSL_M1(acosh) MSL_M1(asin) MSL_M1(asinh) MSL_M1(atan) MSL_M1(atanh) MSL_M1(ceil) MSL_M1(cos)   \
      MSL_M1(cosh) MSL_M1(exp) MSL_M1(exp2) MSL_M1(fabs) MSL_M1(floor) MSL_M1(log) MSL_M1(log10) \
          MSL_M1(log2) MSL_M1(rint) MSL_M1(round) MSL_M1(sin) MSL_M1(sinh) MSL_M1(sqrt)          \
              MSL_M1(tan) MSL_M1(tanh) MSL_M1(trunc)
#define MSL_MATH2                                                                        \
  MSL_M2(atan2)                                                                          \
  MSL_M2(copysign) MSL_M2(fdim) MSL_M2(fmax) MSL_M2(fmin) MSL_M2(fmod) MSL_M2(nextafter) \
      MSL_M2(pow)
#define MSL_MATHX(X)                                                              \
  X float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }                    \
  X half rsqrt(half x) { return (half)(1.0f / __builtin_sqrtf((float)x)); }       \
  template <int N>                                                                \
  X vec<float, N> rsqrt(vec<float, N> x) {                                        \
    vec<float, N> r;                                                              \
    for (int i = 0; i < N; i++) r[i] = rsqrt(x[i]);                               \
    return r;                                                                     \
  }                                                                               \
  X float exp10(float x) { return MSL_LIBM(pow)(10.0f, x); }                      \
  X half exp10(half x) { return (half)exp10((float)x); }                          \
  X float powr(float x, float y) { return MSL_LIBM(pow)(x, y); }                  \
  X half powr(half x, half y) { return (half)MSL_LIBM(pow)((float)x, (float)y); } \
  X float divide(float x, float y) { return x / y; }                              \
  X half divide(half x, half y) { return x / y; }                                 \
  X float sinpi(float x) { return MSL_LIBM(sin)(M_PI_F * x); }                    \
  X float cospi(float x) { return MSL_LIBM(cos)(M_PI_F * x); }                    \
  X float tanpi(float x) { return MSL_LIBM(tan)(M_PI_F * x); }                    \
  X float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }      \
  X half fma(half a, half b, half c) {                                            \
    return (half)__builtin_fmaf((float)a, (float)b, (float)c);                    \
  }                                                                               \
  template <int N>                                                                \
  X vec<float, N> fma(vec<float, N> a, vec<float, N> b, vec<float, N> c) {        \
    vec<float, N> r;                                                              \
    for (int i = 0; i < N; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);          \
    return r;                                                                     \
  }                                                                               \
  X float fract(float x) {                                                        \
    float r = x - __builtin_floorf(x);                                            \
    return r < 1.0f ? r : 0.99999994f;                                            \
  }
#define MSL_M1(n) MSL_M1E(n, n, METAL_FUNC)
#define MSL_M2(n) MSL_M2E(n, n, METAL_FUNC)
                    MSL_MATH1 MSL_MATH2 MSL_MATHX(METAL_FUNC) namespace precise {
  MSL_MATH1 MSL_MATH2 MSL_MATHX(METAL_FUNC)
}
namespace fast {
MSL_MATH1 MSL_MATH2 MSL_MATHX(METAL_FUNC)
}
#undef MSL_M1
#undef MSL_M2

#define MSL_FP(T)                                                                               \
  METAL_FUNC bool isnan(T x) { return __builtin_isnan((float)x); }                              \
  METAL_FUNC bool isinf(T x) { return __builtin_isinf((float)x); }                              \
  METAL_FUNC bool isfinite(T x) { return __builtin_isfinite((float)x); }                        \
  METAL_FUNC bool isnormal(T x) { return __builtin_isnormal((float)x); }                        \
  METAL_FUNC bool signbit(T x) { return __builtin_signbit((float)x); }                          \
  METAL_FUNC T abs(T x) { return (T)__builtin_fabsf((float)x); }                                \
  METAL_FUNC T max(T a, T b) { return (T)__builtin_fmaxf((float)a, (float)b); }                 \
  METAL_FUNC T min(T a, T b) { return (T)__builtin_fminf((float)a, (float)b); }                 \
  METAL_FUNC T max3(T a, T b, T c) { return max(a, max(b, c)); }                                \
  METAL_FUNC T min3(T a, T b, T c) { return min(a, min(b, c)); }                                \
  METAL_FUNC T clamp(T x, T a, T b) { return min(max(x, a), b); }                               \
  METAL_FUNC T saturate(T x) { return clamp(x, (T)0.0f, (T)1.0f); }                             \
  METAL_FUNC T sign(T x) { return x > (T)0.0f ? (T)1.0f : x < (T)0.0f ? (T) - 1.0f : (T)0.0f; } \
  METAL_FUNC T mix(T a, T b, T t) { return a + (b - a) * t; }                                   \
  METAL_FUNC T step(T e, T x) { return x < e ? (T)0.0f : (T)1.0f; }                             \
  METAL_FUNC T ldexp(T x, int e) { return (T)__builtin_ldexpf((float)x, e); }                   \
  METAL_FUNC T frexp(T x, thread int &e) { return (T)__builtin_frexpf((float)x, (int *)&e); }   \
  METAL_FUNC int ilogb(T x) { return __builtin_ilogbf((float)x); }
#define MSL_INT(T)                                                                             \
  METAL_FUNC T abs(T x) { return x < T(0) ? T(-x) : x; }                                       \
  METAL_FUNC T max(T a, T b) { return a > b ? a : b; }                                         \
  METAL_FUNC T min(T a, T b) { return a < b ? a : b; }                                         \
  METAL_FUNC T max3(T a, T b, T c) { return max(a, max(b, c)); }                               \
  METAL_FUNC T min3(T a, T b, T c) { return min(a, min(b, c)); }                               \
  METAL_FUNC T clamp(T x, T a, T b) { return min(max(x, a), b); }                              \
  METAL_FUNC T popcount(T x) { return (T)__builtin_popcountl((ulong)(make_unsigned_t<T>)x); }  \
  METAL_FUNC T clz(T x) {                                                                      \
    ulong u = (make_unsigned_t<T>)x;                                                           \
    return u ? (T)(__builtin_clzl(u) - (64 - 8 * (int)sizeof(T))) : (T)(8 * sizeof(T));        \
  }                                                                                            \
  METAL_FUNC T ctz(T x) {                                                                      \
    ulong u = (make_unsigned_t<T>)x;                                                           \
    return u ? (T)__builtin_ctzl(u) : (T)(8 * sizeof(T));                                      \
  }                                                                                            \
  METAL_FUNC T rotate(T x, T r) {                                                              \
    typedef make_unsigned_t<T> U;                                                              \
    int n = 8 * sizeof(T), k = (int)r & (n - 1);                                               \
    return k ? (T)(U)((U)x << k | (U)x >> (n - k)) : x;                                        \
  }                                                                                            \
  METAL_FUNC T mulhi(T a, T b) { return (T)(((__int128)a * (__int128)b) >> (8 * sizeof(T))); } \
  METAL_FUNC T madhi(T a, T b, T c) { return mulhi(a, b) + c; }                                \
  METAL_FUNC T absdiff(T a, T b) { return a > b ? a - b : b - a; }                             \
  METAL_FUNC T addsat(T a, T b) {                                                              \
    T r;                                                                                       \
    return __builtin_add_overflow(a, b, (T *)&r)                                               \
               ? (b < T(0) ? numeric_limits<T>::min() : numeric_limits<T>::max())              \
               : r;                                                                            \
  }                                                                                            \
  METAL_FUNC T subsat(T a, T b) {                                                              \
    T r;                                                                                       \
    return __builtin_sub_overflow(a, b, (T *)&r)                                               \
               ? (b > T(0) ? numeric_limits<T>::min() : numeric_limits<T>::max())              \
               : r;                                                                            \
  }                                                                                            \
  METAL_FUNC T extract_bits(T x, uint o, uint n) {                                             \
    typedef make_unsigned_t<T> U;                                                              \
    int w = 8 * sizeof(T);                                                                     \
    return n ? (T)((T)((U)x << (w - n - o)) >> (w - n)) : T(0);                                \
  }                                                                                            \
  METAL_FUNC T insert_bits(T b, T i, uint o, uint n) {                                         \
    typedef make_unsigned_t<T> U;                                                              \
    U m = n >= 8 * sizeof(T) ? (U)~U(0) : (U)(((U(1) << n) - 1) << o);                         \
    return (T)(((U)b & ~m) | (((U)i << o) & m));                                               \
  }
MSL_FP(float)
MSL_FP(half) MSL_INT(char) MSL_INT(uchar) MSL_INT(short) MSL_INT(ushort) MSL_INT(int) MSL_INT(uint)
    MSL_INT(long) MSL_INT(ulong) MSL_INT(int8_t)
#undef MSL_FP
#undef MSL_INT
        METAL_FUNC bool isnan(bfloat x) {
  return __builtin_isnan((float)x);
}
METAL_FUNC bool isinf(bfloat x) { return __builtin_isinf((float)x); }
#define MSL_V2(fn)                                           \
  template <class T, int N>                                  \
  METAL_FUNC vec<T, N> fn(vec<T, N> a, vec<T, N> b) {        \
    vec<T, N> r;                                             \
    for (int i = 0; i < N; i++) r[i] = fn((T)a[i], (T)b[i]); \
    return r;                                                \
  }
#define MSL_V1(fn)                                  \
  template <class T, int N>                         \
  METAL_FUNC vec<T, N> fn(vec<T, N> a) {            \
    vec<T, N> r;                                    \
    for (int i = 0; i < N; i++) r[i] = fn((T)a[i]); \
    return r;                                       \
  }
MSL_V2(max)
MSL_V2(min) MSL_V1(abs) MSL_V1(sign) MSL_V1(saturate) MSL_V1(popcount) template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, vec<T, N> a, vec<T, N> b) {
  return min(max(x, a), b);
}
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, T a, T b) {
  return clamp(x, vec<T, N>(a), vec<T, N>(b));
}
template <class T, int N>
METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; i++) s += a[i] * b[i];
  return s;
}
template <class T, int N>
METAL_FUNC T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
METAL_FUNC T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <int N>
METAL_FUNC bool any(vec<int, N> v) {
  for (int i = 0; i < N; i++)
    if (v[i]) return true;
  return false;
}
template <int N>
METAL_FUNC bool all(vec<int, N> v) {
  for (int i = 0; i < N; i++)
    if (!v[i]) return false;
  return true;
}
template <class T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N, class C>
METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
METAL_FUNC float unpack_half(uint u) { return (float)__builtin_bit_cast(half, (ushort)u); }
METAL_FUNC float4 unpack_unorm4x8_to_float(uint u) {
  return __mk_float4(u & 255, u >> 8 & 255, u >> 16 & 255, u >> 24) / 255.0f;
}

template <class T>
using uniform = T;
template <class T>
METAL_FUNC constexpr T make_uniform(T v) {
  return v;
}
template <class T, size_t N>
struct array {
  T __e[N];
  thread T &operator[](size_t i) thread { return __e[i]; }
  constexpr const thread T &operator[](size_t i) const thread { return __e[i]; }
  device T &operator[](size_t i) device { return __e[i]; }
  const device T &operator[](size_t i) const device { return __e[i]; }
  threadgroup T &operator[](size_t i) threadgroup { return __e[i]; }
  constexpr const constant T &operator[](size_t i) const constant { return __e[i]; }
  constexpr size_t size() const { return N; }
};
}  // namespace metal
