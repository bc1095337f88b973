// What generated code calls: runtime/fiber.c on the host, a few instructions on an NVIDIA GPU.
#pragma once
#if defined(__NVPTX__)
asm(".shared .align 16 .b8 __msl_smem[32768];");
METAL_FUNC threadgroup void *__msl_tg_at(uint off) {
  ulong p;
  asm("mov.u64 %0, __msl_smem;" : "=l"(p));
  return (threadgroup void *)(p + off);
}
#define MSL_TG_DECL(n, prev, name)                             \
  constexpr uint __tgb_##n = ((prev) + 15u) & ~15u;            \
  constexpr uint __tge_##n = __tgb_##n + sizeof(__tgt_##name); \
  static_assert(__tge_##n <= 32768, "threadgroup memory");     \
  threadgroup __tgt_##name &name = *(threadgroup __tgt_##name *)__msl_tg_at(__tgb_##n);
METAL_FUNC void __msl_threadgroup_barrier(unsigned) { __syncthreads(); }
METAL_FUNC void __msl_simdgroup_barrier(unsigned) { __nvvm_bar_warp_sync(0xffffffffu); }
METAL_FUNC uint __msl_lane() { return __nvvm_read_ptx_sreg_laneid(); }
#else
struct __msl_xchg {
  unsigned mask;
  unsigned lane;
  unsigned width;
  unsigned pad;
  __attribute__((aligned(64))) unsigned char v[32][64];
};
MSL_RT thread __msl_xchg *__msl_exchange(const thread void *v, unsigned size);
MSL_RT void __msl_threadgroup_barrier(unsigned flags);
MSL_RT void __msl_simdgroup_barrier(unsigned flags);
MSL_RT void *__msl_tg_static(unsigned id, unsigned size, unsigned align, const constant char *name);
MSL_RT void __msl_atomic_begin(const void *p, unsigned size, unsigned kind, const void *pc);
MSL_RT void __msl_atomic_end(void);

#define MSL_TG_DECL(n, prev, name)                                               \
  threadgroup __tgt_##name &name = *(threadgroup __tgt_##name *)__msl_tg_static( \
      n, sizeof(__tgt_##name), alignof(__tgt_##name), #name);
MSL_RT unsigned __msl_lane(void);
#endif
namespace metal {
template <class T, class U>
METAL_FUNC T __bits(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: size mismatch");
  return __builtin_bit_cast(T, u);
}
}  // namespace metal
template <class T, class U>
METAL_FUNC T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: size mismatch");
  return __builtin_bit_cast(T, u);
}
namespace metal {
using ::as_type;

enum class mem_flags : unsigned {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((unsigned)a | (unsigned)b);
}
METAL_FUNC void threadgroup_barrier(mem_flags f) { __msl_threadgroup_barrier((unsigned)f); }
METAL_FUNC void simdgroup_barrier(mem_flags f) { __msl_simdgroup_barrier((unsigned)f); }
METAL_FUNC void atomic_thread_fence(mem_flags f) {}
}  // namespace metal
