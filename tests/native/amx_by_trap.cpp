// Semantics and faults after Intel's Software Developer's Manual, volume 2, and its AMX exception classes. Sums are
// made by the CPU's own FMA with denormals as zeros and flush to zero, as the manual describes TDPBF16PS: no code in
// common with csrc/cpu/tiles.h. Each fault of the manual ends the program with a line that says which.
#include "amx_by_trap.h"

#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_by_trap {
namespace {

constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;

// as LDTILECFG reads it
struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

struct State {
  Configuration shapes;  // all zeros: not configured
  alignas(64) uint8_t data[TILES][ROWS][ROW_BYTES];
};
// a handler may not wait for memory of a library's thread-local variables
[[gnu::tls_model("initial-exec")]] thread_local State state;

bool used = false, on_cpu = false;
std::atomic<int64_t> counts[INSTRUCTIONS], configured;

[[noreturn]] void fault(const char* kind, const char* reason) {
  char line[200];
  const int length = snprintf(line, sizeof line, "AMX by trap: %s: %s\n", kind, reason);
  if (write(2, line, length) != length) _exit(1);
  abort();
}
void undefined_if(bool bad, const char* reason) {
  if (bad) fault("#UD", reason);
}
void protected_if(bool bad, const char* reason) {
  if (bad) fault("#GP", reason);
}

// What an instruction of the VEX encoding says, and its memory operand.
struct Decoded {
  int64_t length;
  int opcode, prefix, W, L, vvvv;  // prefix: 0 none, 1 of 66, 2 of F3, 3 of F2
  int mod, reg, rm;                // reg and rm with the bits of VEX
  bool sib;
  uint64_t base, index;  // base with the displacement and the segment; index shifted
  uint64_t address() const { return base + index; }
};

const int PLACES[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                        REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

uint64_t segment_base(int segment) {
  uint64_t base = 0;
  syscall(SYS_arch_prctl, segment == 0x64 ? 0x1003 : 0x1004, &base);  // ARCH_GET_FS, ARCH_GET_GS
  return base;
}

template <class T>
T read(const uint8_t* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

// Whether the instruction at `start` is one of VEX map 2.
bool decode(const uint8_t* start, const greg_t* registers, Decoded& d) {
  const uint8_t* at = start;
  int segment = 0;
  bool narrow = false;
  for (;; ++at) {
    if (*at == 0x64 || *at == 0x65)
      segment = *at;
    else if (*at == 0x67)
      narrow = true;
    else if (*at != 0x2e && *at != 0x36 && *at != 0x3e && *at != 0x26)  // segments without meaning in 64 bits
      break;
  }
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return false;
  const int R = !(at[1] & 0x80) * 8, X = !(at[1] & 0x40) * 8, B = !(at[1] & 0x20) * 8;
  d.W = at[2] >> 7;
  d.vvvv = ~(at[2] >> 3) & 15;
  d.L = (at[2] >> 2) & 1;
  d.prefix = at[2] & 3;
  d.opcode = at[3];
  d.mod = at[4] >> 6;
  d.reg = ((at[4] >> 3) & 7) + R;
  const int rm = at[4] & 7;
  d.rm = rm + B;
  d.sib = false;
  d.base = d.index = 0;
  at += 5;
  if (d.mod != 3) {
    const auto value = [&](int number) { return (uint64_t)registers[PLACES[number]]; };
    bool relative = false, far = d.mod == 2;
    if (rm == 4) {
      d.sib = true;
      const int sib = *at++, index = ((sib >> 3) & 7) + X, base = sib & 7;
      if (index != 4) d.index = value(index) << (sib >> 6);
      if (base == 5 && d.mod == 0)
        far = true;
      else
        d.base = value(base + B);
    } else if (rm == 5 && d.mod == 0) {
      relative = far = true;
    } else {
      d.base = value(d.rm);
    }
    if (far) {
      d.base += (int64_t)read<int32_t>(at);
      at += 4;
    } else if (d.mod == 1) {
      d.base += (int64_t)read<int8_t>(at++);
    }
    if (relative) d.base += (uint64_t)at;
    // of 32 bits: what compilers never write for tiles
    undefined_if(narrow, "addresses of 32 bits are not decoded");
    if (segment) d.base += segment_base(segment);
  }
  d.length = at - start;
  return true;
}

int rows_of(int tile) { return state.shapes.rows[tile]; }
int bytes_of(int tile) { return state.shapes.row_bytes[tile]; }

void load_configuration(const uint8_t* from) {
  const Configuration wanted = read<Configuration>(from);
  protected_if(wanted.palette > 1, "palette that the CPU does not have");
  if (wanted.palette) {
    // the manual lets a program go on in the middle of a tile; nothing here has a use for that
    protected_if(wanted.start_row, "configuration with a row to start at");
    for (const uint8_t byte : wanted.reserved) protected_if(byte, "reserved bytes of the configuration are set");
    for (int tile = 0; tile < 16; ++tile) {
      const int rows = wanted.rows[tile], bytes = wanted.row_bytes[tile];
      protected_if(tile >= TILES && (rows || bytes), "shape of a tile above the eighth");
      protected_if(rows > ROWS, "more than 16 rows");
      protected_if(bytes > ROW_BYTES, "more than 64 bytes in a row");
      protected_if(!rows != !bytes, "rows without bytes or bytes without rows");
    }
  }
  configured += (wanted.palette != 0) - (state.shapes.palette != 0);
  state.shapes = wanted.palette ? wanted : Configuration{};
  memset(state.data, 0, sizeof state.data);
}

void release() {
  configured -= state.shapes.palette != 0;
  state.shapes = {};
  memset(state.data, 0, sizeof state.data);
}

void must_be_configured(int tile) {
  undefined_if(!state.shapes.palette, "tiles are not configured");
  undefined_if(tile >= TILES, "tile above the eighth");
  undefined_if(!rows_of(tile), "tile has no shape in this configuration");
}

void load(int tile, const Decoded& d) {
  memset(state.data[tile], 0, sizeof state.data[tile]);
  for (int row = 0; row < rows_of(tile); ++row)
    memcpy(state.data[tile][row], (const uint8_t*)(d.base + row * d.index), bytes_of(tile));
}
void store(int tile, const Decoded& d) {
  for (int row = 0; row < rows_of(tile); ++row)
    memcpy((uint8_t*)(d.base + row * d.index), state.data[tile][row], bytes_of(tile));
}

// apart from where MXCSR is set: the compiler knows nothing of what that changes
[[gnu::noinline, gnu::target("avx2,fma")]] void multiply_row(uint8_t* sums, const uint8_t* a, int steps,
                                                             const uint8_t (*b)[ROW_BYTES]) {
  const __m256i upper = _mm256_set1_epi32(0xffff0000);
  for (int half = 0; half < ROW_BYTES; half += 32) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    for (int k = 0; k < steps; ++k) {
      const __m256i pair = _mm256_set1_epi32(read<int32_t>(a + 4 * k));
      const __m256i pairs = _mm256_loadu_si256((const __m256i*)(b[k] + half));
      even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)),
                             _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), even);
      odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, upper)),
                            _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)), odd);
    }
    const __m256 sum = _mm256_loadu_ps((const float*)(sums + half));
    _mm256_storeu_ps((float*)(sums + half), _mm256_add_ps(sum, _mm256_add_ps(even, odd)));
  }
}

