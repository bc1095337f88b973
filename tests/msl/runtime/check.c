// The checked build: clang calls these functions for every memory access (-fsanitize=kernel-address
// with outlined checks) and for undefined behaviour (-fsanitize-minimal-runtime).
#include <stdlib.h>
#include <string.h>

#include "msl.h"

// clang's -asan-mapping-offset: one shadow byte for 8 bytes of the fibers' stacks, where it poisons
// the gaps between a function's arrays.
#define SHADOW ((uintptr_t)0x7fff8000)

typedef struct {
  uint64_t addr;
  uint32_t size;
  bool write, atomic;
  void *pc;
} Access;

static const char *verb(const Access *a) { return a->write ? "write" : "read"; }

// ---- races and uninitialised reads ----------------------------------------------------------------------
typedef struct {
  const char *name;
  Cell *cells;
  uint64_t offset;  // of the access in the buffer or variable
  int kind;         // 0 threadgroup memory, 1 device memory
} Target;

// Was the last write ordered before this point, by a barrier of the threadgroup or the SIMD-group?
static bool ordered(const Cell *c, int kind) {
  const Worker *w = msl_worker;
  const Simdgroup *sg = w->current->sg;
  uint32_t writer_sg = (c->writer - 1u) / LANES;
  return c->write_epoch != w->epoch[kind] ||
         (writer_sg == sg->id && c->write_sg_epoch != sg->epoch[kind]);
}

static void check_last_write(const Cell *c, const Access *a, const Target *t, uint64_t byte) {
  const Worker *w = msl_worker;
  uint32_t me = w->current->thread + 1u;
  if (!(c->flags & WRITTEN) || (a->atomic && (c->flags & WRITTEN_ATOMIC))) return;
  if (t->kind == 1 && c->writer_tg != w->group)
    msl_fail(DATA_RACE, a->pc, a->addr,
             "data race on '%s' byte %llu: %s by threadgroup %u after write by threadgroup %u",
             t->name, (unsigned long long)byte, verb(a), w->group, c->writer_tg);
  if (c->writer != me && !ordered(c, t->kind))
    msl_fail(DATA_RACE, a->pc, a->addr,
             "data race on '%s' byte %llu: %s by thread %u, written by thread %u with no barrier "
             "between",
             t->name, (unsigned long long)byte, verb(a), me - 1, c->writer - 1u);
}

static void check_last_read(const Cell *c, const Access *a, const Target *t, uint64_t byte) {
  const Worker *w = msl_worker;
  const Simdgroup *sg = w->current->sg;
  uint32_t me = w->current->thread + 1u;
  if (a->atomic || !c->reader || c->reader == me || c->read_epoch != w->epoch[t->kind]) return;
  if (t->kind == 1 && (c->flags & WRITTEN) && c->writer_tg != w->group) return;  // stale reader
  if (c->reader_sg == sg->id && c->read_sg_epoch != sg->epoch[t->kind]) return;
  bool several = c->reader == SEVERAL;
  msl_fail(DATA_RACE, a->pc, a->addr,
           "data race on '%s' byte %llu: write by thread %u, read by %s%u with no barrier between",
           t->name, (unsigned long long)byte, me - 1,
           several ? "several threads incl. SIMD-group " : "thread ",
           several ? c->reader_sg : c->reader - 1u);
}

static void note_read(Cell *c, int kind) {
  const Worker *w = msl_worker;
  const Simdgroup *sg = w->current->sg;
  uint16_t me = w->current->thread + 1;
  if (c->reader && c->read_epoch == w->epoch[kind] && c->reader != me) {
    c->reader = SEVERAL;
    if (c->reader_sg != sg->id) c->reader_sg = SEVERAL_SG;
  } else {
    c->reader = me;
    c->read_epoch = w->epoch[kind];
    c->reader_sg = sg->id;
  }
  c->read_sg_epoch = sg->epoch[kind];
}

static void check_cells(const Access *a, const Target *t) {
  const Worker *w = msl_worker;
  for (uint32_t i = 0; i < a->size; i++) {
    Cell *c = &t->cells[i];
    uint64_t byte = t->offset + i;
    check_last_write(c, a, t, byte);
    if (!a->write) {
      if (!(c->flags & VALID))
        msl_fail(UNINITIALISED, a->pc, a->addr, "read of uninitialised %s '%s' byte %llu",
                 t->kind ? "device memory" : "threadgroup memory", t->name,
                 (unsigned long long)byte);
      if (!a->atomic) note_read(c, t->kind);
      continue;
    }
    check_last_read(c, a, t, byte);
    c->writer = w->current->thread + 1;
    c->write_epoch = w->epoch[t->kind];
    c->write_sg_epoch = w->current->sg->epoch[t->kind];
    c->writer_tg = w->group;
    c->flags = (a->atomic ? WRITTEN_ATOMIC : 0) | WRITTEN | VALID;
    c->reader = 0;
  }
}

