// Fibers, SIMD-group rendezvous and barriers.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "msl.h"

Run *msl_run_state;
__thread Worker *msl_worker;

// ---- the switch: callee-saved registers only, as in a function call ---------------------------------
#if defined(__x86_64__)
__asm__(
    ".text\n.globl msl_switch\n.hidden msl_switch\n.type msl_switch,@function\nmsl_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size msl_switch,.-msl_switch\n");

void *msl_fiber_init(uint8_t *top, void (*fn)(void)) {
  void **sp = (void **)((uintptr_t)top & ~(uintptr_t)15);
  *--sp = NULL;  // where a return address would be: keeps the stack aligned for fn
  *--sp = (void *)fn;
  for (int i = 0; i < 6; i++) *--sp = NULL;
  return sp;
}
#elif defined(__aarch64__)
__asm__(
    ".text\n.globl msl_switch\n.hidden msl_switch\n.type msl_switch,%function\nmsl_switch:\n"
    "sub sp,sp,#160\n"
    "stp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
    "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\n"
    "stp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\n"
    "ldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\n"
    "ldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\nret\n"
    ".size msl_switch,.-msl_switch\n");

void *msl_fiber_init(uint8_t *top, void (*fn)(void)) {
  uint64_t *sp = (uint64_t *)(((uintptr_t)top & ~(uintptr_t)15) - 160);
  memset(sp, 0, 160);
  sp[11] = (uint64_t)fn;  // x30
  return sp;
}
#else
#error "the fiber switch is written for x86-64 and aarch64"
#endif

// ---- reports ------------------------------------------------------------------------------------------
void msl_to_main(void) {
  Worker *w = msl_worker;
  Fiber *f = w->current;
  w->switches++;
  msl_switch(&f->sp, w->main_sp);
}

// Files the first report of the run. Called on a fiber it does not return.
__attribute__((noinline)) void msl_fail(enum Kind kind, void *pc, uint64_t addr, const char *format,
                                        ...) {
  Worker *w = msl_worker;
  Run *run = msl_run_state;
  if (!atomic_flag_test_and_set(&run->reported)) {
    Report *r = run->report;
    r->kind = kind;
    memcpy(r->tg, w->group_pos, sizeof r->tg);
    if (w->current) {
      r->thread = w->current->thread;
      r->lane = w->current->lane;
      r->simdgroup = w->current->sg->id;
    }
    r->pc = (uint64_t)pc;
    r->addr = addr;
    va_list args;
    va_start(args, format);
    vsnprintf(r->message, sizeof r->message, format, args);
    va_end(args);
  }
  atomic_store(&run->stop, true);
  w->failed = true;
  if (w->current) {
    msl_to_main();
    abort();
  }
}

const char *msl_state_name(State state) {
  static const char *const names[] = {"running", "a SIMD-group function", "simdgroup_barrier",
                                      "threadgroup_barrier", "return"};
  return names[state];
}

uint64_t msl_random(Worker *w) {
  w->random ^= w->random << 13;
  w->random ^= w->random >> 7;
  w->random ^= w->random << 17;
  return w->random;
}

// ---- scheduling ---------------------------------------------------------------------------------------
static void switch_to(Fiber *f) {
  Worker *w = msl_worker;
  Fiber *me = w->current;
  w->current = f;
  w->accesses = 0;
  w->switches++;
  msl_switch(&me->sp, f->sp);
}

static Fiber *next_ready(Simdgroup *s, uint32_t from) {
  for (uint32_t k = 1, j = from + 1; k <= s->size; k++, j++) {
    if (j >= s->size) j -= s->size;
    Fiber *f = s->fiber[s->order[j]];
    if (f->state == READY) return f;
  }
  return NULL;
}

// Runs others until this fiber is READY again: its own SIMD-group first, then the worker's loop.
static void block(Fiber *me) {
  Worker *w = msl_worker;
  while (me->state != READY) {
    Fiber *f = next_ready(me->sg, me->at);
    if (f) switch_to(f);
    else msl_to_main();
    if (w->failed) msl_to_main();
  }
}

