// Type traits and numeric limits (MSL specification, <metal_type_traits> and <metal_limits>).
#pragma once
namespace metal {
template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  using value_type = T;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr constant bool is_same_v = __is_same(A, B);
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T &> {
  using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
struct remove_cv {
  using type = __remove_cv(T);
};
template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<__global T> {
  using type = T;
};
template <class T>
struct remove_addrspace<__local T> {
  using type = T;
};
template <class T>
struct remove_addrspace<__constant T> {
  using type = T;
};
template <class T>
struct remove_addrspace<__private T> {
  using type = T;
};
template <class T>
struct remove_addrspace<__generic T> {
  using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
struct __is_fp : false_type {};
template <>
struct __is_fp<float> : true_type {};
template <>
struct __is_fp<half> : true_type {};
template <>
struct __is_fp<bfloat> : true_type {};
template <class T>
struct __is_int : false_type {};
#define MSL_I(T) \
  template <>    \
  struct __is_int<T> : true_type {};
MSL_I(bool)
MSL_I(char) MSL_I(int8_t) MSL_I(uchar) MSL_I(short) MSL_I(ushort) MSL_I(int) MSL_I(uint) MSL_I(long)
    MSL_I(ulong)
#undef MSL_I
        template <class T>
        constexpr constant bool is_floating_point_v = __is_fp<__remove_cv(T)>::value;
template <class T>
struct is_floating_point : bool_constant<__is_fp<__remove_cv(T)>::value> {};
template <class T>
constexpr constant bool is_integral_v = __is_int<__remove_cv(T)>::value;
template <class T>
struct is_integral : bool_constant<__is_int<__remove_cv(T)>::value> {};
template <class T>
constexpr constant bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
constexpr constant bool is_signed_v = T(-1) < T(0);
template <class T>
constexpr constant bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <class A, class B>
constexpr constant bool is_convertible_v = __is_convertible_to(A, B);
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class... B>
struct _disjunction : false_type {};
template <class A, class... B>
struct _disjunction<A, B...> : bool_constant<A::value || _disjunction<B...>::value> {};
template <class T>
struct __mk_unsigned {
  using type = T;
};
template <>
struct __mk_unsigned<char> {
  using type = uchar;
};
template <>
struct __mk_unsigned<int8_t> {
  using type = uchar;
};
template <>
struct __mk_unsigned<short> {
  using type = ushort;
};
template <>
struct __mk_unsigned<int> {
  using type = uint;
};
template <>
struct __mk_unsigned<long> {
  using type = ulong;
};
template <class T>
using make_unsigned_t = typename __mk_unsigned<T>::type;

template <class T>
struct numeric_limits;
#define MSL_NL(T, MIN, MAX, DIG)                                             \
  template <>                                                                \
  struct numeric_limits<T> {                                                 \
    static constexpr constant bool is_specialized = true, is_integer = true; \
    static constexpr constant int digits = DIG;                              \
    static constexpr T min() { return MIN; }                                 \
    static constexpr T max() { return MAX; }                                 \
    static constexpr T lowest() { return MIN; }                              \
  };
MSL_NL(bool, false, true, 1)
MSL_NL(char, -128, 127, 7) MSL_NL(int8_t, -128, 127, 7) MSL_NL(uchar, 0, 255, 8)
    MSL_NL(short, -32768, 32767, 15) MSL_NL(ushort, 0, 65535, 16)
        MSL_NL(int, (-2147483647 - 1), 2147483647, 31) MSL_NL(uint, 0, 4294967295u, 32)
            MSL_NL(long, (-9223372036854775807L - 1), 9223372036854775807L, 63)
                MSL_NL(ulong, 0, 18446744073709551615ul, 64)
#undef MSL_NL
#define MSL_NLF(T, INF, NN, MIN, MAX, EPS, DIG)                               \
  template <>                                                                 \
  struct numeric_limits<T> {                                                  \
    static constexpr constant bool is_specialized = true, is_integer = false; \
    static constexpr constant int digits = DIG;                               \
    static constexpr T min() { return MIN; }                                  \
    static constexpr T max() { return MAX; }                                  \
    static constexpr T lowest() { return -(MAX); }                            \
    static constexpr T epsilon() { return EPS; }                              \
    static constexpr T infinity() { return INF; }                             \
    static constexpr T quiet_NaN() { return NN; }                             \
    static constexpr T denorm_min() { return MIN; }                           \
  };
                    MSL_NLF(float, __builtin_inff(), __builtin_nanf(""), 1.175494351e-38f,
                            3.402823466e+38f, 1.192092896e-07f, 24)
                        MSL_NLF(half, (half)__builtin_inff(), (half)__builtin_nanf(""),
                                6.103515625e-05h, 65504.0h, 9.765625e-04h, 11)
                            MSL_NLF(bfloat, (bfloat)__builtin_inff(), (bfloat)__builtin_nanf(""),
                                    (bfloat)1.175494351e-38f, (bfloat)3.38953139e38f,
                                    (bfloat)0.0078125f, 8)
#undef MSL_NLF

                                template <class T>
                                constexpr T &&__declval();
}  // namespace metal
