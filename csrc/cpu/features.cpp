#include "cpu/features.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#endif

namespace vitfast {

#if defined(__x86_64__) && defined(__linux__)
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned value, int n) { return (value >> n) & 1u; }

// Register files that the system saves on a context switch; a CPU's instructions are unusable without theirs.
uint64_t saved_state() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Palette 1 of tiles: at least eight of 16 rows of 64 bytes.
bool has_whole_tiles() {
  if (cpuid(0, 0).eax < 0x1d || cpuid(0x1d, 0).eax < 1) return false;
  const Registers palette = cpuid(0x1d, 1);
  return palette.ebx >> 16 >= 8 && (palette.ebx & 0xffff) >= 64 && (palette.ecx & 0xffff) >= 16;
}

// Linux hands out AMX tiles on request only (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); to a process, for all
// of its threads. 0, or the error's number.
int ask_for_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 0 : errno; }

}  // namespace

std::string why_no_tiles() {
  if (!bit(cpuid(7, 0).edx, 24)) return "";
  if (!has_whole_tiles()) return "tiles are smaller than 16 rows of 64 bytes";
  if ((saved_state() & 0x60000) != 0x60000) return "the system does not save tiles";
  const int error = ask_for_tiles();
  if (!error) return "";
  const std::string refused = std::string("the system refuses them: ") + strerror(error);
  return error == ENOSPC ? refused + " on an alternate signal stack" : refused;
}

std::map<std::string, bool> cpu_features() {
  const Registers leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  const uint64_t state = saved_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  const bool tiles = why_no_tiles().empty() && bit(leaf7.edx, 24);
  const bool avx2 = ymm && bit(leaf7.ebx, 5) && bit(cpuid(1, 0).ecx, 12) && bit(cpuid(1, 0).ecx, 29);  // FMA, F16C
  const bool avx512 =
      avx2 && zmm && bit(leaf7.ebx, 16) && bit(leaf7.ebx, 30) && bit(leaf7.ebx, 31) && bit(leaf7.ebx, 17);
  return {
      {"avx2", avx2},
      {"avx512", avx512},
      {"avx512_vnni", avx512 && bit(leaf7.ecx, 11)},
      {"avx512_bf16", avx512 && bit(leaf7_1.eax, 5)},
      {"amx_bf16", tiles && bit(leaf7.edx, 22)},
      {"amx_int8", tiles && bit(leaf7.edx, 25)},
  };
}
#else
std::map<std::string, bool> cpu_features() { return {}; }
std::string why_no_tiles() { return ""; }
#endif

}  // namespace vitfast
