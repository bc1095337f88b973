// Atomic functions (MSL specification 6.15): relaxed order only, before Metal 4.
#pragma once
namespace metal {
// clang predeclares OpenCL's atomics under these names.
#define atomic_int __msl_atomic_int
#define atomic_uint __msl_atomic_uint
#define atomic_bool __msl_atomic_bool
#define atomic_float __msl_atomic_float
#define atomic_ulong __msl_atomic_ulong
#define memory_order __msl_memory_order
#define memory_order_relaxed __msl_memory_order_relaxed
enum memory_order { memory_order_relaxed = 0 };
template <class T>
struct atomic {
  T __v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

// Which operations exist: int, uint and bool anywhere, float in device memory only, and arithmetic
// for int and uint (float: add and sub). 64 bits have only atomic_min/max, which no kernel here
// uses.
template <class T, bool Device>
constexpr constant bool __atomic_ok = __is_same(T, int) || __is_same(T, uint) ||
                                      __is_same(T, bool) || (Device && __is_same(T, float));
template <class T, bool Sum>
constexpr constant bool __atomic_math_ok =
    __is_same(T, int) || __is_same(T, uint) || (Sum && __is_same(T, float));
constexpr constant unsigned __atomic_load = 0, __atomic_store = 1, __atomic_rmw = 2;

#if defined(__NVPTX__)  // the PTX route only shows that the code compiles: atomics are plain there
#define __msl_atomic_begin(...) (void)0
#define __msl_atomic_end(...) (void)0
#endif
#define MSL_ATOMIC \
  inline __attribute__((noinline, no_sanitize("kernel-address"), no_sanitize("undefined")))
#define MSL_BEGIN(KIND, DEVICE)                                                            \
  static_assert(__atomic_ok<T, DEVICE>, "no such atomic type in this address space");      \
  __msl_atomic_begin((const void *)&p->__v, sizeof(T), KIND, __builtin_return_address(0)); \
  T old = p->__v
#define MSL_RMW(AS, DEVICE, OP, SUM, EXPR)                                                 \
  template <class T, class U>                                                              \
  MSL_ATOMIC T atomic_fetch_##OP##_explicit(volatile AS atomic<T> *p, U v, memory_order) { \
    static_assert(__atomic_math_ok<T, SUM>, "no such atomic operation for this type");     \
    MSL_BEGIN(__atomic_rmw, DEVICE);                                                       \
    p->__v = (T)(EXPR);                                                                    \
    __msl_atomic_end();                                                                    \
    return old;                                                                            \
  }
#define MSL_ATOMICS(AS, DEVICE)                                                                \
  template <class T>                                                                           \
  MSL_ATOMIC T atomic_load_explicit(const volatile AS atomic<T> *p, memory_order) {            \
    MSL_BEGIN(__atomic_load, DEVICE);                                                          \
    __msl_atomic_end();                                                                        \
    return old;                                                                                \
  }                                                                                            \
  template <class T, class U>                                                                  \
  MSL_ATOMIC void atomic_store_explicit(volatile AS atomic<T> *p, U v, memory_order) {         \
    MSL_BEGIN(__atomic_store, DEVICE);                                                         \
    (void)old;                                                                                 \
    p->__v = (T)v;                                                                             \
    __msl_atomic_end();                                                                        \
  }                                                                                            \
  template <class T, class U>                                                                  \
  MSL_ATOMIC T atomic_exchange_explicit(volatile AS atomic<T> *p, U v, memory_order) {         \
    MSL_BEGIN(__atomic_rmw, DEVICE);                                                           \
    p->__v = (T)v;                                                                             \
    __msl_atomic_end();                                                                        \
    return old;                                                                                \
  }                                                                                            \
  template <class T, class U>                                                                  \
  MSL_ATOMIC bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T> *p, thread T *e, \
                                                        U v, memory_order, memory_order) {     \
    MSL_BEGIN(__atomic_rmw, DEVICE);                                                           \
    bool same = old == *e;                                                                     \
    if (same)                                                                                  \
      p->__v = (T)v;                                                                           \
    else                                                                                       \
      *e = old;                                                                                \
    __msl_atomic_end();                                                                        \
    return same;                                                                               \
  }                                                                                            \
  MSL_RMW(AS, DEVICE, add, true, old + (T)v)                                                   \
  MSL_RMW(AS, DEVICE, sub, true, old - (T)v) MSL_RMW(AS, DEVICE, and, false, old &(T)v)        \
      MSL_RMW(AS, DEVICE, or, false, old | (T)v) MSL_RMW(AS, DEVICE, xor, false, old ^ (T)v)   \
          MSL_RMW(AS, DEVICE, max, false, old > (T)v ? old : (T)v)                             \
              MSL_RMW(AS, DEVICE, min, false, old < (T)v ? old : (T)v)
MSL_ATOMICS(device, true)
MSL_ATOMICS(threadgroup, false)
#undef MSL_ATOMIC
#undef MSL_BEGIN
#undef MSL_RMW
#undef MSL_ATOMICS
}  // namespace metal
