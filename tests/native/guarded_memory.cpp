// posix_memalign and free, to be preloaded into a process whose tensors are to end or begin at memory that faults.
//
// Every block lies in pages of its own between at least 64 MiB that nobody may touch. In the placement END its last
// byte is followed by them, as near as its alignment allows; in BEGIN its first byte is preceded by them. The pages
// hold 0xFF, which is NaN in every floating-point format; what of them is not the block's has to hold that still when
// it is freed.
//
// The space is reserved once, so that a pointer says itself whether it is one of ours, and so that a freed block costs
// no mapping: the number of these is limited (vm.max_map_count).

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

enum Placement { OFF, END, BEGIN };

// of torch's tensors on a CPU (c10's gAlignment)
constexpr size_t ALIGNMENT = 64;
const size_t PAGE = sysconf(_SC_PAGESIZE);
constexpr size_t SLOT = size_t(64) << 20, SLOTS = 1 << 14;
// what is larger is not filled: tests have tensors of which they touch little
constexpr size_t FILLED = size_t(256) << 20;

struct Block {
  char *user, *pages;
  size_t size, length;
};

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
int placement = OFF;
char* space;
// by the slot in which the pages begin; `taken` also for the slots that a large block goes on in
Block blocks[SLOTS];
bool taken[SLOTS];
size_t next_slot = 0;

[[noreturn]] void stop(const char* what, size_t size) {
  char text[160];
  int n = snprintf(text, sizeof text, "guarded memory: %s a block of %zu bytes\n", what, size);
  if (write(2, text, n) < 0) _exit(3);
  abort();
}

size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

// The first of `n` free slots in a row that have a free one on both sides, or 0.
size_t find_slots(size_t n) {
  size_t run = 0;
  for (size_t tries = 0; tries < 2 * SLOTS; ++tries, ++next_slot) {
    if (next_slot == SLOTS) next_slot = run = 0;
    run = taken[next_slot] ? 0 : run + 1;
    if (run == n + 2) return next_slot - n;
  }
  return 0;
}

bool untouched(const char* begin, const char* end) {
  for (; begin < end; ++begin)
    if (*begin != char(0xFF)) return false;
  return true;
}

const char* broken(const Block& block) {
  if (block.length > FILLED) return nullptr;
  if (!untouched(block.pages, block.user)) return "somebody wrote before";
  if (!untouched(block.user + block.size, block.pages + block.length)) return "somebody wrote behind";
  return nullptr;
}

void* make(size_t size) {
  size_t length = rounded(size ? size : 1, PAGE), slots = rounded(length, SLOT) / SLOT;
  size_t first = find_slots(slots);
  if (!first) stop("no space for", size);
  Block block;
  block.size = size;
  block.length = length;
  block.pages = space + first * SLOT + (placement == END ? slots * SLOT - length : 0);
  block.user = block.pages + (placement == END ? length - rounded(size, ALIGNMENT) : 0);
  if (mprotect(block.pages, length, PROT_READ | PROT_WRITE)) stop("cannot map", size);
  if (length <= FILLED) memset(block.pages, 0xFF, length);
  for (size_t i = 0; i < slots; ++i) taken[first + i] = true;
  blocks[first] = block;
  return block.user;
}

}  // namespace

extern "C" {

// Tensors that are made from now on: 0 as always, 1 END, 2 BEGIN.
void guarded_memory(int wanted) {
  pthread_mutex_lock(&lock);
  if (!space) {
    void* found = mmap(nullptr, SLOTS * SLOT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) stop("no address space for", SLOTS * SLOT);
    space = static_cast<char*>(found);
  }
  placement = wanted;
  pthread_mutex_unlock(&lock);
}

// How many blocks there are now, and what is wrong with one of them or nullptr.
size_t guarded_blocks(const char** wrong) {
  size_t found = 0;
  pthread_mutex_lock(&lock);
  *wrong = nullptr;
  for (const Block& block : blocks) {
    if (!block.pages) continue;
    ++found;
    if (const char* what = broken(block)) *wrong = what;
  }
  pthread_mutex_unlock(&lock);
  return found;
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  static auto original = reinterpret_cast<int (*)(void**, size_t, size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (placement == OFF || alignment != ALIGNMENT) return original(out, alignment, size);
  pthread_mutex_lock(&lock);
  *out = make(size);
  pthread_mutex_unlock(&lock);
  return 0;
}

void free(void* pointer) {
  static auto original = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "free"));
  char* at = static_cast<char*>(pointer);
  if (!space || at < space || at >= space + SLOTS * SLOT) return original(pointer);
  pthread_mutex_lock(&lock);
  size_t first = (at - space) / SLOT;
  // a large block's first byte is not in its first slot where it lies at the end of them
  while (first && !blocks[first].pages) --first;
  Block block = blocks[first];
  if (block.user != at) stop("freed is not the beginning of", block.size);
  if (const char* what = broken(block)) stop(what, block.size);
  blocks[first] = Block();
  for (size_t i = 0; i < rounded(block.length, SLOT) / SLOT; ++i) taken[first + i] = false;
  int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(block.pages, block.length, PROT_NONE, how, -1, 0) == MAP_FAILED) stop("cannot unmap", block.size);
  pthread_mutex_unlock(&lock);
}

}  // extern "C"
