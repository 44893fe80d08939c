// cpu_features() on CPUs and systems that are not this one: what cpuid and xgetbv say is made up, and a filter of
// system calls gives or refuses the permission for tiles.
#include <cpuid.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "random_layout.h"

static unsigned made_up[2][4];                           // registers of leaf 7, subleaves 0 and 1
static unsigned most_leaves, tiles, bytes_of_row, rows;  // of palette 1
static uint64_t register_files;

static int made_up_cpuid(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *d = 0;
  *c = 1u << 27 | 1u << 12 | 1u << 29;  // OSXSAVE, FMA, F16C
  if (leaf == 0) *a = most_leaves;
  if (leaf == 0x1d && subleaf == 0) *a = 1;
  if (leaf == 0x1d && subleaf == 1) *b = tiles << 16 | bytes_of_row, *c = rows;
  if (leaf != 7) return 1;
  *a = made_up[subleaf][0], *b = made_up[subleaf][1], *c = made_up[subleaf][2], *d = made_up[subleaf][3];
  return 1;
}

#define __get_cpuid_count made_up_cpuid
#define __asm__(...) low = uint32_t(register_files), high = uint32_t(register_files >> 32)
#include "cpu/features.cpp"
#undef __asm__

enum class Answer { yes, no, of_this_system };

// what the system says to the request for tiles' registers
static void answer(Answer wanted) {
  if (wanted == Answer::of_this_system) return;
  const unsigned code = wanted == Answer::yes ? 0 : EPERM;
  sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 5),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[0])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x1023, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[1])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 18, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | code),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{.len = sizeof rules / sizeof rules[0], .filter = rules};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
    std::puts("skipped: no filter of system calls");
    std::fflush(stdout);
    _exit(77);
  }
}

// Whether amx_bf16 is found, in a process of its own: nothing takes a filter or a permission back.
static bool has_tiles(Answer wanted) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (!child) {
    answer(wanted);
    std::map<std::string, bool> found = vitfast::cpu_features();
    const bool told = !vitfast::why_no_tiles().empty();
    _exit(found["amx_bf16"] * 1 + found["amx_int8"] * 2 + found["avx512_bf16"] * 4 + told * 8);
  }
  int status;
  waitpid(child, &status, 0);
  REQUIRE(WIFEXITED(status), "a child ended by signal %d", WTERMSIG(status));
  if (WEXITSTATUS(status) == 77) std::exit(0);
  REQUIRE(WEXITSTATUS(status) & 4, "AVX-512 with bf16 was not found, which needs no permission");
  REQUIRE(!(WEXITSTATUS(status) & 1) == !(WEXITSTATUS(status) & 2), "permission for one of bf16 and int8 only");
  // the CPU's own lack of them is no reason
  const bool lacks = !(WEXITSTATUS(status) & 1) && made_up[0][3] & 1u << 24;
  REQUIRE(lacks == bool(WEXITSTATUS(status) & 8), "tiles there: %d, a reason given: %d", !lacks, lacks);
  return WEXITSTATUS(status) & 1;
}

int main() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;
  constexpr uint64_t VECTORS = 0xe7, TILES = 0x60000;
  const auto xeon = [] {  // of the fourth generation
    made_up[0][1] = 1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    made_up[0][3] = AMX_BF16 | AMX_TILE | AMX_INT8;
    made_up[1][0] = 1u << 5;
    register_files = VECTORS | TILES;
    most_leaves = 0x20, tiles = 8, bytes_of_row = 64, rows = 16;
  };
  xeon();
  REQUIRE(has_tiles(Answer::yes), "no tiles with permission");
  REQUIRE(!has_tiles(Answer::no), "tiles without permission");
  const bool here = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  REQUIRE(has_tiles(Answer::of_this_system) == here, "tiles here: %d expected", here);
  for (const uint64_t some : {VECTORS, VECTORS | 0x20000, VECTORS | 0x40000}) {
    register_files = some;
    REQUIRE(!has_tiles(Answer::yes), "tiles that the system does not save: XCR0 %lx", (long)some);
  }
  xeon();
  made_up[0][3] = 0;
  REQUIRE(!has_tiles(Answer::yes), "tiles that a hypervisor hides");
  made_up[0][3] = AMX_BF16 | AMX_INT8;
  REQUIRE(!has_tiles(Answer::yes), "products without tiles");
  xeon();
  for (unsigned* const size : {&most_leaves, &tiles, &bytes_of_row, &rows}) {
    const unsigned before = *size;
    *size = before / 2;
    REQUIRE(!has_tiles(Answer::yes), "tiles smaller than those that are used: %u instead of %u", before / 2, before);
    *size = before;
  }
  std::puts("ok");
}
