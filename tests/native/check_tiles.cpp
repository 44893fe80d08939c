// The two bodies of csrc/cpu/tiles.h bit for bit, and the thread's configuration before and after. Where the CPU has no
// AMX its instructions trap (amx_by_trap.h), and the trap itself is checked. An argument is how many products are
// tried.
#include <fcntl.h>
#include <pmmintrin.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "amx_by_trap.h"
#include "random_layout.h"
#include "tiles_body.h"

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
  bool operator==(const Configuration& other) const { return !std::memcmp(this, &other, sizeof other); }
};

static void configure(const Configuration& c) { asm volatile("ldtilecfg %0" : : "m"(c) : "memory"); }
static void release() { asm volatile("tilerelease" : : : "memory"); }
static Configuration configuration() {
  Configuration c;
  asm volatile("sttilecfg %0" : "=m"(c) : : "memory");
  return c;
}
static Configuration shapes(int rows, int row_bytes) {
  Configuration c{.palette = 1};
  for (int tile = 0; tile < 8; ++tile) {
    c.rows[tile] = rows;
    c.row_bytes[tile] = row_bytes;
  }
  return c;
}
// tiles of different shapes, as for a product's tails
static Configuration of_others() {
  Configuration c{.palette = 1};
  for (int tile = 0; tile < 7; ++tile) {
    c.rows[tile] = 16 - tile;
    c.row_bytes[tile] = 64 - 8 * tile;
  }
  return c;
}

static uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
static float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// a number of this exponent; of its fraction's `width` bits the lowest, the highest or random ones are set
static uint32_t with_exponent(int64_t exponent, int width) {
  const int64_t kind = draw(0, 3), all = (int64_t{1} << width) - 1;
  const int64_t fraction = kind == 0 ? 0 : kind == 1 ? 1 : kind == 2 ? all : draw(0, all);
  return uint32_t(draw(0, 1)) << 31 | uint32_t(std::max<int64_t>(exponent + 127, 0)) << 23 | fraction << (23 - width);
}
static uint32_t special() {
  const uint32_t which[] = {0, 0x7f800000, 0x7fc00000, 0x00010000, 0x007f0000, 0x00800000, 0x7f7f0000, 0x3f800000};
  return which[draw(0, 7)] | uint32_t(draw(0, 1)) << 31;
}

enum Kind { ordinary, tiny_products, edge, denormal, zeros_of_either_sign, any_exponent, specials, any_bits, KINDS };

struct Product {
  uint16_t a[16][32], b[16][32];
  uint32_t sums[16][16];  // fp32, of which any bits count

  static uint16_t half(uint32_t bits) { return bits >> 16; }

  Product(Kind kind) {
    std::memset(this, 0, sizeof *this);
    std::normal_distribution<float> normal;
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 32; ++j) {
        uint16_t &x = a[i][j], &y = b[j / 2][2 * i + j % 2];
        switch (kind) {
          case ordinary:
            x = half(bits_of(normal(generator)));
            y = half(bits_of(normal(generator)));
            break;
          case tiny_products:
            x = half(with_exponent(draw(-66, -60), 7));
            y = half(with_exponent(draw(-66, -60), 7));
            break;
          case edge:
            // a sum just above the smallest normal number, then products of half of a last place more or less
            if (j < 4) {
              x = half(with_exponent(j < 2 ? -63 : -75, 7));
              y = half(with_exponent(j < 2 ? draw(-64, -63) : draw(-77, -74), 7));
            }
            break;
          case denormal:
            x = half(draw(0, 1) ? with_exponent(-127, 7) : with_exponent(draw(-126, -120), 7));
            y = half(draw(0, 1) ? with_exponent(draw(-126, 127), 7) : with_exponent(-127, 7));
            break;
          case zeros_of_either_sign:
            // nothing comes after that would make a zero positive
            if (j >= 30) {
              x = half(with_exponent(-63, 7));
              y = half(with_exponent(draw(-67, -61), 7));
            }
            break;
          case any_exponent:
            x = half(with_exponent(draw(-127, 127), 7));
            y = half(with_exponent(draw(-127, 127), 7));
            break;
          case specials:
            x = half(draw(0, 9) ? bits_of(normal(generator)) : special());
            y = half(draw(0, 9) ? bits_of(normal(generator)) : special());
            break;
          default: x = draw(0, 0xffff); y = draw(0, 0xffff);
        }
      }
    for (auto& row : sums)
      for (uint32_t& sum : row) {
        switch (kind) {
          case ordinary: sum = bits_of(normal(generator)); break;
          case tiny_products:
          case edge: sum = draw(0, 3) ? with_exponent(draw(-127, -125), 23) : special(); break;
          case zeros_of_either_sign:
          case denormal: sum = draw(0, 1) ? with_exponent(-127, 23) : with_exponent(draw(-126, -124), 23); break;
          case any_exponent: sum = with_exponent(draw(-127, 127), 23); break;
          case specials: sum = draw(0, 3) ? bits_of(normal(generator)) : special(); break;
          default: sum = uint32_t(draw(0, 0xffffffff));
        }
      }
  }
};