static void release(Simdgroup *s) {
  for (uint32_t i = 0; i < s->size; i++) {
    Fiber *f = s->fiber[i];
    if (f->state != DONE && f->state != IN_TG_BARRIER) f->state = READY;
  }
  s->arrived = 0;
}

static uint32_t lanes_waiting(const Simdgroup *s) {
  uint32_t mask = 0;
  for (uint32_t i = 0; i < s->size; i++)
    if (s->fiber[i]->state == IN_SIMD) mask |= 1u << s->fiber[i]->lane;
  return mask;
}

static void count_epochs(uint16_t epoch[2], uint32_t flags) {
  if (flags & MEM_THREADGROUP) epoch[0]++;
  if (flags & MEM_DEVICE) epoch[1]++;
}

// All live lanes of a SIMD-group meet here, at one place of the program, or it is a divergence.
static void meet(State state, void *site, uint32_t flags) {
  Worker *w = msl_worker;
  Fiber *me = w->current;
  Simdgroup *s = me->sg;
  me->state = state;
  me->site = site;
  if (++s->arrived < s->live) {
    block(me);
    return;
  }
  for (uint32_t i = 0; i < s->size; i++) {
    Fiber *other = s->fiber[i];
    if (other->state == DONE)
      msl_fail(DIVERGENT_SIMD, site, 0,
               "divergent SIMD-group operation: lane %u has returned while lane %u waits in %s",
               other->lane, me->lane, msl_state_name(state));
    if (other->state != state || other->site != site) {
      msl_run_state->report->other_pc = (uint64_t)other->site;
      msl_fail(DIVERGENT_SIMD, site, 0,
               "divergent SIMD-group operation: lane %u waits in %s while lane %u waits in %s at a "
               "different place",
               me->lane, msl_state_name(state), other->lane, msl_state_name(other->state));
    }
  }
  if (state == IN_SG_BARRIER) {
    count_epochs(s->epoch, flags);
    w->sg_barriers += !(flags & MEM_MEETING);
  }
  if (state == IN_SIMD) {
    s->exchange[s->parity].mask = lanes_waiting(s);
    s->parity ^= 1;
    w->exchanges++;
  }
  release(s);
  if (msl_run_state->options.order) {
    Fiber *first = s->fiber[s->order[0]];
    if (first != me && first->state == READY) switch_to(first);
  }
}

// ---- called by generated code ---------------------------------------------------------------------------
EXPORT Exchange *__msl_exchange(const void *value, uint32_t size) {
  Fiber *me = msl_worker->current;
  Exchange *x = &me->sg->exchange[me->sg->parity];
  if (size > MAX_VALUE)
    msl_fail(BAD_LAUNCH, CALLER, 0, "SIMD-group value of %u bytes; at most %d are exchanged", size,
             MAX_VALUE);
  memcpy(x->value[me->lane], value, size);
  meet(IN_SIMD, CALLER, 0);
  x->lane = me->lane;  // read before the next switch, so one field serves every lane
  return x;
}

EXPORT uint32_t __msl_lane(void) { return msl_worker->current->lane; }

EXPORT void __msl_simdgroup_barrier(uint32_t flags) { meet(IN_SG_BARRIER, CALLER, flags); }

EXPORT void __msl_threadgroup_barrier(uint32_t flags) {
  Worker *w = msl_worker;
  Fiber *me = w->current;
  me->state = IN_TG_BARRIER;
  me->site = CALLER;
  if (++w->arrived < w->live) {
    block(me);
    return;
  }
  for (uint32_t i = 0; i < w->size; i++) {
    Fiber *other = &w->fibers[i];
    if (other->state == DONE)
      msl_fail(DIVERGENT_BARRIER, me->site, 0,
               "divergent threadgroup_barrier: thread %u has already returned", i);
    if (other->state != IN_TG_BARRIER || other->site != me->site) {
      msl_run_state->report->other_pc = (uint64_t)other->site;
      msl_fail(DIVERGENT_BARRIER, me->site, 0,
               "divergent threadgroup_barrier: thread %u is at another barrier than thread %u", i,
               me->thread);
    }
  }
  count_epochs(w->epoch, flags);
  w->tg_barriers++;
  w->arrived = 0;
  for (uint32_t i = 0; i < w->size; i++) w->fibers[i].state = READY;
  if (msl_run_state->options.order) msl_to_main();
}