void multiply(int sum, int a, int b) {
  undefined_if(sum == a || a == b || sum == b, "two operands are the same tile");
  for (const int tile : {sum, a, b}) {
    must_be_configured(tile);
    undefined_if(bytes_of(tile) % 4, "row that is no multiple of 4 bytes");
  }
  undefined_if(rows_of(sum) != rows_of(a), "rows of the sum and of the first operand differ");
  undefined_if(bytes_of(a) / 4 != rows_of(b), "pairs in a row of the first operand and rows of the second differ");
  undefined_if(bytes_of(sum) != bytes_of(b), "columns of the sum and of the second operand differ");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // flush to zero, denormals are zeros, to nearest, no exceptions
  for (int row = 0; row < rows_of(sum); ++row) {
    multiply_row(state.data[sum][row], state.data[a][row], bytes_of(a) / 4, state.data[b]);
    memset(state.data[sum][row] + bytes_of(sum), 0, ROW_BYTES - bytes_of(sum));
  }
  _mm_setcsr(before);
}

bool carry_out(const Decoded& d) {
  const bool memory = d.mod != 3;
  Instruction done = INSTRUCTIONS;
  if (d.opcode == 0x49 && memory && d.reg % 8 == 0 && d.prefix < 2)
    done = d.prefix ? sttilecfg : ldtilecfg;
  else if (d.opcode == 0x49 && !memory && d.prefix == 0 && d.reg == 0 && d.rm == 0)
    done = tilerelease;
  else if (d.opcode == 0x49 && !memory && d.prefix == 3 && d.rm == 0)
    done = tilezero;
  else if (d.opcode == 0x4b && memory && d.prefix)
    done = d.prefix == 2 ? tilestored : tileload;
  else if (d.opcode == 0x5c && !memory && d.prefix == 2)
    done = tdpbf16ps;
  if (done == INSTRUCTIONS) return false;
  undefined_if(d.W || d.L, "VEX.W or VEX.L is set");
  undefined_if(done != tdpbf16ps && d.vvvv, "VEX.vvvv names a register");
  switch (done) {
    case ldtilecfg: load_configuration((const uint8_t*)d.address()); break;
    case sttilecfg: memcpy((void*)d.address(), &state.shapes, sizeof state.shapes); break;
    case tilerelease: release(); break;
    case tilezero:
      must_be_configured(d.reg);
      memset(state.data[d.reg], 0, sizeof state.data[d.reg]);
      break;
    case tileload:
    case tilestored:
      undefined_if(!d.sib, "address of a tile without SIB");
      must_be_configured(d.reg);
      done == tileload ? load(d.reg, d) : store(d.reg, d);
      break;
    default: multiply(d.reg, d.rm, d.vvvv);
  }
  ++counts[done];
  return true;
}

