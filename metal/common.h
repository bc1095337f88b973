// Shared by every kernel of mlxfuse. MLX's preamble (metal_stdlib, bfloat16_t) precedes it.
// Rules: C++14 plus `if constexpr`; ASCII only; inputs are template pointer types, because
// MLX binds an input of fewer than 8 elements in `constant` and any other in `device`.
// A line `//@ name: a b` starts a section, which needs the sections a and b of the same file.
// What precedes the first section always goes into a kernel's source; a section only on demand.

// Loops that index a thread's own array: unrolled, so that the array stays in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

// The same memory as elements of another type.
template <typename U, typename T>
METAL_FUNC const device U* elements(const device T* p) {
  return (const device U*)p;
}
template <typename U, typename T>
METAL_FUNC const constant U* elements(const constant T* p) {
  return (const constant U*)p;
}

template <typename U, typename T>
METAL_FUNC const threadgroup U* elements(const threadgroup T* p) {
  return (const threadgroup U*)p;
}

METAL_FUNC float4 bytes(uint word) {
  return float4(as_type<uchar4>(word));
}

// 2^-n, exactly.
METAL_FUNC constexpr float unshifted(int n) {
  return n < 0 ? float(1u << -n) : 1.0f / float(1u << n);
}

// Copies words to threadgroup memory, by all threads; what follows may read them.
template <typename G>
METAL_FUNC void stage(G from, threadgroup uint* to, uint count, uint me, uint threads) {
  for (uint i = me; i < count; i += threads) {
    to[i] = from[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
