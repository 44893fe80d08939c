// amx_by_trap.cpp itself: the addresses that it decodes, tiles of other shapes than tiles.h has, and what it refuses.
// All but the last runs on a CPU with AMX just as well.
#include "amx_by_trap.h"

#include <sys/mman.h>

#include "tile_configuration.h"

// Every form of an address, an absolute one too, so in memory below 2 GiB.
static thread_local Configuration of_thread;
static void check_addresses() {
  void* const wanted = (void*)0x20000000;
  auto* const memory =
      (uint8_t*)mmap(wanted, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  REQUIRE(memory == wanted, "no memory below 2 GiB");
  for (int i = 0; i < 65536; ++i) memory[i] = uint8_t(draw(0, 255));
  uint8_t* const at = memory + 0x8000;
  configure(shapes(16, 64));
  uint8_t out[16][64];
  const auto is = [&](const uint8_t* base, int64_t stride, const char* form) {
    for (int row = 0; row < 16; ++row)
      REQUIRE(!std::memcmp(out[row], base + row * stride, 64), "%s: row %d", form, row);
    std::memset(out, 0, sizeof out);
  };
// the operands in these registers, a tile loaded from there and stored to `out`
#define LOADED(instruction, base, base_value, index, index_value, from, stride)                                    \
  asm volatile("mov %0, %%" base "\n mov %1, %%" index "\n " instruction ", %%tmm3\n tilestored %%tmm3, (%2,%3,1)" \
               :                                                                                                   \
               : "r"(base_value), "r"(int64_t{index_value}), "r"(out), "r"(int64_t{64})                            \
               : base, index, "memory");                                                                           \
  is(from, stride, instruction);
  LOADED("tileloadd (%%rax,%%rbx,1)", "rax", at, "rbx", 100, at, 100)
  LOADED("tileloadd (%%r8,%%rsi,2)", "r8", at, "rsi", 100, at, 200)
  LOADED("tileloadd 17(%%rdi,%%r9,4)", "rdi", at, "r9", 100, at + 17, 400)
  LOADED("tileloadd -5(%%r15,%%r14,8)", "r15", at, "r14", 100, at - 5, 800)
  LOADED("tileloadd 0(%%r13,%%r12,1)", "r13", at, "r12", 100, at, 100)
  LOADED("tileloadd (%%r12,%%r13,1)", "r12", at, "r13", -100, at, -100)
  LOADED("tileloadd 4000(%%rcx,%%rdx,1)", "rcx", at, "rdx", 0, at + 4000, 0)
  LOADED("tileloadd -4000(%%r10,%%r11,1)", "r10", at, "r11", 64, at - 4000, 64)
  LOADED("tileloadd 0x20008030(,%%r11,1)", "r10", at, "r11", 100, at + 0x30, 100)
  LOADED("tileloadd 0x20008030(,%%rbx,4)", "r10", at, "rbx", 100, at + 0x30, 400)
  LOADED("tileloadd (%%rax)", "rax", at, "rbx", 100, at, 0)
  LOADED("tileloadd 300(%%r13)", "r13", at, "r12", 100, at + 300, 0)
  LOADED("tileloaddt1 (%%rax,%%rbx,1)", "rax", at, "rbx", 100, at, 100)
  asm volatile("xchg %%rsp, %%rcx\n tileloadd (%%rsp,%0,1), %%tmm3\n xchg %%rsp, %%rcx\n tilestored %%tmm3, (%1,%0,1)"
               :
               : "r"(int64_t{64}), "r"(out), "c"(at)
               : "memory");
  is(at, 64, "tileloadd (%rsp,...)");
  static const Configuration fixed = of_others();
  asm volatile("ldtilecfg %0" : : "m"(fixed));
  REQUIRE(configuration() == fixed, "ldtilecfg from a fixed place");
  of_thread = shapes(3, 8);
  asm volatile("ldtilecfg %0" : : "m"(of_thread));
  REQUIRE(configuration() == of_thread, "ldtilecfg from a thread's variable");
  std::memcpy(at + 64, &fixed, 64);
  asm volatile("ldtilecfg 0x20008040");
  REQUIRE(configuration() == fixed, "ldtilecfg from an absolute one");
  asm volatile("sttilecfg 1024(%0)" : : "r"(at) : "memory");
  REQUIRE(!std::memcmp(at + 1024, &fixed, 64), "sttilecfg to a displacement");
  asm volatile("sttilecfg (%0,%1,8)" : : "r"(at), "r"(int64_t{300}) : "memory");
  REQUIRE(!std::memcmp(at + 2400, &fixed, 64), "sttilecfg to base and index");
  release();
  munmap(memory, 65536);
#undef LOADED
}

// Tiles smaller than 16 x 64: what is beyond a shape stays zero.
static void check_shapes() {
  Configuration c{.palette = 1};
  const int rows = 5, columns = 7, pairs = 3;
  c.rows[0] = rows, c.row_bytes[0] = 4 * columns;
  c.rows[1] = rows, c.row_bytes[1] = 4 * pairs;
  c.rows[2] = pairs, c.row_bytes[2] = 4 * columns;
  uint16_t a[16][32], b[16][32];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 32; ++j) {
      a[i][j] = bits_of(draw(-99, 99)) >> 16;
      b[i][j] = bits_of(draw(-99, 99)) >> 16;
    }
  float out[16][16];
  std::memset(out, 0xff, sizeof out);
  configure(c);
  asm volatile(
      "tilezero %%tmm0\n tileloadd (%0,%2,1), %%tmm1\n tileloadd (%1,%2,1), %%tmm2\n"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n tilestored %%tmm0, (%3,%2,1)\n tilerelease"
      :
      : "r"(a), "r"(b), "r"(int64_t{64}), "r"(out)
      : "memory");
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      if (m >= rows || n >= columns) {
        REQUIRE(bits_of(out[m][n]) == 0xffffffff, "%d, %d was written", m, n);
        continue;
      }
      double sum = 0;
      for (int k = 0; k < 2 * pairs; ++k) sum += double(number(a[m][k] << 16)) * number(b[k / 2][2 * n + k % 2] << 16);
      REQUIRE(out[m][n] == sum, "%d, %d: %g, expected %g", m, n, out[m][n], sum);
    }
}

