// Shared by the runtime's files: one Metal compute dispatch on the host.
// Every GPU thread is a fiber, SIMD-groups of 32 exchange values by rendezvous, and a checked build
// reports every memory access here. Names start with __msl_ when generated code calls them.
#ifndef MSL_H
#define MSL_H
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define CALLER __builtin_return_address(0)
enum {
  LANES = 32,
  MAX_THREADS = 1024,      // threads of a threadgroup
  MAX_VARIABLES = 256,     // threadgroup variables of a kernel
  MAX_VALUE = 64,          // bytes a SIMD-group function may exchange
  TG_BYTES = 1 << 17,      // arena for threadgroup variables and their red zones
  NO_THREAD = -1,          // of a report: it is not known which
  MEM_DEVICE = 1,          // metal::mem_flags
  MEM_THREADGROUP = 2,
  MEM_MEETING = 0x100,     // the checked build's own barrier, in simdgroup_load and the like
};

// Kinds of report; run.py has their names in the same order.
enum Kind {
  OK, OUT_OF_BOUNDS, DATA_RACE, UNINITIALISED, DIVERGENT_BARRIER, DIVERGENT_SIMD, UNDEFINED, READ_ONLY,
  TG_MEMORY, BAD_LAUNCH, INTERNAL, FAULT, UNWRITTEN, RUNAWAY, MISALIGNED,
};

// ---- mirrored by the wrapper that source.py generates ----------------------------------------------
typedef struct {
  uint32_t pos_grid[3], pos_tg[3], tg_pos[3], tg_size[3], grid[3], groups[3], nominal[3];
  uint32_t idx_tg, lane, sg, nsg;
} Ids;
typedef void (*Entry)(void *const *buffers, const Ids *ids);

// ---- mirrored by run.py -----------------------------------------------------------------------------
typedef struct {
  uint8_t *ptr;
  uint64_t size;
  const char *name;
  uint32_t writable, initialised;
} Buffer;
// Of each buffer, then of threadgroup memory and of the library's constant tables. What follows
// `write_bytes` is counted for buffers only, but for the loads of threadgroup memory by SIMD-groups and
// `bank_turns`; what follows `distinct_written` for loads only, but for the last two.
typedef struct {
  uint64_t loads, stores, read_bytes, write_bytes;  // by single lanes
  uint64_t distinct_read, distinct_written;         // bytes of the buffer
  uint64_t group_loads, group_bytes;                // by SIMD-groups: a byte many lanes load is one
  uint64_t short_segments, short_ideal;             // 32 bytes: touched, fewest for as many bytes
  uint64_t long_segments, long_ideal;               // 128 bytes
  uint64_t bank_turns;                              // of threadgroup memory: see count.c
  uint64_t store_segments, store_ideal;             // of 32 bytes, for stores
} Traffic;
typedef struct {
  uint32_t order;           // 0 ascending, 1 descending, 2 random (seed)
  uint32_t seed, threads, checked, flush_denormals;
  uint32_t tg_limit;        // bytes of threadgroup memory
  uint32_t seconds;         // time limit
  uint32_t pad;
  uint64_t code_lo, code_hi;  // the library's own mapping: constant tables live there
  Traffic *traffic;           // where a checked build counts, or NULL
} Options;
typedef struct {
  uint32_t kind, tg[3], thread, lane, simdgroup, tg_bytes;
  uint64_t pc, other_pc, addr, switches, exchanges, tg_barriers, sg_barriers;
  char message[1024];
} Report;

// ---- mirrored by include/msl/simdgroup.h ------------------------------------------------------------
typedef struct {
  uint32_t mask, lane, width, pad;
  _Alignas(64) uint8_t value[LANES][MAX_VALUE];
} Exchange;

// One byte of memory in a checked build: who wrote it last, who read it since, and in which epoch
// (epochs are counted by barriers; those of a SIMD-group by simdgroup_barrier).
typedef struct {
  uint32_t writer_tg;
  uint16_t writer, write_epoch, write_sg_epoch;
  uint16_t reader, read_epoch, read_sg_epoch;  // thread index + 1; 0: none
  uint8_t reader_sg, flags;
} Cell;
enum { WRITTEN = 1, WRITTEN_ATOMIC = 2, VALID = 4, SEVERAL = 0xffff, SEVERAL_SG = 0xff };

typedef enum { READY, IN_SIMD, IN_SG_BARRIER, IN_TG_BARRIER, DONE } State;
typedef struct Simdgroup Simdgroup;
typedef struct {
  _Alignas(64) void *sp;
  Simdgroup *sg;
  void *site;               // return address of the function it waits in
  uint32_t at;              // its place in the group's order
  uint16_t thread;
  uint8_t lane;
  State state;
  Ids ids;
} Fiber;
struct Simdgroup {
  Fiber *fiber[LANES];
  uint32_t size, live, arrived, parity, id;
  uint16_t epoch[2];
  uint8_t order[LANES];
  Exchange exchange[2];     // double-buffered: a fast lane may already fill the next one
};
typedef struct { uint8_t *ptr; uint32_t size; const char *name; } Variable;

// A host thread that runs one threadgroup at a time.
typedef struct {
  void *main_sp;
  Fiber *current, *fibers;
  Simdgroup *sgs;
  uint32_t size, sg_count, live, arrived;
  uint16_t epoch[2];        // by memory kind: [0] threadgroup, [1] device
  uint8_t *stacks, *tg_memory;
  size_t stack_size, stack_bytes;
  Cell *tg_cells;
  uint32_t tg_used, variable_count;
  Variable variables[MAX_VARIABLES];
  uint32_t group, group_pos[3];
  uint32_t last_hit;        // index of the buffer found last
  bool failed;
  uint64_t accesses, switches, exchanges, tg_barriers, sg_barriers, random;
  sigjmp_buf jump;
  uint64_t fault_addr, fault_pc;
} Worker;

typedef struct {
  Entry entry;
  Buffer *buffers;
  Cell **cells;
  void **pointers;
  uint32_t buffer_count, grid[3], tg[3], groups[3];
  uint64_t total;
  Options options;
  Report *report;
  _Atomic uint64_t next;
  atomic_bool stop;
  atomic_flag reported;
  atomic_flag atomics;
  pthread_mutex_t idle_lock;
  pthread_cond_t idle;
  uint32_t running;
} Run;

extern Run *msl_run_state;
extern __thread Worker *msl_worker;

void msl_switch(void **save, void *load);
void *msl_fiber_init(uint8_t *top, void (*fn)(void));
void msl_fiber_main(void);
void msl_to_main(void);
void msl_fail(enum Kind kind, void *pc, uint64_t addr, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
const char *msl_state_name(State state);
uint64_t msl_random(Worker *w);
bool msl_count_start(void);
void msl_count_access(uint32_t place, uint64_t offset, uint32_t size, bool write, void *pc);
void msl_count_threadgroup(void);
void msl_count_end(void);
#endif
