// One dispatch: guarded copies of the buffers, worker threads, threadgroups, faults and time limit.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "msl.h"

#define SHADOW ((uintptr_t)0x7fff8000)

// ---- threadgroups -------------------------------------------------------------------------------------------
static void order_lanes(Worker *w, Simdgroup *s) {
  uint32_t order = msl_run_state->options.order;
  for (uint32_t i = 0; i < s->size; i++) s->order[i] = order == 1 ? s->size - 1 - i : i;
  if (order == 2)
    for (uint32_t i = s->size - 1; i > 0; i--) {
      uint32_t j = msl_random(w) % (i + 1);
      uint8_t swap = s->order[i];
      s->order[i] = s->order[j];
      s->order[j] = swap;
    }
  for (uint32_t i = 0; i < s->size; i++) s->fiber[s->order[i]]->at = i;
}

static void start_group(Worker *w, uint64_t group) {
  const Run *run = msl_run_state;
  uint32_t pos[3] = {group % run->groups[0], group / run->groups[0] % run->groups[1],
                     group / run->groups[0] / run->groups[1]};
  uint32_t size[3];  // groups at the edge of the grid are smaller, as with dispatchThreads
  for (int i = 0; i < 3; i++) {
    uint32_t rest = run->grid[i] - pos[i] * run->tg[i];
    size[i] = rest < run->tg[i] ? rest : run->tg[i];
  }
  w->size = w->live = size[0] * size[1] * size[2];
  w->sg_count = (w->size + LANES - 1) / LANES;
  w->arrived = 0;
  w->group = (uint32_t)group;
  memcpy(w->group_pos, pos, sizeof pos);
  w->tg_used = 256;
  memset(w->variables, 0, w->variable_count * sizeof *w->variables);
  w->variable_count = 0;
  w->epoch[0] = w->epoch[1] = 0;
  for (uint32_t g = 0; g < w->sg_count; g++) {
    Simdgroup *s = &w->sgs[g];
    uint32_t rest = w->size - g * LANES;
    s->id = g;
    s->size = s->live = rest < LANES ? rest : LANES;
    s->arrived = s->parity = 0;
    s->epoch[0] = s->epoch[1] = 0;
    for (uint32_t i = 0; i < s->size; i++) s->fiber[i] = &w->fibers[g * LANES + i];
    order_lanes(w, s);
  }
  for (uint32_t t = 0; t < w->size; t++) {
    Fiber *f = &w->fibers[t];
    f->thread = t;
    f->lane = t % LANES;
    f->sg = &w->sgs[t / LANES];
    f->state = READY;
    // Equal offsets in power-of-two stacks would share cache sets: stagger them.
    uint8_t *top = w->stacks + (t + 1) * w->stack_size - t % 61 * 576;
    f->sp = msl_fiber_init(top, msl_fiber_main);
    uint32_t p[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
    Ids *d = &f->ids;
    for (int i = 0; i < 3; i++) {
      d->pos_tg[i] = p[i];
      d->tg_pos[i] = pos[i];
      d->pos_grid[i] = pos[i] * run->tg[i] + p[i];
      d->tg_size[i] = size[i];
      d->grid[i] = run->grid[i];
      d->groups[i] = run->groups[i];
      d->nominal[i] = run->tg[i];
    }
    d->idx_tg = t;
    d->lane = t % LANES;
    d->sg = t / LANES;
    d->nsg = w->sg_count;
  }
}

static Fiber *pick_ready(Worker *w) {
  uint32_t order = msl_run_state->options.order;
  uint32_t first = order == 2 ? msl_random(w) % w->sg_count : 0;
  for (uint32_t k = 0; k < w->sg_count; k++) {
    Simdgroup *s = &w->sgs[order == 1 ? w->sg_count - 1 - k : (first + k) % w->sg_count];
    for (uint32_t i = 0; i < s->size; i++)
      if (s->fiber[s->order[i]]->state == READY) return s->fiber[s->order[i]];
  }
  return NULL;
}

// Nobody can go on: some threads wait where the others will never come.
static void report_deadlock(Worker *w) {
  const Fiber *a = NULL, *b = NULL, *returned = NULL;
  for (uint32_t i = 0; i < w->size; i++) {
    const Fiber *f = &w->fibers[i];
    if (f->state == DONE) returned = returned ? returned : f;
    else if (!a) a = f;
    else if (!b && (f->state != a->state || f->site != a->site)) b = f;
  }
  Report *r = msl_run_state->report;
  bool barrier = a->state == IN_TG_BARRIER || (b && b->state == IN_TG_BARRIER);
  r->other_pc = b ? (uint64_t)b->site : 0;
  w->current = NULL;
  msl_fail(barrier ? DIVERGENT_BARRIER : DIVERGENT_SIMD, a->site, 0,
           "deadlock: thread %u waits in %s, thread %u %s%s", a->thread, msl_state_name(a->state),
           b ? b->thread : returned ? returned->thread : 0u, b ? "waits in " : "has ",
           b ? msl_state_name(b->state) : "returned");
  r->thread = a->thread;
  r->lane = a->lane;
  r->simdgroup = a->sg->id;
}

static void run_group(Worker *w, uint64_t group) {
  start_group(w, group);
  while (w->live && !w->failed) {
    Fiber *f = pick_ready(w);
    if (!f) {
      report_deadlock(w);
      return;
    }
    w->current = f;
    w->accesses = 0;
    w->switches++;
    msl_switch(&w->main_sp, f->sp);
    w->current = NULL;
  }
  if (msl_run_state->options.traffic && !w->failed) msl_count_threadgroup();
}

// ---- workers --------------------------------------------------------------------------------------------------
static uint64_t interrupted_at(const ucontext_t *context) {
#if defined(__x86_64__)
  return (uint64_t)context->uc_mcontext.gregs[REG_RIP];
#else
  return context->uc_mcontext.pc;
#endif
}

static void on_signal(int signal_number, siginfo_t *info, void *context) {
  Worker *w = msl_worker;
  if (!w) {  // not ours
    signal(signal_number, SIG_DFL);
    return;
  }
  w->fault_addr = (uint64_t)info->si_addr;
  w->fault_pc = interrupted_at(context);
  siglongjmp(w->jump, signal_number);
}

static const char *signal_text(int number) {
  if (number == SIGUSR2) return "time limit reached (infinite loop?)";
  if (number == SIGSEGV || number == SIGBUS) return "memory fault";
  if (number == SIGFPE) return "integer division fault";
  return "trap";
}

static void report_signal(Worker *w, int number) {
  Fiber *f = w->current;
  w->current = NULL;
  bool in_kernel = w->fault_pc >= msl_run_state->options.code_lo &&
                   w->fault_pc < msl_run_state->options.code_hi;
  // A report's place is a return address, one past what it points at.
  msl_fail(FAULT, in_kernel ? (void *)(w->fault_pc + 1) : NULL, w->fault_addr, "%s at address 0x%llx (thread %u of threadgroup %u,%u,%u)",
           signal_text(number), (unsigned long long)w->fault_addr, f ? f->thread : 0u,
           w->group_pos[0], w->group_pos[1], w->group_pos[2]);
  if (f) {
    Report *r = msl_run_state->report;
    r->thread = f->thread;
    r->lane = f->lane;
    r->simdgroup = f->sg->id;
  }
}

static void run_groups(Worker *w) {
  Run *run = msl_run_state;
  int number = sigsetjmp(w->jump, 1);
  if (number) {
    report_signal(w, number);
    return;
  }
  while (!w->failed && !atomic_load(&run->stop)) {
    uint64_t group = atomic_fetch_add(&run->next, 1);
    if (group >= run->total) break;
    run_group(w, group);
  }
}

// Metal flushes subnormal floats; the test chooses.
static uint64_t flush_denormals(bool on) {
#if defined(__x86_64__)
  uint32_t old = __builtin_ia32_stmxcsr();
  if (on) __builtin_ia32_ldmxcsr(old | 0x8040);
#else
  uint64_t old;
  __asm__ volatile("mrs %0, fpcr" : "=r"(old));
  if (on) __asm__ volatile("msr fpcr, %0" : : "r"(old | 1u << 24));
#endif
  return old;
}

static void restore_denormals(uint64_t old) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr((uint32_t)old);
#else
  __asm__ volatile("msr fpcr, %0" : : "r"(old));
#endif
}