// ---- bounds -----------------------------------------------------------------------------------------------
static void check_stack(const Access *a) {
  for (uint64_t p = a->addr & ~7ull; p < a->addr + a->size; p += 8) {
    int8_t s = *(int8_t *)((p >> 3) + SHADOW);
    if (!s) continue;
    bool to_end = p + 8 < a->addr + a->size;  // the access covers the rest of this granule
    if (s < 0 || to_end || (int)((a->addr + a->size - 1) & 7) >= s)
      msl_fail(OUT_OF_BOUNDS, a->pc, a->addr,
               "out-of-bounds %s of %u bytes on a thread-private variable", verb(a), a->size);
  }
}

static bool inside(const Access *a, const uint8_t *start, uint64_t size) {
  uint64_t s = (uint64_t)start;
  return a->addr >= s && a->addr + a->size <= s + size;
}

static uint64_t distance(uint64_t addr, const uint8_t *start, uint64_t size) {
  uint64_t s = (uint64_t)start;
  return addr < s ? s - addr : addr < s + size ? 0 : addr - (s + size);
}

static void check_threadgroup(const Access *a) {
  Worker *w = msl_worker;
  const Variable *nearest = NULL;
  for (uint32_t i = 0; i < w->variable_count; i++) {
    const Variable *v = &w->variables[i];
    if (!v->ptr) continue;
    if (inside(a, v->ptr, v->size)) {
      Target t = {v->name, &w->tg_cells[a->addr - (uint64_t)w->tg_memory],
                  a->addr - (uint64_t)v->ptr, 0};
      check_cells(a, &t);
      msl_count_access(msl_run_state->buffer_count, a->addr - (uint64_t)w->tg_memory, a->size,
                       a->write, a->pc);
      return;
    }
    if (!nearest || distance(a->addr, v->ptr, v->size) <
                        distance(a->addr, nearest->ptr, nearest->size))
      nearest = v;
  }
  msl_fail(OUT_OF_BOUNDS, a->pc, a->addr,
           "out-of-bounds %s of %u bytes at offset %lld of threadgroup '%s' (%u bytes)", verb(a),
           a->size, nearest ? (long long)(a->addr - (uint64_t)nearest->ptr) : 0,
           nearest ? nearest->name : "?", nearest ? nearest->size : 0);
}

static void check_device(const Access *a) {
  Worker *w = msl_worker;
  const Run *run = msl_run_state;
  const Buffer *nearest = NULL;
  for (uint32_t k = 0; k < run->buffer_count; k++) {
    uint32_t i = (w->last_hit + k) % run->buffer_count;
    const Buffer *b = &run->buffers[i];
    if (inside(a, b->ptr, b->size)) {
      w->last_hit = i;
      uint64_t offset = a->addr - (uint64_t)b->ptr;
      if (b->writable) {
        Target t = {b->name, run->cells[i] + offset, offset, 1};
        check_cells(a, &t);
      } else if (a->write) {
        msl_fail(READ_ONLY, a->pc, a->addr, "write to read-only buffer '%s'", b->name);
      }
      msl_count_access(i, offset, a->size, a->write, a->pc);
      return;
    }
    if (!nearest || distance(a->addr, b->ptr, b->size) <
                        distance(a->addr, nearest->ptr, nearest->size))
      nearest = b;
  }
  uint64_t sgs = a->addr - (uint64_t)w->sgs;
  if (sgs < w->sg_count * sizeof(Simdgroup)) return;  // a SIMD-group function reads its table
  if (!a->write && a->addr >= run->options.code_lo && a->addr < run->options.code_hi) {
    msl_count_access(run->buffer_count + 1, 0, a->size, false, a->pc);
    return;
  }
  msl_fail(OUT_OF_BOUNDS, a->pc, a->addr,
           "out-of-bounds %s of %u bytes at offset %lld of buffer '%s' (%llu bytes)", verb(a),
           a->size, nearest ? (long long)(a->addr - (uint64_t)nearest->ptr) : 0,
           nearest ? nearest->name : "?", nearest ? (unsigned long long)nearest->size : 0);
}

static void on_access(uint64_t addr, uint64_t size, bool write, bool atomic, void *pc) {
  Worker *w = msl_worker;
  if (!w || !w->current) return;
  const uint64_t budget = 1ull << 27;
  Access a = {addr, (uint32_t)size, write, atomic, pc};
  if (++w->accesses > budget)
    msl_fail(RUNAWAY, pc, addr,
             "a thread made more than %llu memory accesses without reaching a barrier or a "
             "SIMD-group function (infinite loop?)",
             (unsigned long long)budget);
  if (addr - (uint64_t)w->stacks < w->stack_bytes) check_stack(&a);
  else if (addr - (uint64_t)w->tg_memory < TG_BYTES) check_threadgroup(&a);
  else check_device(&a);
}