static bool same(uint32_t x, uint32_t y) { return x == y || (std::isnan(number(x)) && std::isnan(number(y))); }

static void check_products(int64_t trials) {
  int64_t denormals = 0, zeros = 0, infinite = 0;
  for (int64_t trial = 0; trial < trials; ++trial) {
    const Kind kind = Kind(trial % KINDS);
    const Product p(kind);
    const int product = draw(0, PRODUCTS - 1);
    const Operands o = operands(product);
    uint32_t out[2][16][16];
    // the mode that torch.set_flush_denormal sets is the thread's, not the tiles'
    _MM_SET_FLUSH_ZERO_MODE(trial & 16 ? _MM_FLUSH_ZERO_ON : _MM_FLUSH_ZERO_OFF);
    _MM_SET_DENORMALS_ZERO_MODE(trial & 16 ? _MM_DENORMALS_ZERO_ON : _MM_DENORMALS_ZERO_OFF);
    for (const bool plain : {false, true}) {
      const Step steps[] = {
          {.what = Step::load, .tile = o.sum, .memory = (void*)p.sums, .row_bytes = 64},
          {.what = Step::load, .tile = o.a, .memory = (void*)p.a, .row_bytes = 64},
          {.what = Step::load, .tile = o.b, .memory = (void*)p.b, .row_bytes = 64},
          {.what = Step::multiply, .tile = product},
          {.what = Step::store, .tile = o.sum, .memory = out[plain], .row_bytes = 64},
      };
      (plain ? plain_body : real_body).run(steps, 5);
    }
    _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_OFF);
    _MM_SET_DENORMALS_ZERO_MODE(_MM_DENORMALS_ZERO_OFF);
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        const uint32_t got = out[1][m][n], expected = out[0][m][n];
        REQUIRE(same(got, expected), "trial %ld, kind %d, at %d, %d: plain %08x, real %08x", (long)trial, kind, m, n,
                got, expected);
        const float x = number(expected);
        denormals += std::fpclassify(x) == FP_SUBNORMAL;
        zeros += x == 0;
        infinite += std::isinf(x);
      }
  }
  REQUIRE(!denormals, "%ld denormals", (long)denormals);
  REQUIRE(zeros > trials && infinite > trials, "%ld zeros, %ld infinite: too few to see a difference", (long)zeros,
          (long)infinite);
}