static void *map(void *at, size_t size, int flags) {
  return mmap(at, size, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
}

static void internal_error(const char *what) {
  Run *run = msl_run_state;
  if (!atomic_flag_test_and_set(&run->reported)) {
    run->report->kind = INTERNAL;
    snprintf(run->report->message, sizeof run->report->message, "%s: %s", what, strerror(errno));
  }
  atomic_store(&run->stop, true);
}

static void work_with(Worker *w, uint32_t seed) {
  Run *run = msl_run_state;
  uint32_t threads = run->tg[0] * run->tg[1] * run->tg[2];
  uint32_t groups = (threads + LANES - 1) / LANES;
  bool checked = run->options.checked;
  w->random = seed * 0x9e3779b97f4a7c15ull + 88172645463325252ull;
  w->stack_size = checked ? 1 << 18 : 1 << 17;
  w->stack_bytes = threads * w->stack_size;
  size_t fibers = threads * sizeof(Fiber), sgs = groups * sizeof(Simdgroup);
  size_t cells = checked ? TG_BYTES * sizeof(Cell) : 1, shadow_bytes = 0;
  uint8_t *shadow = MAP_FAILED, *signal_stack = map(NULL, 1 << 16, 0);
  w->stacks = map(NULL, w->stack_bytes, 0);
  w->tg_memory = map(NULL, TG_BYTES, 0);
  w->fibers = map(NULL, fibers, 0);
  w->sgs = map(NULL, sgs, 0);
  w->tg_cells = map(NULL, cells, 0);
  bool ok = signal_stack != MAP_FAILED && w->stacks != MAP_FAILED && w->tg_memory != MAP_FAILED &&
            (void *)w->fibers != MAP_FAILED && (void *)w->sgs != MAP_FAILED &&
            (void *)w->tg_cells != MAP_FAILED;
  if (ok && checked) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)w->stacks;
    uintptr_t lo = ((start >> 3) + SHADOW) & ~(page - 1);
    uintptr_t hi = (((start + w->stack_bytes) >> 3) + SHADOW + page - 1) & ~(page - 1);
    shadow_bytes = hi - lo;
    shadow = map((void *)lo, shadow_bytes, MAP_FIXED_NOREPLACE);
    if (shadow != (uint8_t *)lo) ok = false;
  }
  if (!ok) {
    internal_error("cannot map a worker's memory");
  } else {
    stack_t ours = {.ss_sp = signal_stack, .ss_size = 1 << 16}, theirs;
    sigaltstack(&ours, &theirs);
    uint64_t old = flush_denormals(run->options.flush_denormals);
    msl_worker = w;
    run_groups(w);
    msl_worker = NULL;
    restore_denormals(old);
    sigaltstack(&theirs, NULL);
  }
  if (shadow != MAP_FAILED) munmap(shadow, shadow_bytes);
  munmap(w->tg_cells, cells);
  munmap(w->sgs, sgs);
  munmap(w->fibers, fibers);
  munmap(w->tg_memory, TG_BYTES);
  munmap(w->stacks, w->stack_bytes);
  munmap(signal_stack, 1 << 16);
}