// What the CPU refuses the trap refuses, and says why.
static uint8_t elsewhere[64];
static void check_faults() {
  const auto refused = [](const char* reason, void (*function)()) {
    std::string said;
    const int status = in_child(function, &said);
    REQUIRE(status == -SIGABRT && said.find(reason) != std::string::npos, "'%s': ended with %d and '%s'", reason,
            status, said.c_str());
  };
  release();
  refused("not configured", [] { asm volatile("tilezero %tmm0"); });
  refused("not configured", [] {
    configure(shapes(16, 64));
    release();
    asm volatile("tilezero %tmm0");
  });
  refused("not configured", [] { asm volatile("tileloadd (%0,%0,1), %%tmm1" : : "r"(&elsewhere)); });
  refused("not configured", [] { asm volatile("tdpbf16ps %tmm1, %tmm2, %tmm3"); });
  refused("tile has no shape", [] {
    configure(of_others());
    asm volatile("tilezero %tmm7");
  });
  refused("palette", [] { configure({.palette = 2}); });
  refused("reserved", [] { configure({.palette = 1, .reserved = {0, 1}}); });
  refused("above the eighth", [] { configure({.palette = 1, .row_bytes = {0, 0, 0, 0, 0, 0, 0, 0, 4}}); });
  refused("more than 16 rows", [] { configure(shapes(17, 64)); });
  refused("more than 64 bytes", [] { configure(shapes(16, 65)); });
  refused("rows without bytes", [] { configure(shapes(16, 0)); });
  refused("multiple of 4", [] {
    configure(shapes(16, 63));
    asm volatile("tdpbf16ps %tmm1, %tmm2, %tmm3");
  });
  refused("same tile", [] {
    configure(shapes(16, 64));
    asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xd9");  // tdpbf16ps tmm1, tmm1, tmm3
  });
  refused("rows of the sum", [] {
    configure(of_others());
    asm volatile("tdpbf16ps %tmm1, %tmm2, %tmm3");
  });
  refused("rows of the second", [] {
    configure(shapes(8, 64));
    asm volatile("tdpbf16ps %tmm1, %tmm2, %tmm3");
  });
  refused("columns of the sum", [] {
    Configuration c = shapes(16, 64);
    c.row_bytes[3] = 32;
    configure(c);
    asm volatile("tdpbf16ps %tmm1, %tmm2, %tmm3");
  });
  refused("without SIB", [] {
    configure(shapes(16, 64));
    asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x00" : : "a"(&elsewhere));  // tileloadd tmm0, [rax]
  });
  refused("VEX.vvvv", [] { asm volatile(".byte 0xc4, 0xe2, 0x70, 0x49, 0x00" : : "a"(&elsewhere)); });
  const int status = in_child([] { __builtin_trap(); });
  REQUIRE(status == -SIGILL, "an unknown instruction ends with %d", status);
}

int main() {
  if (!amx_by_trap::runs()) {
    std::puts("skipped: the CPU has neither AMX nor FMA");
    return 0;
  }
  check_addresses();
  check_shapes();
  if (amx_by_trap::is_used()) {
    check_faults();
    REQUIRE(!amx_by_trap::configured_threads(), "tiles are left configured");
  }
  std::puts("ok");
}
