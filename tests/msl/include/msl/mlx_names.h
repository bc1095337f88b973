// Compiler-internal names that MLX's preamble uses (bf16_math.h, utils.h).
#pragma once
#define MSL_B1(n, f) \
  METAL_FUNC float __metal_##n(float x, int = 0) { return metal::f(x); }
#define MSL_B2(n, f) \
  METAL_FUNC float __metal_##n(float x, float y, int = 0) { return metal::f(x, y); }
MSL_B1(fabs, fabs)
MSL_B1(acos, acos) MSL_B1(acosh, acosh) MSL_B1(asin, asin) MSL_B1(asinh, asinh) MSL_B1(atan, atan)
    MSL_B1(atanh, atanh) MSL_B1(ceil, ceil) MSL_B1(cos, cos) MSL_B1(cosh, cosh) MSL_B1(cospi, cospi)
        MSL_B1(exp, exp) MSL_B1(exp10, exp10) MSL_B1(exp2, exp2) MSL_B1(floor, floor)
            MSL_B1(fract, fract) MSL_B1(log, log) MSL_B1(log10, log10) MSL_B1(log2, log2)
                MSL_B1(rint, rint) MSL_B1(round, round) MSL_B1(rsqrt, rsqrt) MSL_B1(sin, sin)
                    MSL_B1(sinh, sinh) MSL_B1(sinpi, sinpi) MSL_B1(sqrt, sqrt) MSL_B1(tan, tan)
                        MSL_B1(tanh, tanh) MSL_B1(tanpi, tanpi) MSL_B1(trunc, trunc)
                            MSL_B2(atan2, atan2) MSL_B2(divide, divide) MSL_B2(fmax, fmax)
                                MSL_B2(fmin, fmin) MSL_B2(fmod, fmod) MSL_B2(nextafter, nextafter)
                                    MSL_B2(pow, pow) MSL_B2(powr, powr)
                                        METAL_FUNC float __metal_fma(float a, float b, float c) {
  return metal::fma(a, b, c);
}
METAL_FUNC float __metal_fmax3(float a, float b, float c, int = 0) { return metal::max3(a, b, c); }
METAL_FUNC float __metal_fmin3(float a, float b, float c, int = 0) { return metal::min3(a, b, c); }
METAL_FUNC float __metal_fmedian3(float a, float b, float c, int = 0) {
  return metal::max(metal::min(a, b), metal::min(metal::max(a, b), c));
}
METAL_FUNC float __metal_ldexp(float x, int e, int = 0) { return metal::ldexp(x, e); }
METAL_FUNC float __metal_frexp(float x, thread int *e, int = 0) { return metal::frexp(x, *e); }
#define MSL_S1(n)                 \
  template <class T>              \
  METAL_FUNC T __metal_##n(T x) { \
    return metal::n(x);           \
  }
MSL_S1(simd_sum)
MSL_S1(simd_product) MSL_S1(simd_max) MSL_S1(simd_min) MSL_S1(simd_prefix_inclusive_sum)
    MSL_S1(simd_prefix_exclusive_sum) MSL_S1(simd_prefix_inclusive_product)
        MSL_S1(simd_prefix_exclusive_product) METAL_FUNC float __metal_simd_xor(float x) {
  return as_type<float>(metal::simd_xor(as_type<uint>(x)));
}
#define MSL_S2(n)                           \
  template <class T>                        \
  METAL_FUNC T __metal_##n(T x, ushort l) { \
    return metal::n(x, l);                  \
  }
MSL_S2(simd_broadcast)
MSL_S2(simd_shuffle) MSL_S2(simd_shuffle_xor) MSL_S2(simd_shuffle_up) MSL_S2(simd_shuffle_down)
    MSL_S2(simd_shuffle_rotate_up) MSL_S2(simd_shuffle_rotate_down) template <class T>
    METAL_FUNC T __metal_simd_shuffle_and_fill_up(T a, T b, ushort d, ushort m) {
  return metal::simd_shuffle_and_fill_up(a, b, d, m);
}
template <class T>
METAL_FUNC T __metal_simd_shuffle_and_fill_down(T a, T b, ushort d, ushort m) {
  return metal::simd_shuffle_and_fill_down(a, b, d, m);
}
#define __metal_get_simdgroup_size(x) 32
#undef MSL_B1
#undef MSL_B2
#undef MSL_S1
#undef MSL_S2