static void *worker_main(void *seed) {
  Run *run = msl_run_state;
  Worker *w = calloc(1, sizeof *w);
  if (w) work_with(w, (uint32_t)(uintptr_t)seed);
  else internal_error("cannot allocate a worker");
  pthread_mutex_lock(&run->idle_lock);
  if (w) {
    run->report->switches += w->switches;
    run->report->exchanges += w->exchanges;
    run->report->tg_barriers += w->tg_barriers;
    run->report->sg_barriers += w->sg_barriers;
  }
  run->running--;
  pthread_cond_signal(&run->idle);
  pthread_mutex_unlock(&run->idle_lock);
  free(w);
  return NULL;
}

static void run_workers(Run *run) {
  enum { MAX_WORKERS = 64 };
  static const int caught[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGUSR2};
  enum { CAUGHT = sizeof caught / sizeof *caught };
  struct sigaction ours = {.sa_sigaction = on_signal,
                           .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
  struct sigaction theirs[CAUGHT];
  for (int i = 0; i < CAUGHT; i++) sigaction(caught[i], &ours, &theirs[i]);
  pthread_t threads[MAX_WORKERS];
  uint32_t wanted = run->options.threads, started = 0;
  struct timespec limit;
  clock_gettime(CLOCK_REALTIME, &limit);
  limit.tv_sec += run->options.seconds;
  run->running = wanted;
  for (; started < wanted; started++) {
    void *seed = (void *)(uintptr_t)(run->options.seed + started * 7919);
    if (pthread_create(&threads[started], NULL, worker_main, seed)) {
      internal_error("cannot start a worker thread");
      break;
    }
  }
  pthread_mutex_lock(&run->idle_lock);
  run->running -= wanted - started;
  while (run->running)
    if (pthread_cond_timedwait(&run->idle, &run->idle_lock, &limit) == ETIMEDOUT) break;
  if (run->running) {
    atomic_store(&run->stop, true);
    for (uint32_t i = 0; i < started; i++) pthread_kill(threads[i], SIGUSR2);
  }
  pthread_mutex_unlock(&run->idle_lock);
  for (uint32_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
  for (int i = 0; i < CAUGHT; i++) sigaction(caught[i], &theirs[i], NULL);
}

// ---- buffers ----------------------------------------------------------------------------------------------------
typedef struct { uint8_t *mapping, *original, *start, *end; size_t bytes; } Guarded;
enum { MARGIN = 0xff };

// A copy that ends right before an inaccessible page (up to 16 bytes of alignment), so that overruns
// fault even in unchecked builds; a write to the margins between page and copy is seen afterwards.
// Outputs start as NaN; inputs are read-only.
static bool guard(Run *run, uint32_t i, Guarded *g) {
  Buffer *b = &run->buffers[i];
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t body = b->size ? (b->size + page - 1) / page * page : page;
  *g = (Guarded){.original = b->ptr, .bytes = body + 2 * page};
  uint8_t *m = mmap(NULL, g->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return false;
  g->mapping = m;
  g->start = m + page;
  g->end = g->start + body;
  mprotect(m + page, body, PROT_READ | PROT_WRITE);
  uint8_t *copy = m + page + ((body - b->size) & ~(size_t)15);
  memset(g->start, MARGIN, (size_t)(copy - g->start));
  memset(copy + b->size, MARGIN, (size_t)(g->end - copy) - b->size);
  if (!b->writable || b->initialised) memcpy(copy, b->ptr, b->size);
  else memset(copy, 0xff, b->size);
  if (!b->writable) mprotect(m + page, body, PROT_READ);
  b->ptr = copy;
  run->pointers[i] = copy;
  if (!run->options.checked || !b->writable) return true;
  Cell *cells = map(NULL, b->size * sizeof(Cell) + 1, 0);
  if (cells == MAP_FAILED) return false;
  run->cells[i] = cells;
  if (b->initialised)
    for (uint64_t k = 0; k < b->size; k++) cells[k].flags = VALID;
  return true;
}

static void unguard(Run *run, uint32_t i, const Guarded *g) {
  Buffer *b = &run->buffers[i];
  if (!g->mapping) return;
  if (b->writable) memcpy(g->original, b->ptr, b->size);
  if (run->cells[i]) munmap(run->cells[i], b->size * sizeof(Cell) + 1);
  munmap(g->mapping, g->bytes);
  b->ptr = g->original;
}

static void check_margins(const Buffer *b, const Guarded *g) {
  Report *r = msl_run_state->report;
  for (const uint8_t *p = g->start; p < g->end && !r->kind; p++) {
    if (p == b->ptr) p += b->size;
    if (p == g->end || *p == MARGIN) continue;
    r->kind = OUT_OF_BOUNDS;
    r->thread = NO_THREAD;
    snprintf(r->message, sizeof r->message,
             "a write changed the byte at offset %lld of buffer '%s' (%llu bytes); the checked build "
             "says where",
             (long long)(p - b->ptr), b->name, (unsigned long long)b->size);
  }
}

static void check_outputs_written(Run *run) {
  for (uint32_t i = 0; i < run->buffer_count && !run->report->kind; i++) {
    const Buffer *b = &run->buffers[i];
    if (!b->writable || b->initialised) continue;
    uint64_t missing = 0, first = 0;
    for (uint64_t k = 0; k < b->size; k++)
      if (!(run->cells[i][k].flags & VALID) && !missing++) first = k;
    if (!missing) continue;
    run->report->kind = UNWRITTEN;
    snprintf(run->report->message, sizeof run->report->message,
             "output '%s': %llu of %llu bytes never written (first at byte %llu)", b->name,
             (unsigned long long)missing, (unsigned long long)b->size, (unsigned long long)first);
  }
}

// Runs one dispatch; 0, or the kind of the report. One dispatch at a time in a process.
EXPORT int msl_run(Entry entry, Buffer *buffers, uint32_t count, const uint32_t *grid,
                   const uint32_t *tg, const Options *options, Report *report) {
  static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
  enum { MAX_BUFFERS = 64 };
  static Guarded guarded[MAX_BUFFERS];
  Cell *cells[MAX_BUFFERS] = {0};
  void *pointers[MAX_BUFFERS] = {0};
  Run run = {.entry = entry, .buffers = buffers, .cells = cells, .pointers = pointers,
             .buffer_count = count, .total = 1, .options = *options, .report = report,
             .reported = ATOMIC_FLAG_INIT, .atomics = ATOMIC_FLAG_INIT,
             .idle_lock = PTHREAD_MUTEX_INITIALIZER, .idle = PTHREAD_COND_INITIALIZER};
  memset(report, 0, sizeof *report);
  for (int i = 0; i < 3; i++) {
    run.grid[i] = grid[i];
    run.tg[i] = tg[i] < grid[i] ? tg[i] : grid[i];
    run.groups[i] = run.tg[i] ? (grid[i] + run.tg[i] - 1) / run.tg[i] : 0;
    run.total *= run.groups[i];
  }
  uint64_t threads = (uint64_t)run.tg[0] * run.tg[1] * run.tg[2];
  if (!run.total || threads > MAX_THREADS || count > MAX_BUFFERS) {
    report->kind = BAD_LAUNCH;
    snprintf(report->message, sizeof report->message,
             "grid %u x %u x %u, threadgroup %u x %u x %u, %u buffers: need a grid of at least 1, a "
             "threadgroup of 1 to %d threads and at most %d buffers",
             grid[0], grid[1], grid[2], tg[0], tg[1], tg[2], count, MAX_THREADS, MAX_BUFFERS);
    return (int)report->kind;
  }
  pthread_mutex_lock(&one);
  memset(guarded, 0, sizeof guarded);
  msl_run_state = &run;
  uint32_t wanted = run.options.checked ? 1 : options->threads;
  run.options.threads = wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
  if (run.options.threads > run.total) run.options.threads = (uint32_t)run.total;
  bool ok = true;
  for (uint32_t i = 0; i < count && ok; i++) ok = guard(&run, i, &guarded[i]);
  bool counting = options->traffic;
  if (ok && counting) ok = msl_count_start();
  if (ok) run_workers(&run);
  else internal_error("cannot map a buffer");
  if (counting) msl_count_end();
  if (options->checked && !report->kind) check_outputs_written(&run);
  for (uint32_t i = 0; i < count && !report->kind; i++)
    if (buffers[i].writable) check_margins(&buffers[i], &guarded[i]);
  for (uint32_t i = 0; i < count; i++) unguard(&run, i, &guarded[i]);
  msl_run_state = NULL;
  pthread_mutex_unlock(&one);
  return (int)report->kind;
}
