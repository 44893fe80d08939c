// A GPU's words on the host: csrc/cuda compiled with this runs block by block, each CUDA thread as a fiber that runs
// until it has to wait for others. What a GPU leaves open is taken at its worst: copies and wgmma happen when they are
// waited for, shared memory begins as NaN, and what needs an alignment or a fence stops the program where that is
// missing. Under the thread sanitizer every fiber is a thread of its own, and only __syncthreads orders them: mma does
// not.
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

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define VITFAST_WGMMA 1
#define UNSEEN_BY_SANITIZERS __attribute__((no_sanitize("thread"), noinline))

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

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

struct Fiber {
  ucontext_t context;
  Place* place = nullptr;
  Index thread;
  bool done = false;
  bool hidden = false;             // has written to shared memory what no fence has shown to wgmma
  bool hidden_at_barrier = false;  // had, when it came to the last barrier
  uint64_t barriers = 0, meetings = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<std::function<void()>> products;
  std::deque<std::vector<std::function<void()>>> product_groups;
  void* fake_stack = nullptr;
};

struct Gpu {
  int shared_limit = 227 << 10, device = 0, devices = 1;
  Index block, threads;
  char* shared = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Place>> places;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  std::function<void()> kernel;
  uint64_t arrived = 0;   // at barriers, of all fibers
  uint64_t met[64] = {};  // of each warp
  uint64_t events = 0;    // what others may wait for
  uint32_t exchange[64][2][32][8];
  const void* addresses[64][2][32];
  char barrier[2];  // what the thread sanitizer knows of it
};

inline Gpu gpu;

[[noreturn]] inline void fail(const char* why) {
  const unsigned thread = gpu.running ? gpu.running->thread.x : 0;
  std::fprintf(stderr, "cuda_on_host: block %u, thread %u: %s\n", gpu.block.x, thread, why);
  std::_Exit(3);
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
  ++gpu.arrived, ++gpu.events;
  while (gpu.arrived < full) to_scheduler();
}

inline void barrier() {
#if defined(__SANITIZE_THREAD__)
  char* const which = &gpu.barrier[gpu.running->barriers % 2];
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
  for (int i = 0; i < count; ++i) gpu.exchange[warp][side][lane][i] = words[i];
  gpu.addresses[warp][side][lane] = address;
  const uint64_t full = ++me->meetings * 32;
  ++gpu.met[warp], ++gpu.events;
  while (gpu.met[warp] < full) to_scheduler();
  return side;
}

UNSEEN_BY_SANITIZERS inline uint32_t word_of(int side, int lane, int i) {
  return gpu.exchange[gpu.running->thread.x / 32][side][lane][i];
}
UNSEEN_BY_SANITIZERS inline const void* address_of(int side, int lane) {
  return gpu.addresses[gpu.running->thread.x / 32][side][lane];
}

UNSEEN_BY_SANITIZERS inline void mark_done() {
  gpu.running->done = true;
  ++gpu.events;
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
#if defined(__SANITIZE_THREAD__)
  // what was there when the block began
  __tsan_acquire(&gpu.block);
#endif
  gpu.kernel();
  Fiber* const me = gpu.running;
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

UNSEEN_BY_SANITIZERS inline void run_block(int64_t block, int threads, int shared) {
  // exactly as large as was asked for: the address sanitizer sees what is beside it
  char* const memory = static_cast<char*>(std::aligned_alloc(128, (shared + 127) / 128 * 128));
  std::memset(memory, 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory + shared, (shared + 127) / 128 * 128 - shared);
#endif
  gpu.shared = memory;
  gpu.block = {static_cast<unsigned>(block)};
  gpu.threads = {static_cast<unsigned>(threads)};
  gpu.arrived = 0;
  std::memset(gpu.met, 0, sizeof gpu.met);
  gpu.fibers.clear();
#if defined(__SANITIZE_THREAD__)
  gpu.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  for (int t = 0; t < threads; ++t) {
    gpu.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *gpu.fibers.back();
    if (t == static_cast<int>(gpu.places.size())) {
      gpu.places.push_back(std::make_unique<Place>());
#if defined(__SANITIZE_THREAD__)
      gpu.places.back()->sanitizer = __tsan_create_fiber(0);
#endif
    }
    fiber.place = gpu.places[t].get();
    fiber.thread = {static_cast<unsigned>(t)};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.place->stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&gpu.block);
#endif
  for (size_t done = 0; done < gpu.fibers.size();) {
    const uint64_t before = gpu.events;
    done = 0;
    for (auto& fiber : gpu.fibers) {
      if (!fiber->done) run_until_it_waits(*fiber);
      done += fiber->done;
    }
    if (gpu.events == before && done < gpu.fibers.size()) fail("a barrier that not all threads come to");
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&gpu);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory + shared, (shared + 127) / 128 * 128 - shared);
#endif
  gpu.fibers.clear();
  gpu.running = nullptr;
  std::free(memory);
}

inline void require_aligned(const void* address, size_t bytes) {
  require(reinterpret_cast<uintptr_t>(address) % bytes == 0, "an address is not aligned to what is read or written");
}

}  // namespace on_host

#define threadIdx (on_host::gpu.running->thread)
#define blockIdx (on_host::gpu.block)
#define blockDim (on_host::gpu.threads)

inline void __syncthreads() { on_host::barrier(); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = on_host::gpu.device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= on_host::gpu.devices) return cudaErrorInvalidValue;
  on_host::gpu.device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }

