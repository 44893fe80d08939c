// Blocks of a kernel on the host: each CUDA thread is a fiber that runs until it has to wait for others, those of a
// cluster's blocks by turns. Under the thread sanitizer every fiber is a thread of its own, and so is every bulk copy;
// only barriers order them.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define UNSEEN_BY_SANITIZERS __attribute__((no_sanitize("thread"), noinline))

namespace on_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool there;
};

constexpr size_t STACK = 1 << 18;

// What fibers of one thread index use one after the other: making it takes longer than most of them run.
struct Place {
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* sanitizer = nullptr;
};

struct Block;

struct Fiber {
  ucontext_t context;
  Place* place = nullptr;
  Block* block = nullptr;
  Index thread;
  bool done = false;
  bool hidden = false;             // has written to shared memory what no fence has shown to wgmma
  bool hidden_at_barrier = false;  // had, when it came to the last barrier
  uint64_t barriers = 0, meetings = 0, cluster_barriers = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<std::function<void()>> products;
  std::deque<std::vector<std::function<void()>>> product_groups;
  void* fake_stack = nullptr;
  int waits_for = -1;  // number of the Meeting of its block
  unsigned parity = 0;
};

// A barrier in shared memory that counts arrivals and bytes. What wgmma and copies do with it is in hopper_on_host.h.
struct Meeting {
  const void* at = nullptr;
  int64_t count = 0, missing = 0, bytes = 0;
  uint64_t phase = 0;
  char known[2];  // by the thread sanitizer, of each parity
};

constexpr int MOST_MEETINGS = 64;

struct Block {
  Index index;
  int rank = 0;  // in its cluster
  char* shared = nullptr;
  uint64_t arrived = 0;   // at barriers, of all fibers
  uint64_t met[64] = {};  // of each warp
  uint32_t exchange[64][2][32][8];
  const void* addresses[64][2][32];
  char barrier[2], of_warp[64][2];  // what the thread sanitizer knows of them
  Meeting meetings[MOST_MEETINGS];
  int meetings_begun = 0;
  int threads_left = 0;
};

// A copy of a box of a matrix to a block's shared memory, see hopper_on_host.h; a thread of its own to the thread
// sanitizer.
struct Bulk {
  const char* matrix;
  int64_t rows, columns, row_bytes, row, column;
  int box_rows;
  Block* block;
  char* to;
  Meeting* meeting;
  void (*run)(const Bulk&);
  void* sanitizer;
};

constexpr uint64_t MOST_BULKS = 256;

struct Gpu {
  int shared_limit = 227 << 10, device = 0, devices = 1, multiprocessors = 4;
  Index threads, grid;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Place>> places;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  std::function<void()> kernel;
  uint64_t events = 0;           // what others may wait for
  uint64_t cluster_arrived = 0;  // at barriers of the cluster
  bool copies_late = false;      // bulk copies run when all fibers wait, not at once
  Bulk bulks[MOST_BULKS];
  uint64_t bulks_begun = 0, bulks_done = 0;
  char began, cluster_barrier[2];  // what the thread sanitizer knows of them
};

inline Gpu gpu;

[[noreturn]] inline void fail(const char* why) {
  const unsigned thread = gpu.running ? gpu.running->thread.x : 0;
  const unsigned block = gpu.running ? gpu.running->block->index.x : gpu.blocks[0]->index.x;
  std::fprintf(stderr, "cuda_on_host: block %u, thread %u: %s\n", block, thread, why);
  std::_Exit(3);
}