// Tiles that come and go in any order, from and to rows any number of bytes apart, also back to front and overlapping.
static void check_steps(int64_t trials) {
  constexpr int64_t SIZE = 34000, MOST = 1000;
  for (int64_t trial = 0; trial < trials; ++trial) {
    std::vector<uint8_t> from(SIZE), to[2];
    for (uint8_t& byte : from) byte = draw(0x30, 0x4f);  // of finite numbers, wherever they begin
    to[0].resize(SIZE);
    to[1].resize(SIZE);
    std::vector<Step> steps;
    std::vector<int64_t> places;
    bool sums[8] = {};  // multiplied as if they were pairs they might be NaN, of which any is right
    for (int i = 0; i < 60; ++i) {
      Step s{.what = i < 8 ? Step::load : Step::What(draw(0, 3)), .tile = int(i < 8 ? i : draw(0, 7))};
      s.row_bytes = draw(0, 4) ? draw(-MOST, MOST) : 0;
      if (s.what == Step::multiply) {
        s.tile = draw(0, PRODUCTS - 1);
        const Operands o = operands(s.tile);
        if (sums[o.a] || sums[o.b]) continue;
        sums[o.sum] = true;
      } else if (s.what != Step::store) {
        sums[s.tile] = false;
      }
      places.push_back(draw(15 * MOST, SIZE - 64 - 15 * MOST));
      steps.push_back(s);
    }
    for (const bool plain : {false, true}) {
      for (size_t i = 0; i < steps.size(); ++i)
        steps[i].memory = (steps[i].what == Step::store ? to[plain] : from).data() + places[i];
      (plain ? plain_body : real_body).run(steps.data(), steps.size());
    }
    for (int64_t i = 0; i < SIZE; ++i)
      REQUIRE(to[0][i] == to[1][i], "steps %ld: byte %ld differs", (long)trial, (long)i);
  }
}

// The same with all in one function.
static void check_optimised() {
  for (int trial = 0; trial < 50; ++trial) {
    const Product p(ordinary);
    float out[2][256];
    real_body.product(p.a[0], p.b[0], out[0]);
    plain_body.product(p.a[0], p.b[0], out[1]);
    REQUIRE(!std::memcmp(out[0], out[1], sizeof out[0]), "product %d differs", trial);
    for (int i = 0; i < 256; ++i) {
      double sum = 0;
      for (int k = 0; k < 32; ++k)
        sum += double(number(p.a[i / 16][k] << 16)) * number(p.b[k / 2][2 * (i % 16) + k % 2] << 16);
      REQUIRE(std::abs(out[0][i] - sum) < 1e-4, "product %d: %g at %d, expected %g", trial, out[0][i], i, sum);
    }
  }
}

static Configuration seen;
static void look() { seen = configuration(); }
static void fail() { throw std::runtime_error("with tiles alive"); }
static void nest() {
  const Step inner{.what = Step::call, .function = look};
  real_body.run(&inner, 1);
  REQUIRE(configuration() == shapes(16, 64), "the outer tiles' configuration is not there again");
}

static void check_configuration() {
  for (const Configuration& before : {Configuration{}, of_others(), shapes(16, 64)}) {
    if (before.palette)
      configure(before);
    else
      release();
    const int64_t threads = amx_by_trap::configured_threads();
    for (void (*const function)() : {look, nest, fail}) {
      const Step step{.what = Step::call, .function = function};
      seen = {};
      bool failed = false;
      try {
        real_body.run(&step, 1);
      } catch (const std::runtime_error&) {
        failed = true;
      }
      REQUIRE(failed == (function == fail), "the exception did not come out");
      REQUIRE(function == fail || seen == shapes(16, 64), "the tiles are not configured as 16 rows of 64 bytes");
      REQUIRE(configuration() == before, "palette %d of before is not there again", before.palette);
      REQUIRE(threads == amx_by_trap::configured_threads(), "another number of threads is configured");
    }
  }
  release();
}

static bool multiplies_well() {
  const Product p(ordinary);
  float out[2][256];
  real_body.product(p.a[0], p.b[0], out[0]);
  plain_body.product(p.a[0], p.b[0], out[1]);
  return !std::memcmp(out[0], out[1], sizeof out[0]);
}

static void check_threads() {
  const int64_t before = amx_by_trap::configured_threads();
  std::vector<std::thread> threads;
  std::vector<Product> products(4, Product(ordinary));
  for (Product& p : products) p = Product(ordinary);
  for (const Product& p : products)
    threads.emplace_back([&p] {
      for (int i = 0; i < 100; ++i) {
        float out[2][256];
        real_body.product(p.a[0], p.b[0], out[0]);
        plain_body.product(p.a[0], p.b[0], out[1]);
        REQUIRE(!std::memcmp(out[0], out[1], sizeof out[0]), "another thread's numbers");
        REQUIRE(configuration() == Configuration{}, "a thread is left configured");
      }
    });
  for (std::thread& thread : threads) thread.join();
  REQUIRE(amx_by_trap::configured_threads() == before, "a thread has ended with its tiles configured");
}