// ---- clang's callbacks ------------------------------------------------------------------------------------
// The size-specific callbacks stand where natural alignment was assumed (up to 8 bytes). From version
// 20 on clang uses the sizeless ones, and no alignment check of UBSan, for *(T *)(block->bytes + i)
// too. There those check a power-of-two size as well, at the cost of a false report where a packed
// vector is not aligned as its whole size.
static void aligned_access(uint64_t addr, uint64_t size, bool write, void *pc) {
  uint64_t align = size < 8 ? size : 8;
  if ((addr & (align - 1)) && msl_worker && msl_worker->current)
    msl_fail(MISALIGNED, pc, addr, "misaligned %s of %llu bytes", write ? "write" : "read",
             (unsigned long long)size);
  on_access(addr, size, write, false, pc);
}

static void any_access(uint64_t addr, uint64_t size, bool write, void *pc) {
#if CLANG >= 20
  if (size == 2 || size == 4 || size == 8 || size == 16) {
    aligned_access(addr, size, write, pc);
    return;
  }
#endif
  on_access(addr, size, write, false, pc);
}

#define ACCESS(n)                                                                              \
  EXPORT void __asan_load##n##_noabort(uint64_t a) { aligned_access(a, n, false, CALLER); } \
  EXPORT void __asan_store##n##_noabort(uint64_t a) { aligned_access(a, n, true, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
EXPORT void __asan_loadN_noabort(uint64_t a, uint64_t n) { any_access(a, n, false, CALLER); }
EXPORT void __asan_storeN_noabort(uint64_t a, uint64_t n) { any_access(a, n, true, CALLER); }

EXPORT void *__asan_memcpy(void *to, const void *from, size_t n) {
  on_access((uint64_t)from, n, false, false, CALLER);
  on_access((uint64_t)to, n, true, false, CALLER);
  return memcpy(to, from, n);
}
EXPORT void *__asan_memmove(void *to, const void *from, size_t n) {
  on_access((uint64_t)from, n, false, false, CALLER);
  on_access((uint64_t)to, n, true, false, CALLER);
  return memmove(to, from, n);
}
EXPORT void *__asan_memset(void *to, int value, size_t n) {
  on_access((uint64_t)to, n, true, false, CALLER);
  return memset(to, value, n);
}
EXPORT void __asan_handle_no_return(void) {}

#define SET_SHADOW(value) \
  EXPORT void __asan_set_shadow_##value(uint64_t a, uint64_t n) { memset((void *)a, 0x##value, n); }
SET_SHADOW(00)
SET_SHADOW(f1)
SET_SHADOW(f2)
SET_SHADOW(f3)
SET_SHADOW(f5)
SET_SHADOW(f8)

#define UB(name, kind, text)                                                \
  EXPORT void __ubsan_handle_##name##_minimal(void) {                       \
    if (msl_worker && msl_worker->current) msl_fail(kind, CALLER, 0, text); \
  }
UB(out_of_bounds, OUT_OF_BOUNDS, "array index out of bounds")
UB(type_mismatch, MISALIGNED, "misaligned or null access")
UB(alignment_assumption, MISALIGNED, "misaligned access")
UB(shift_out_of_bounds, UNDEFINED, "shift amount out of range")
UB(divrem_overflow, UNDEFINED, "division by zero or overflow")
UB(add_overflow, UNDEFINED, "signed integer overflow in +")
UB(sub_overflow, UNDEFINED, "signed integer overflow in -")
UB(mul_overflow, UNDEFINED, "signed integer overflow in *")
UB(negate_overflow, UNDEFINED, "signed overflow in negation")
UB(float_cast_overflow, UNDEFINED, "float-to-integer conversion out of range")
UB(pointer_overflow, UNDEFINED, "pointer overflow")
UB(builtin_unreachable, UNDEFINED, "unreachable code")
UB(missing_return, UNDEFINED, "missing return")
UB(load_invalid_value, UNDEFINED, "invalid bool or enum value")
UB(invalid_builtin, UNDEFINED, "clz or ctz of zero")

// ---- atomics ------------------------------------------------------------------------------------------------
// kind: 0 load, 1 store, 2 read-modify-write. A checked build runs on one host thread: no lock there.
static bool locked(void) {
  const Options *o = &msl_run_state->options;
  return !o->checked && o->threads > 1;
}

EXPORT void __msl_atomic_begin(const void *p, uint32_t size, uint32_t kind, void *pc) {
  if (locked())
    while (atomic_flag_test_and_set_explicit(&msl_run_state->atomics, memory_order_acquire))
      if (atomic_load_explicit(&msl_run_state->stop, memory_order_relaxed)) break;
  if (!msl_run_state->options.checked) return;
  on_access((uint64_t)p, size, kind == 1, true, pc);
  if (kind == 2) on_access((uint64_t)p, size, true, true, pc);
}

EXPORT void __msl_atomic_end(void) {
  if (locked()) atomic_flag_clear_explicit(&msl_run_state->atomics, memory_order_release);
}

// compiler-rt's float -> bfloat16, round to nearest even. A 16-bit float is returned in the low bits
// of the first vector register on both machines; a vector type says so to any compiler.
typedef uint16_t InVector __attribute__((vector_size(16)));
EXPORT InVector __truncsfbf2(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  bool nan = (u & 0x7fffffff) > 0x7f800000;
  InVector r = {nan ? (uint16_t)(u >> 16 | 64) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
  return r;
}
