// What csrc/cuda/hopper.cuh asks of compute capability 9.0, on the host. A bulk copy runs at once, or when all fibers
// wait; waiting that never ends stops the program with the state of every barrier.
#pragma once

#include <cmath>

#include "fibers_on_host.h"

namespace on_host {

// for the thread sanitizer: whoever comes to a barrier has to know that it has begun
inline void see(const void* barrier) { (void)*static_cast<const volatile uint64_t*>(barrier); }

UNSEEN_BY_SANITIZERS inline int number_of(const Block& block, const void* at) {
  for (int i = 0; i < block.meetings_begun; ++i)
    if (block.meetings[i].at == at) return i;
  fail("a barrier that has not begun");
}

UNSEEN_BY_SANITIZERS inline void end_phase_if_all_came(Meeting& m) {
  ++gpu.events;
  require(m.missing >= 0, "more arrivals than a phase has");
  if (m.missing) return;
  require(m.bytes >= 0, "more bytes than were announced");
  if (!m.bytes) ++m.phase, m.missing = m.count;
}

UNSEEN_BY_SANITIZERS inline void release(Meeting& m) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&m.known[m.phase % 2]);
#endif
}

UNSEEN_BY_SANITIZERS inline void begin_meeting(const void* at, int count) {
  Block& block = *gpu.running->block;
  for (int i = 0; i < block.meetings_begun; ++i) require(block.meetings[i].at != at, "a barrier begins twice");
  require(block.meetings_begun < MOST_MEETINGS && count > 0, "too many barriers, or one that nobody comes to");
  Meeting& m = block.meetings[block.meetings_begun++];
  m.at = at, m.count = m.missing = count;
  gpu.running->hidden = true;
}

UNSEEN_BY_SANITIZERS inline void come(Block& block, const void* at, int bytes) {
  require(block.threads_left, "an arrival at a barrier of a block that has ended");
  Meeting& m = block.meetings[number_of(block, at)];
  release(m);
  m.bytes += bytes, --m.missing;
  end_phase_if_all_came(m);
}

UNSEEN_BY_SANITIZERS inline void bytes_came(Meeting& m, int bytes) {
  release(m);
  m.bytes -= bytes;
  end_phase_if_all_came(m);
}

UNSEEN_BY_SANITIZERS inline void wait_for_phase(const void* at, unsigned parity) {
  Fiber& me = *gpu.running;
  me.waits_for = number_of(*me.block, at), me.parity = parity;
  Meeting& m = me.block->meetings[me.waits_for];
  while (m.phase % 2 == parity) to_scheduler();
  me.waits_for = -1, me.parity = 0;
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&m.known[parity]);
#endif
}

UNSEEN_BY_SANITIZERS inline void require_shown() {
  for (const auto& fiber : gpu.fibers) require(!fiber->hidden_at_barrier, "what no fence has shown to bulk copies");
}

UNSEEN_BY_SANITIZERS inline void begin_bulk(Bulk bulk, const void* to, const void* barrier, int blocks) {
  const Block& mine = *gpu.running->block;
  const int64_t place = offset_in_block(to);
  require(place % 128 == 0 && bulk.box_rows > 0 && bulk.box_rows <= 256, "a box that no copy takes");
  for (int rank = 0; rank < blocks; ++rank) {
    require(gpu.bulks_begun - gpu.bulks_done < MOST_BULKS, "too many copies at once");
    bulk.block = blocks == 1 ? gpu.running->block : gpu.blocks[rank].get();
    bulk.to = bulk.block->shared + place;
    bulk.meeting = &bulk.block->meetings[number_of(mine, barrier)];
#if defined(__SANITIZE_THREAD__)
    bulk.sanitizer = __tsan_create_fiber(0);
#endif
    gpu.bulks[gpu.bulks_begun++ % MOST_BULKS] = bulk;
    if (!gpu.copies_late) run_bulk();
  }
}

UNSEEN_BY_SANITIZERS inline void arrive_at_cluster_barrier() {
  Fiber* const me = gpu.running;
  me->hidden_at_barrier = me->hidden;
  const uint64_t full = ++me->cluster_barriers * gpu.fibers.size();
  ++gpu.cluster_arrived, ++gpu.events;
  while (gpu.cluster_arrived < full) to_scheduler();
}

// every 16 bytes of a row of 128 lie where three bits of the row's address are xored to the place
inline int64_t swizzled(int64_t place) { return place ^ (place >> 3 & 0x70); }

inline void copy_bulk(const Bulk& bulk) {
  require(bulk.block->threads_left, "a copy to a block that has ended");
  see(bulk.meeting->at);
  // number by number: memcpy of a few bytes may become code that the thread sanitizer does not see
  for (int r = 0; r < bulk.box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int64_t row = bulk.row + r, column = bulk.column + c;
      const bool there = row < bulk.rows && column < bulk.columns;
      const char* const from = bulk.matrix + row * bulk.row_bytes + 2 * column;
      char* const to = bulk.block->shared + swizzled(bulk.to - bulk.block->shared + 128 * r + 2 * c);
      *reinterpret_cast<uint16_t*>(to) = there ? *reinterpret_cast<const uint16_t*>(from) : 0;
    }
  bytes_came(*bulk.meeting, 128 * bulk.box_rows);
}

}  // namespace on_host