// with the state of all barriers and of whoever waits
[[noreturn]] inline void fail_waiting() {
  for (const auto& block : gpu.blocks)
    for (int i = 0; i < block->meetings_begun; ++i) {
      const Meeting& m = block->meetings[i];
      std::fprintf(stderr, "block %u, barrier at byte %ld: phase %lu, %ld of %ld arrivals and %ld bytes missing\n",
                   block->index.x, static_cast<long>(static_cast<const char*>(m.at) - block->shared),
                   static_cast<unsigned long>(m.phase), static_cast<long>(m.missing), static_cast<long>(m.count),
                   static_cast<long>(m.bytes));
    }
  const auto same = [](const Fiber& a, const Fiber& b) {
    return a.block == b.block && a.waits_for == b.waits_for && a.parity == b.parity && a.done == b.done;
  };
  for (size_t first = 0, last; first < gpu.fibers.size(); first = last) {
    const Fiber& fiber = *gpu.fibers[first];
    for (last = first; last < gpu.fibers.size() && same(fiber, *gpu.fibers[last]); ++last) continue;
    std::fprintf(stderr, "block %u, threads %u to %u: ", fiber.block->index.x, fiber.thread.x,
                 gpu.fibers[last - 1]->thread.x);
    if (fiber.done)
      std::fprintf(stderr, "done\n");
    else if (fiber.waits_for < 0)
      std::fprintf(stderr, "at a barrier of all or with its warp\n");
    else
      std::fprintf(
          stderr, "wait for parity %u at byte %ld\n", fiber.parity,
          static_cast<long>(static_cast<const char*>(fiber.block->meetings[fiber.waits_for].at) - fiber.block->shared));
  }
  fail("a barrier that not all come to");
}

inline void require(bool fine, const char* why) {
  if (!fine) fail(why);
}