// A child's exit status; below 0 the signal that ended it. What it says on stderr goes to `said`.
template <class F>
static int in_child(F&& function, std::string* said = nullptr) {
  int ends[2];
  REQUIRE(!pipe(ends), "no pipe");
  const pid_t child = fork();
  if (!child) {
    dup2(ends[1], 2);
    function();
    _exit(0);
  }
  close(ends[1]);
  char buffer[4096];
  for (ssize_t got; (got = ::read(ends[0], buffer, sizeof buffer)) > 0;)
    if (said) said->append(buffer, got);
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// Linux gives the child the configuration, and tiles of zeros.
static void in_fork() {
  const int status = in_child([] {
    if (!multiplies_well()) _exit(1);
    if (!(configuration() == shapes(16, 64))) _exit(2);
  });
  REQUIRE(status == 0, "a child of fork with tiles alive: %d", status);
}
static void check_fork() {
  const Product p(ordinary);
  uint32_t out[16][16];
  const Step steps[] = {
      {.what = Step::load, .tile = 1, .memory = (void*)p.sums, .row_bytes = 64},
      {.what = Step::call, .function = in_fork},
      {.what = Step::store, .tile = 1, .memory = out, .row_bytes = 64},
  };
  real_body.run(steps, 3);
  REQUIRE(!std::memcmp(p.sums, out, sizeof out), "the parent's tile is another one after fork");
  REQUIRE(in_child([] { _exit(!multiplies_well()); }) == 0, "a child of fork does not multiply");
  REQUIRE(multiplies_well(), "the parent does not multiply after fork");
}

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
  const Product p(ordinary);
  float out[16][16];
  std::memset(out, 0xff, sizeof out);
  configure(c);
  asm volatile(
      "tilezero %%tmm0\n tileloadd (%0,%2,1), %%tmm1\n tileloadd (%1,%2,1), %%tmm2\n"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n tilestored %%tmm0, (%3,%2,1)\n tilerelease"
      :
      : "r"(p.a), "r"(p.b), "r"(int64_t{64}), "r"(out)
      : "memory");
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      if (m >= rows || n >= columns) {
        REQUIRE(bits_of(out[m][n]) == 0xffffffff, "%d, %d was written", m, n);
        continue;
      }
      double sum = 0;
      for (int k = 0; k < 2 * pairs; ++k)
        sum += double(number(p.a[m][k] << 16)) * number(p.b[k / 2][2 * n + k % 2] << 16);
      REQUIRE(std::abs(out[m][n] - sum) < 1e-5, "%d, %d: %g, expected %g", m, n, out[m][n], sum);
    }
}

// What the CPU refuses the trap refuses, and says why.
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
  refused("not configured", [] { asm volatile("tileloadd (%0,%0,1), %%tmm1" : : "r"(&seen)); });
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
    asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x00" : : "a"(&seen));  // tileloadd tmm0, [rax]
  });
  refused("VEX.vvvv", [] { asm volatile(".byte 0xc4, 0xe2, 0x70, 0x49, 0x00" : : "a"(&seen)); });
  const int status = in_child([] { __builtin_trap(); });
  REQUIRE(status == -SIGILL, "an unknown instruction ends with %d", status);
}

int main(int argc, char** words) {
  const int64_t trials = argc > 1 ? std::atoll(words[1]) : 2000;
  if (!amx_by_trap::runs()) {
    std::puts("skipped: the CPU has neither AMX nor FMA");
    return 0;
  }
  check_addresses();
  check_shapes();
  const int64_t before = amx_by_trap::count(amx_by_trap::tdpbf16ps);
  check_products(trials);
  if (amx_by_trap::is_used()) {
    const int64_t done = amx_by_trap::count(amx_by_trap::tdpbf16ps) - before;
    REQUIRE(done == trials, "%ld products on tiles instead of %ld", (long)done, (long)trials);
  }
  check_steps(trials / 20);
  check_optimised();
  check_configuration();
  check_threads();
  check_fork();
  if (amx_by_trap::is_used()) {
    check_faults();
    REQUIRE(!amx_by_trap::configured_threads(), "tiles are left configured");
  }
  std::puts("ok");
}
