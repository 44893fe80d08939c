// A GPU's words on the host, for csrc/cuda. What a GPU leaves open is taken at its worst: copies and wgmma happen when
// they are waited for, shared memory begins as NaN, and what needs an alignment or a fence stops the program where that
// is missing. mma orders no threads. fibers_on_host.h runs the blocks; what only 9.0 has is in hopper_on_host.h.
#pragma once

#include "fibers_on_host.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define VITFAST_WGMMA 1

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

#define threadIdx (on_host::gpu.running->thread)
#define blockIdx (on_host::gpu.running->block->index)
#define gridDim (on_host::gpu.grid)
#define blockDim (on_host::gpu.threads)

inline void __syncthreads() { on_host::barrier(); }
inline void __syncwarp() { on_host::warp_barrier(); }

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

inline char* shared_memory() { return on_host::gpu.running->block->shared; }

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
  const char* const of_eight = shared_memory() + field(0) + k / 8 * field(16) + row / 8 * field(32);
  std::memcpy(&number, of_eight + row % 8 * 16 + k % 8 * 2, 2);
  return to_float(number);
}

template <class T>
inline void multiply_async(float (&c)[32][4], const char* a, int a_across, const char* b, int b_across) {
  on_host::require_aligned(a, 16);
  on_host::require_aligned(b, 16);
  on_host::require(a_across % 16 == 0 && b_across % 16 == 0, "a distance that a descriptor cannot hold");
  for (const auto& fiber : on_host::gpu.fibers)
    on_host::require(fiber->block != on_host::gpu.running->block || !fiber->hidden_at_barrier,
                     "wgmma reads what no fence has shown to it");
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const uint64_t from_a = matrix_descriptor(static_cast<uint32_t>(on_host::offset_in_block(a)), a_across);
  const uint64_t from_b = matrix_descriptor(static_cast<uint32_t>(on_host::offset_in_block(b)), b_across);
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
  on_host::gpu.grid = {static_cast<unsigned>(blocks)};
  for (int64_t block = 0; block < blocks; ++block) on_host::run_cluster(block, 1, threads, shared);
  return cudaSuccess;
}

}  // namespace
}  // namespace vitfast