UNSEEN_BY_SANITIZERS inline void to_scheduler(bool last = false) {
  Fiber* const fiber = gpu.running;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(gpu.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber->fake_stack, nullptr, 0);
#endif
  (void)last;
  swapcontext(&fiber->context, &gpu.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

UNSEEN_BY_SANITIZERS inline void arrive_at_barrier() {
  Fiber* const me = gpu.running;
  me->hidden_at_barrier = me->hidden;
  const uint64_t full = ++me->barriers * gpu.threads.x;
  ++me->block->arrived, ++gpu.events;
  while (me->block->arrived < full) to_scheduler();
}

inline void barrier() {
#if defined(__SANITIZE_THREAD__)
  char* const which = &gpu.running->block->barrier[gpu.running->barriers % 2];
  __tsan_release(which);
#endif
  arrive_at_barrier();
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(which);
#endif
}

// All 32 lanes hand over words and an address; returns where those of this meeting are.
UNSEEN_BY_SANITIZERS inline int meet(const uint32_t* words, int count, const void* address) {
  Fiber* const me = gpu.running;
  const int warp = me->thread.x / 32, lane = me->thread.x % 32, side = me->meetings % 2;
  for (int i = 0; i < count; ++i) me->block->exchange[warp][side][lane][i] = words[i];
  me->block->addresses[warp][side][lane] = address;
  const uint64_t full = ++me->meetings * 32;
  ++me->block->met[warp], ++gpu.events;
  while (me->block->met[warp] < full) to_scheduler();
  return side;
}

inline void warp_barrier() {
#if defined(__SANITIZE_THREAD__)
  Fiber* const me = gpu.running;
  char* const which = &me->block->of_warp[me->thread.x / 32][me->meetings % 2];
  __tsan_release(which);
#endif
  meet(nullptr, 0, nullptr);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(which);
#endif
}

UNSEEN_BY_SANITIZERS inline uint32_t word_of(int side, int lane, int i) {
  return gpu.running->block->exchange[gpu.running->thread.x / 32][side][lane][i];
}
UNSEEN_BY_SANITIZERS inline const void* address_of(int side, int lane) {
  return gpu.running->block->addresses[gpu.running->thread.x / 32][side][lane];
}

UNSEEN_BY_SANITIZERS inline void mark_done() {
  gpu.running->done = true;
  --gpu.running->block->threads_left;
  ++gpu.events;
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
#if defined(__SANITIZE_THREAD__)
  // what was there when the block began
  __tsan_acquire(&gpu.began);
#endif
  gpu.kernel();
  Fiber* const me = gpu.running;
  require(me->product_groups.empty(), "products that nobody has waited for");
  require(me->copies.empty() && me->products.empty(), "copies or products that no group has");
  mark_done();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&gpu);
#endif
  to_scheduler(true);
}

UNSEEN_BY_SANITIZERS inline void run_until_it_waits(Fiber& fiber) {
  gpu.running = &fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.place->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(&mine, fiber.place->stack.get(), STACK);
#endif
  swapcontext(&gpu.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
}

UNSEEN_BY_SANITIZERS inline void run_bulk() {
  const Bulk& bulk = gpu.bulks[gpu.bulks_done++ % MOST_BULKS];
  ++gpu.events;
#if defined(__SANITIZE_THREAD__)
  void* const mine = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(bulk.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  bulk.run(bulk);
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(mine, __tsan_switch_to_fiber_no_sync);
  __tsan_destroy_fiber(bulk.sanitizer);
#endif
}

UNSEEN_BY_SANITIZERS inline void add_block(int64_t block, int rank, int threads, int shared) {
  gpu.blocks.push_back(std::make_unique<Block>());
  Block& added = *gpu.blocks.back();
  // exactly as large as was asked for: the address sanitizer sees what is beside it
  const int room = (shared + 1023) / 1024 * 1024;
  added.shared = static_cast<char*>(std::aligned_alloc(1024, room));
  std::memset(added.shared, 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(added.shared + shared, room - shared);
#endif
  added.index = {static_cast<unsigned>(block)};
  added.rank = rank, added.threads_left = threads;
  for (int t = 0; t < threads; ++t) {
    const size_t place = gpu.fibers.size();
    gpu.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *gpu.fibers.back();
    if (place == gpu.places.size()) {
      gpu.places.push_back(std::make_unique<Place>());
#if defined(__SANITIZE_THREAD__)
      gpu.places.back()->sanitizer = __tsan_create_fiber(0);
#endif
    }
    fiber.place = gpu.places[place].get();
    fiber.block = &added;
    fiber.thread = {static_cast<unsigned>(t)};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.place->stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

// Blocks from `first` on, of which none but these know each other.
UNSEEN_BY_SANITIZERS inline void run_cluster(int64_t first, int blocks, int threads, int shared) {
  gpu.threads = {static_cast<unsigned>(threads)};
  gpu.cluster_arrived = 0;
#if defined(__SANITIZE_THREAD__)
  gpu.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  for (int rank = 0; rank < blocks; ++rank) add_block(first + rank, rank, threads, shared);
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&gpu.began);
#endif
  for (size_t done = 0; done < gpu.fibers.size();) {
    const uint64_t before = gpu.events;
    done = 0;
    for (auto& fiber : gpu.fibers) {
      if (!fiber->done) run_until_it_waits(*fiber);
      done += fiber->done;
    }
    gpu.running = nullptr;
    if (gpu.events != before || done == gpu.fibers.size()) continue;
    if (gpu.bulks_begun == gpu.bulks_done) fail_waiting();
    run_bulk();
  }
  require(gpu.bulks_begun == gpu.bulks_done, "a copy is under way when all threads are done");
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&gpu);
#endif
  gpu.fibers.clear();
  for (auto& block : gpu.blocks) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block->shared + shared, (shared + 1023) / 1024 * 1024 - shared);
#endif
    std::free(block->shared);
  }
  gpu.blocks.clear();
}

inline int64_t offset_in_block(const void* shared) {
  return static_cast<const char*>(shared) - gpu.running->block->shared;
}

inline void require_aligned(const void* address, size_t bytes) {
  require(reinterpret_cast<uintptr_t>(address) % bytes == 0, "an address is not aligned to what is read or written");
}

}  // namespace on_host