namespace vitfast {
namespace {

inline float to_float(Half x) {
  _Float16 value;
  std::memcpy(&value, &x, 2);
  return static_cast<float>(value);
}
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float to_float(Bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

inline uint16_t rounded(float x, Half) {
  const _Float16 value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}
inline uint16_t rounded(float x, Bf16) {
  const uint32_t bits = as_bits(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T>
inline uint32_t pack(float first, float second) {
  return rounded(first, T{}) | static_cast<uint32_t>(rounded(second, T{})) << 16;
}

inline char* shared_memory() { return on_host::gpu.shared; }

template <class Word>
inline Word load_global(const void* from) {
  on_host::require_aligned(from, sizeof(Word));
  Word word;
  std::memcpy(&word, from, sizeof(Word));
  return word;
}

inline void store_shared(void* to, const Bytes16& value) {
  on_host::require_aligned(to, 16);
  on_host::gpu.running->hidden = true;
  std::memcpy(to, &value, 16);
}

template <int bytes>
inline void copy_async(void* shared, const void* global, bool there) {
  on_host::require_aligned(shared, bytes);
  on_host::require_aligned(global, bytes);
  on_host::gpu.running->copies.push_back({shared, global, bytes, there});
}
inline void close_copies() {
  auto& fiber = *on_host::gpu.running;
  fiber.copy_groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int left>
inline void wait_for_copies() {
  auto& fiber = *on_host::gpu.running;
  while (fiber.copy_groups.size() > left) {
    for (const auto& copy : fiber.copy_groups.front()) {
      fiber.hidden = true;
      if (copy.there)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
    fiber.copy_groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  on_host::require_aligned(row, 16);
  const int side = on_host::meet(nullptr, 0, row), lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    std::memcpy(&to[i], static_cast<const char*>(on_host::address_of(side, 8 * i + lane / 4)) + lane % 4 * 4, 4);
}

inline void load_transposed(uint32_t (&to)[4], const void* row) {
  on_host::require_aligned(row, 16);
  const int side = on_host::meet(nullptr, 0, row), lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const char* const from = static_cast<const char*>(on_host::address_of(side, 8 * i + lane % 4 * 2 + j));
      std::memcpy(reinterpret_cast<char*>(&to[i]) + 2 * j, from + lane / 4 * 2, 2);
    }
}

template <class T>
inline float half_of(uint32_t word, int i) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * i))});
}

template <class T>
inline void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const int side = on_host::meet(words, 6, nullptr), lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, low = i / 2, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      sum += half_of<T>(on_host::word_of(side, row * 4 + from, low + k / 8 * 2), k % 2) *
             half_of<T>(on_host::word_of(side, column * 4 + from, 4 + k / 8), k % 2);
    }
    c[i] += sum;
  }
}

inline void show_to_wgmma() { on_host::gpu.running->hidden = false; }
inline void begin_wgmma() {}
inline void close_wgmma() {
  auto& fiber = *on_host::gpu.running;
  fiber.product_groups.push_back(std::move(fiber.products));
  fiber.products.clear();
}
template <int left>
inline void wait_for_wgmma() {
  auto& groups = on_host::gpu.running->product_groups;
  while (groups.size() > left) {
    for (const auto& product : groups.front()) product();
    groups.pop_front();
  }
}

// number (row, k) of a matrix as wgmma finds it by its descriptor
template <class T>
inline float number_in(uint64_t descriptor, int row, int k) {
  const auto field = [&](int from) { return static_cast<int>(descriptor >> from & 0x3fff) * 16; };
  on_host::require(descriptor >> 46 == 0, "a descriptor with a swizzle");
  T number;
  const char* const of_eight = on_host::gpu.shared + field(0) + k / 8 * field(16) + row / 8 * field(32);
  std::memcpy(&number, of_eight + row % 8 * 16 + k % 8 * 2, 2);
  return to_float(number);
}

template <class T>
inline void multiply_async(float (&c)[32][4], const char* a, int a_across, const char* b, int b_across) {
  on_host::require_aligned(a, 16);
  on_host::require_aligned(b, 16);
  on_host::require(a_across % 16 == 0 && b_across % 16 == 0, "a distance that a descriptor cannot hold");
  for (const auto& fiber : on_host::gpu.fibers)
    on_host::require(!fiber->hidden_at_barrier, "wgmma reads what no fence has shown to it");
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const uint64_t from_a = matrix_descriptor(static_cast<uint32_t>(a - on_host::gpu.shared), a_across);
  const uint64_t from_b = matrix_descriptor(static_cast<uint32_t>(b - on_host::gpu.shared), b_across);
  float (*const sums)[4] = c;
  on_host::gpu.running->products.push_back([=] {
    for (int down = 0; down < 2; ++down) {
      float of_row[16];
      for (int k = 0; k < 16; ++k) of_row[k] = number_in<T>(from_a, row + 8 * down, k);
      for (int j = 0; j < 32; ++j)
        for (int i = 0; i < 2; ++i) {
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += of_row[k] * number_in<T>(from_b, 8 * j + lane % 4 * 2 + i, k);
          sums[j][2 * down + i] += sum;
        }
    }
  });
}

template <int bytes>
inline void note_shared_bytes() {}

inline void keep_in_place(float&) {}

inline void stop() { on_host::fail("a kernel that there is no code for"); }

template <class Args>
inline cudaError_t start(void (*kernel)(Args), int64_t blocks, int threads, int shared, void*, const Args& args) {
  if (shared > on_host::gpu.shared_limit || blocks < 1) return cudaErrorInvalidValue;
  on_host::gpu.kernel = [=] { kernel(args); };
  for (int64_t block = 0; block < blocks; ++block) on_host::run_block(block, threads, shared);
  return cudaSuccess;
}

}  // namespace
}  // namespace vitfast
