// The tile registers of AMX: eight of 16 rows of 64 bytes each, and their product of pairs of bf16 summed in fp32. Two
// bodies: the instructions, and C++ that computes the same bits on any CPU (VITFAST_PLAIN_TILES), by which everything
// built on tiles is tested where no CPU has them. A row is 16 cells: fp32 sums, or pairs of bf16.
#pragma once

#include <cstdint>
#include <cstring>

// clang before 16 leaves out an underscore
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && !defined(VITFAST_PLAIN_TILES)
#define VITFAST_AMX
#endif
#if defined(VITFAST_AMX) || defined(VITFAST_PLAIN_TILES)
#define VITFAST_TILES

namespace {

constexpr int64_t TILE = 16;  // rows, and cells of a row
constexpr int64_t TILE_ROW_BYTES = 64, TILE_BYTES = TILE * TILE_ROW_BYTES;
constexpr int64_t TILE_NUMBERS = 32;  // of bf16 in a row

#if defined(VITFAST_AMX)

// Instructions written out: GCC's macros take no template parameter as the number of a tile, and GCC 12's declare too
// little memory as read, so that stores before a load, or the configuration itself, were optimised away.
class Tiles {
  // of LDTILECFG
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

 public:
  // The thread may be one of torch's, whose oneDNN has its own configuration there.
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before) : : "memory");
    Configuration all{.palette = 1};
    for (int tile = 0; tile < 8; ++tile) {
      all.row_bytes[tile] = TILE_ROW_BYTES;
      all.rows[tile] = TILE;
    }
    asm volatile("ldtilecfg %0" : : "m"(all) : "memory");
  }
  ~Tiles() {
    if (before.palette)
      asm volatile("ldtilecfg %0" : : "m"(before) : "memory");
    else
      asm volatile("tilerelease" : : : "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int tile>
  void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(tile) : "memory");
  }
  // sum[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1] over k
  template <int sum, int a, int b>
  void multiply() {
    static_assert(sum != a && sum != b && a != b, "the CPU faults");
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
  }

 private:
  Configuration before;
};

#else

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void zero() {
    memset(cells[tile], 0, TILE_BYTES);
  }
  template <int tile>
  void load(const void* from, int64_t row_bytes) {
    for (int64_t row = 0; row < TILE; ++row)
      memcpy(cells[tile][row], (const char*)from + row * row_bytes, TILE_ROW_BYTES);
  }
  template <int tile>
  void store(void* to, int64_t row_bytes) {
    for (int64_t row = 0; row < TILE; ++row) memcpy((char*)to + row * row_bytes, cells[tile][row], TILE_ROW_BYTES);
  }

  // In the order of the manual's TDPBF16PS: sums of the even and of the odd products apart, denormals read and written
  // as zeros whatever the thread's mode, which has to be rounding to nearest.
  template <int sum, int a, int b>
  void multiply() {
    static_assert(sum != a && sum != b && a != b, "the CPU faults");
    for (int64_t m = 0; m < TILE; ++m) {
      float even[TILE] = {}, odd[TILE] = {};
      for (int64_t k = 0; k < TILE; ++k) {
        const float first = low(cells[a][m][k]), second = high(cells[a][m][k]);
        for (int64_t n = 0; n < TILE; ++n) {
          even[n] = add_product(even[n], first, low(cells[b][k][n]));
          odd[n] = add_product(odd[n], second, high(cells[b][k][n]));
        }
      }
      for (int64_t n = 0; n < TILE; ++n) {
        float total;
        memcpy(&total, &cells[sum][m][n], 4);
        total = flushed(flushed(total) + flushed(even[n] + odd[n]));
        memcpy(&cells[sum][m][n], &total, 4);
      }
    }
  }

 private:
  static constexpr float SMALLEST = 0x1p-126f;  // normal number

  static float flushed(float x) { return __builtin_fabsf(x) < SMALLEST ? __builtin_copysignf(0, x) : x; }
  static float low(uint32_t cell) { return number(cell << 16); }
  static float high(uint32_t cell) { return number(cell & 0xffff0000); }
  static float number(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return flushed(x);
  }
  // Rounded once: the product of two bf16 numbers is exact in fp64, whose own rounding of the sum is too fine to
  // matter. What rounds up to the smallest normal number does not count as a denormal.
  static float add_product(float sum, float a, float b) {
    const double exact = (double)sum + (double)a * (double)b;
    return __builtin_fabs(exact) < 0x1p-126 - 0x1p-151 ? __builtin_copysignf(0, (float)exact) : (float)exact;
  }

  alignas(64) uint32_t cells[8][TILE][TILE];
};

#endif

}  // namespace

#endif
