// The two bodies of csrc/cpu/tiles.h bit for bit, and the thread's configuration before and after. Where the CPU has no
// AMX its instructions trap (amx_by_trap.h). An argument is how many products are tried.
#include <pmmintrin.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "amx_by_trap.h"
#include "random_layout.h"
#include "tile_configuration.h"
#include "tiles_body.h"

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

// Linux gives the child the configuration, but zeros as the tiles.
static void in_fork() {
  const int status = in_child([] { _exit(!multiplies_well()); });
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

int main(int argc, char** words) {
  const int64_t trials = argc > 1 ? std::atoll(words[1]) : 2000;
  if (!amx_by_trap::runs()) {
    std::puts("skipped: the CPU has neither AMX nor FMA");
    return 0;
  }
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
  REQUIRE(!amx_by_trap::configured_threads(), "tiles are left configured");
  std::puts("ok");
}
