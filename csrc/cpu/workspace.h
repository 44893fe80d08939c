// Scratch memory for kernels. Fresh memory costs a page fault every 4 KiB, up to a twentieth of a kernel's time, so
// each thread that calls kernels keeps what they needed, up to a limit.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

// tests under sanitizers keep nothing, so that every block ends where it should
#ifndef VITFAST_KEPT_BYTES
#define VITFAST_KEPT_BYTES (32 << 20)
#endif
constexpr int64_t KEPT_BYTES = VITFAST_KEPT_BYTES;

inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline char* allocate(int64_t bytes) {
  char* const memory = static_cast<char*>(std::aligned_alloc(64, bytes));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// What one thread keeps; taken and given back as a stack.
struct KeptMemory {
  char* memory = nullptr;
  int64_t size = 0, used = 0, wanted = 0;

  ~KeptMemory() { std::free(memory); }

  // null where it does not fit; then it will the next time, up to the limit
  char* take(int64_t bytes) {
    if (used + bytes > wanted && used + bytes <= KEPT_BYTES) wanted = used + bytes;
    if (!used && size < wanted) {
      std::free(memory);
      memory = nullptr;
      size = 0;
      memory = allocate(wanted);
      size = wanted;
    }
    if (used + bytes > size) return nullptr;
    used += bytes;
    return memory + used - bytes;
  }
};

// As many bytes for each of `threads` threads, on cache lines of their own.
class Workspaces {
 public:
  Workspaces(int threads, int64_t bytes) : step(whole_lines(bytes)), total(threads * step) {
    static thread_local KeptMemory kept;
    from = &kept;
    memory = kept.take(total);
    if (!memory) {
      from = nullptr;
      memory = allocate(total);
    }
  }
  ~Workspaces() {
    if (from)
      from->used -= total;
    else
      std::free(memory);
  }
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  char* of(int thread) const { return memory + thread * step; }

 private:
  const int64_t step, total;
  KeptMemory* from;
  char* memory;
};

}  // namespace
