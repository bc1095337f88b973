// What a launch reads and writes. A lane's access counts for its buffer; the loads, or stores, that the
// lanes of one SIMD-group make at one place of the program, each for the n-th time, count as one.
#include <stdlib.h>
#include <string.h>

#include "msl.h"

enum { SHORT_SEGMENT = 32, LONG_SEGMENT = 128, WORD = 4, BANKS = 32 };

typedef struct {
  uint64_t pc, offset;
  uint32_t thread, serial, place, size, write;
} Access;

static struct {
  Access *accesses;
  size_t count, capacity;
  uint8_t **touched;  // for each place and byte: 1 read, 2 written
} state;

static Traffic *traffic(uint32_t place) { return &msl_run_state->options.traffic[place]; }

static uint64_t bytes_of(uint32_t place) {
  const Run *run = msl_run_state;
  return place < run->buffer_count ? run->buffers[place].size : 0;
}

bool msl_count_start(void) {
  uint32_t buffers = msl_run_state->buffer_count;
  memset(&state, 0, sizeof state);
  state.touched = calloc(buffers + 1, sizeof *state.touched);
  if (!state.touched) return false;
  for (uint32_t i = 0; i < buffers; i++)
    if (!(state.touched[i] = calloc(bytes_of(i) + 1, 1))) return false;
  return true;
}

void msl_count_access(uint32_t place, uint64_t offset, uint32_t size, bool write, void *pc) {
  const Run *run = msl_run_state;
  if (!run->options.traffic) return;
  Traffic *t = traffic(place);
  *(write ? &t->stores : &t->loads) += 1;
  *(write ? &t->write_bytes : &t->read_bytes) += size;
  if (place > run->buffer_count) return;
  if (place < run->buffer_count)
    for (uint32_t i = 0; i < size; i++) state.touched[place][offset + i] |= write ? 2 : 1;
  if (write && place == run->buffer_count) return;
  if (state.count == state.capacity) {
    size_t capacity = state.capacity ? 2 * state.capacity : 1 << 12;
    Access *grown = realloc(state.accesses, capacity * sizeof *grown);
    if (!grown) msl_fail(INTERNAL, pc, 0, "no memory to count %zu accesses of a threadgroup", capacity);
    state.accesses = grown;
    state.capacity = capacity;
  }
  state.accesses[state.count] =
      (Access){.pc = (uint64_t)pc, .offset = offset, .place = place, .size = size, .write = write,
               .thread = msl_worker->current->thread, .serial = (uint32_t)state.count};
  state.count++;
}

#define COMPARE(a, b) \
  if ((a) != (b)) return (a) < (b) ? -1 : 1

static int by_thread(const void *p, const void *q) {
  const Access *a = p, *b = q;
  COMPARE(a->thread, b->thread);
  COMPARE(a->pc, b->pc);
  COMPARE(a->serial, b->serial);
  return 0;
}

// `serial` is now how often the thread had been at this place before.
static int by_group(const void *p, const void *q) {
  const Access *a = p, *b = q;
  COMPARE(a->thread / LANES, b->thread / LANES);
  COMPARE(a->pc, b->pc);
  COMPARE(a->serial, b->serial);
  COMPARE(a->place, b->place);
  COMPARE(a->offset, b->offset);
  COMPARE(a->size, b->size);
  return 0;
}

static bool same_group(const Access *a, const Access *b) {
  return a->thread / LANES == b->thread / LANES && a->pc == b->pc && a->serial == b->serial &&
         a->place == b->place;
}

// The segments of `unit` bytes that accesses in order of their offsets touch.
static uint64_t segments(const Access *first, const Access *end, uint64_t unit) {
  uint64_t found = 0, next = 0;
  for (const Access *l = first; l < end; l++) {
    uint64_t from = l->offset / unit, to = (l->offset + l->size - 1) / unit + 1;
    if (from < next) from = next;
    if (to > from) {
      found += to - from;
      next = to;
    }
  }
  return found;
}

// How often the busiest of 32 banks of 4 bytes is asked for another word by loads in order of their
// offsets. Lanes that want the same word ask once.
static uint64_t bank_turns(const Access *first, const Access *end) {
  uint64_t turns[BANKS] = {0}, next = 0, most = 0;
  for (const Access *l = first; l < end; l++) {
    uint64_t from = l->offset / WORD, to = (l->offset + l->size - 1) / WORD + 1;
    for (uint64_t word = from < next ? next : from; word < to; word++) {
      uint64_t now = ++turns[word % BANKS];
      if (now > most) most = now;
    }
    if (to > next) next = to;
  }
  return most;
}

static void count_group(const Access *first, const Access *end) {
  Traffic *t = traffic(first->place);
  if (first->place == msl_run_state->buffer_count) {
    t->group_loads++;
    t->bank_turns += bank_turns(first, end);
    return;
  }
  uint64_t distinct = segments(first, end, 1);
  if (first->write) {
    t->store_segments += segments(first, end, SHORT_SEGMENT);
    t->store_ideal += (distinct + SHORT_SEGMENT - 1) / SHORT_SEGMENT;
    return;
  }
  t->group_loads++;
  t->group_bytes += distinct;
  t->short_segments += segments(first, end, SHORT_SEGMENT);
  t->short_ideal += (distinct + SHORT_SEGMENT - 1) / SHORT_SEGMENT;
  t->long_segments += segments(first, end, LONG_SEGMENT);
  t->long_ideal += (distinct + LONG_SEGMENT - 1) / LONG_SEGMENT;
}

void msl_count_threadgroup(void) {
  Access *all = state.accesses, *end = all + state.count;
  if (!state.count) return;
  qsort(all, state.count, sizeof *all, by_thread);
  uint32_t before = 0;
  for (size_t i = 0; i < state.count; i++) {
    bool again = i && all[i].thread == all[i - 1].thread && all[i].pc == all[i - 1].pc;
    before = again ? before + 1 : 0;
    all[i].serial = before;
  }
  qsort(all, state.count, sizeof *all, by_group);
  for (Access *first = all, *l = all; l < end; l++)
    if (l + 1 == end || !same_group(first, l + 1)) {
      count_group(first, l + 1);
      first = l + 1;
    }
  state.count = 0;
}

void msl_count_end(void) {
  for (uint32_t i = 0; state.touched && i < msl_run_state->buffer_count; i++) {
    if (!state.touched[i]) continue;
    Traffic *t = traffic(i);
    for (uint64_t k = 0; k < bytes_of(i); k++) {
      t->distinct_read += state.touched[i][k] & 1;
      t->distinct_written += state.touched[i][k] >> 1;
    }
    free(state.touched[i]);
  }
  free(state.touched);
  free(state.accesses);
}