namespace vitfast {
namespace {

struct TensorMap {
  const char* matrix = nullptr;
  int64_t rows = 0, columns = 0, row_bytes = 0;
  int box_rows = 0;
};

inline char* swizzled_memory() { return shared_memory(); }

inline uint32_t exchanged(uint32_t word, int distance) {
  const int side = on_host::meet(&word, 1, nullptr);
  return on_host::word_of(side, threadIdx.x % 32 ^ distance, 0);
}

inline float exp2_about(float x) { return exp2f(x); }
inline float reciprocal_about(float x) { return 1 / x; }
inline float smaller(float x, float y) { return x > y ? y : x; }

template <int count>
inline void give_registers() {}
template <int count>
inline void take_registers() {}

inline int cluster_rank() { return on_host::gpu.running->block->rank; }

template <int blocks>
inline void meet_cluster() {
  if (blocks == 1) return on_host::barrier();
  on_host::require(blocks == static_cast<int>(on_host::gpu.blocks.size()), "a cluster of another size");
#if defined(__SANITIZE_THREAD__)
  char* const which = &on_host::gpu.cluster_barrier[on_host::gpu.running->cluster_barriers % 2];
  __tsan_release(which);
#endif
  on_host::arrive_at_cluster_barrier();
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(which);
#endif
}

inline void begin_barrier(Barrier& barrier, int arrivals) {
  on_host::require_aligned(&barrier, 8);
  barrier.state = 0;
  on_host::begin_meeting(&barrier, arrivals);
}
inline void show_barriers() { on_host::gpu.running->hidden = false; }
inline void arrive(Barrier& barrier) {
  on_host::see(&barrier);
  on_host::come(*on_host::gpu.running->block, &barrier, 0);
}
inline void arrive_in_block(Barrier& barrier, int rank) {
  on_host::Block& block = *on_host::gpu.blocks[rank];
  char* const there = block.shared + on_host::offset_in_block(&barrier);
  on_host::see(there);
  on_host::come(block, there, 0);
}
inline void arrive_and_expect(Barrier& barrier, int bytes) {
  on_host::see(&barrier);
  on_host::come(*on_host::gpu.running->block, &barrier, bytes);
}
inline void wait_for(Barrier& barrier, uint32_t parity) {
  on_host::see(&barrier);
  on_host::wait_for_phase(&barrier, parity);
}

template <int blocks>
inline void copy_box(void* to, const TensorMap& map, int64_t row, int column, Barrier& barrier) {
  on_host::require_shown();
  on_host::begin_bulk({.matrix = map.matrix,
                       .rows = map.rows,
                       .columns = map.columns,
                       .row_bytes = map.row_bytes,
                       .row = row,
                       .column = column,
                       .box_rows = map.box_rows,
                       .block = nullptr,
                       .to = nullptr,
                       .meeting = nullptr,
                       .run = on_host::copy_bulk,
                       .sanitizer = nullptr},
                      to, &barrier, blocks);
}

template <class T>
inline float swizzled_number(uint64_t descriptor, int row, int k) {
  const auto field = [&](int from) { return static_cast<int64_t>(descriptor >> from & 0x3fff) * 16; };
  on_host::require(descriptor >> 62 == 1, "a descriptor without the swizzle of 128 bytes");
  T number;
  const int64_t place = field(0) + row / 8 * field(32) + row % 8 * 128 + 2 * k;
  std::memcpy(&number, shared_memory() + on_host::swizzled(place), 2);
  return to_float(number);
}

template <class T, int eighths>
inline void multiply_swizzled(float (&c)[eighths][4], const char* a, const char* b) {
  on_host::require_aligned(a, 16);
  on_host::require_aligned(b, 16);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const uint64_t from_a = swizzled_descriptor(static_cast<uint32_t>(on_host::offset_in_block(a)));
  const uint64_t from_b = swizzled_descriptor(static_cast<uint32_t>(on_host::offset_in_block(b)));
  float (*const sums)[4] = c;
  on_host::gpu.running->products.push_back([=] {
    for (int down = 0; down < 2; ++down) {
      float of_row[16];
      for (int k = 0; k < 16; ++k) of_row[k] = swizzled_number<T>(from_a, row + 8 * down, k);
      for (int j = 0; j < eighths; ++j)
        for (int i = 0; i < 2; ++i) {
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += of_row[k] * swizzled_number<T>(from_b, 8 * j + lane % 4 * 2 + i, k);
          sums[j][2 * down + i] += sum;
        }
    }
  });
}

inline cudaError_t describe(TensorMap* map, const void* matrix, bool, int64_t rows, int64_t columns, int64_t row_bytes,
                            int box_rows) {
  if (reinterpret_cast<uintptr_t>(matrix) % 16 || row_bytes % 16 || rows < 1 || columns < 1 || box_rows > 256)
    return cudaErrorInvalidValue;
  *map = {static_cast<const char*>(matrix), rows, columns, row_bytes, box_rows};
  return cudaSuccess;
}

template <class Args>
inline cudaError_t start_clusters(void (*kernel)(Args), int cluster, int64_t blocks, int threads, int shared, void*,
                                  const Args& args) {
  if (shared > on_host::gpu.shared_limit || blocks < 1 || blocks % cluster) return cudaErrorInvalidValue;
  on_host::gpu.kernel = [=] { kernel(args); };
  on_host::gpu.grid = {static_cast<unsigned>(blocks)};
  for (int64_t block = 0; block < blocks; block += cluster) on_host::run_cluster(block, cluster, threads, shared);
  return cudaSuccess;
}

inline cudaError_t multiprocessors_of(int, int* count) {
  *count = on_host::gpu.multiprocessors;
  return cudaSuccess;
}

}  // namespace
}  // namespace vitfast