void handle(int, siginfo_t*, void* context) {
  greg_t* const registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  Decoded d;
  if (decode((const uint8_t*)registers[REG_RIP], registers, d) && carry_out(d)) {
    registers[REG_RIP] += d.length;
    return;
  }
  signal(SIGILL, SIG_DFL);  // the next attempt ends the program as it would without us
}

// What Linux does not give to the child: the data of tiles, unlike their configuration.
void in_child() {
  configured = state.shapes.palette != 0;
  memset(state.data, 0, sizeof state.data);
}

bool cpu_has_amx() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  // AMX-BF16 and AMX-TILE; ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (edx >> 22 & 1) && (edx >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

[[gnu::constructor]] void begin() {
  on_cpu = cpu_has_amx();
  used = !on_cpu && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!used) return;
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  pthread_atfork(nullptr, nullptr, in_child);
}

// AMX_BY_TRAP=released: no thread's tiles may be left configured; used: and tiles must have been multiplied.
[[gnu::destructor]] void end() {
  const char* const wish = getenv("AMX_BY_TRAP");
  if (!used || !wish) return;
  if (configured) fault("end", "tiles of a thread are still configured");
  if (!strcmp(wish, "used") && !counts[tdpbf16ps]) fault("end", "no tiles were multiplied");
}

}  // namespace

bool is_used() { return used; }
bool runs() { return used || on_cpu; }
int64_t count(Instruction instruction) { return counts[instruction]; }
int64_t configured_threads() { return configured; }

}  // namespace amx_by_trap
