// Names of the language itself (MSL specification, chapters 1, 2 and 4) on the OpenCL C++ front
// end.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310
#endif
#define __METAL__ 1
#define __METAL_MACOS__ 1
#define __HAVE_BFLOAT__ 1
#define __HAVE_SIMDGROUP_MATRIX__ 1
#undef __OPENCL_CPP_VERSION__
#undef __OPENCL_VERSION__

// ---- address spaces: the front end's own OpenCL ones --------------------------------------
#define device __global
#define threadgroup __local
#define thread __private
// 'constant' is already a keyword with the right meaning; 'kernel' is one with the wrong one.
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2
#define MSL_RT extern "C" __attribute__((convergent, nothrow))

// ---- scalar types ------------------------------------------------------------------------
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;
typedef __bf16 bfloat;
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX 65504.0h
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define UCHAR_MAX 255
#define CHAR_BIT 8
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_PI_H 3.14159265358979323846264338327950288h
#define M_E_F 2.71828182845904523536028747135266250f
#define M_LN10_F 2.30258509299404568401799145468436421f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_SQRT2_F 1.41421356237309504880168872420969808f