// D = A B + C of 8x8 matrices in float. A lane holds two neighbours of each: see simdgroup_matrix.h.
typedef struct { float a[2], b[2], c[2], d[2]; } Mma;

EXPORT void __msl_mma8x8(Mma *m) {
  Fiber *me = msl_worker->current;
  Simdgroup *s = me->sg;
  Exchange *x = &s->exchange[s->parity];
  const size_t in = offsetof(Mma, d);
  memcpy(x->value[me->lane], m, in);
  if (s->arrived + 1 == s->live) {  // the last lane computes for all, before any is released
    float A[8][8], B[8][8], C[8][8];
    for (uint32_t l = 0; l < LANES; l++) {
      Mma e;
      memcpy(&e, x->value[l], in);
      uint32_t row = (l / 4 & 4) + (l / 2 & 3), col = (l / 4 & 2) * 2 + (l & 1) * 2;
      for (int k = 0; k < 2; k++) {
        A[row][col + k] = e.a[k];
        B[row][col + k] = e.b[k];
        C[row][col + k] = e.c[k];
      }
    }
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 8; k++)
        for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (uint32_t l = 0; l < LANES; l++) {
      uint32_t row = (l / 4 & 4) + (l / 2 & 3), col = (l / 4 & 2) * 2 + (l & 1) * 2;
      memcpy(x->value[l] + in, &C[row][col], 8);
    }
  }
  meet(IN_SIMD, CALLER, 0);
  memcpy(m->d, x->value[me->lane] + in, 8);
}

EXPORT void *__msl_tg_static(uint32_t id, uint32_t size, uint32_t align, const char *name) {
  Worker *w = msl_worker;
  Run *run = msl_run_state;
  if (id >= MAX_VARIABLES)
    msl_fail(TG_MEMORY, CALLER, 0, "more than %d threadgroup variables", MAX_VARIABLES);
  Variable *v = &w->variables[id];
  if (v->ptr) return v->ptr;
  if (id >= w->variable_count) w->variable_count = id + 1;
  if (align < 16) align = 16;
  uint32_t used = (size + 15) & ~15u;
  for (uint32_t i = 0; i < w->variable_count; i++) used += (w->variables[i].size + 15) & ~15u;
  if (used > run->options.tg_limit)
    msl_fail(TG_MEMORY, CALLER, 0, "threadgroup memory exceeds %u bytes (%u needed, at '%s')",
             run->options.tg_limit, used, name);
  uint32_t offset = (w->tg_used + align - 1) / align * align;
  *v = (Variable){w->tg_memory + offset, size, name};
  w->tg_used = offset + size + 256;  // red zone
  if (used > run->report->tg_bytes) run->report->tg_bytes = used;
  memset(v->ptr, 0xff, size);  // NaN in every float type
  if (run->options.checked) memset(&w->tg_cells[offset], 0, size * sizeof(Cell));
  return v->ptr;
}

// A fiber's body. What a lane that returns leaves behind may be a SIMD-group that waits for it.
void msl_fiber_main(void) {
  Worker *w = msl_worker;
  Fiber *f = w->current;
  msl_run_state->entry(msl_run_state->pointers, &f->ids);
  f->state = DONE;
  w->live--;
  Simdgroup *s = f->sg;
  s->live--;
  if (s->arrived && s->arrived == s->live)
    for (uint32_t i = 0; i < s->size; i++) {
      Fiber *o = s->fiber[i];
      if (o->state == IN_SIMD || o->state == IN_SG_BARRIER)
        msl_fail(DIVERGENT_SIMD, o->site, 0,
                 "divergent SIMD-group operation: lane %u returned while lane %u waits in %s",
                 f->lane, o->lane, msl_state_name(o->state));
    }
  Fiber *next = w->failed ? NULL : next_ready(s, 0);
  if (next) {
    w->current = next;
    w->switches++;
    msl_switch(&f->sp, next->sp);
  } else {
    msl_to_main();
  }
  abort();
}
