// The product of vectors inside attention and linear layers: some rows times a panel of packed columns, sums in
// registers.
#pragma once

#include "cpu/simd.h"

namespace {

// With panels of two vectors ROWS * 2 sums, a panel and a broadcast fill the registers.
constexpr int ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int64_t PANEL = 2 * LANES;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A cell is what one lane multiplies at a time: one fp32 number, or two bf16 numbers side by side.
struct SingleCells {
  using Cell = float;
  using Weight = float;  // of attention
  static constexpr int64_t numbers = 1;
  static Floats add_product(Floats sum, Floats a, Floats b) { return sum + a * b; }

  template <class T>
  static void from_row(const T* row, int64_t n, float* cells) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(cells + i, load(row + i));
    if (i < n) store_part(cells + i, load_part(row + i, n - i), n - i);
  }
  template <class T>
  static Floats load_cells(const T* row, int64_t c) {
    return load(row + c);
  }
  // `rows` has one row
  template <class T>
  static void from_rows(const T* const* rows, int64_t n, float* cells) {
    from_row(rows[0], n, cells);
  }
};

#if defined(__AVX512BF16__)
struct PairCells {
  using Cell = uint32_t;
  using Weight = Bf16;
  static constexpr int64_t numbers = 2;
  static Floats add_product(Floats sum, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  // pairs of neighbours in a row
  static void from_row(const Bf16* row, int64_t n, uint32_t* cells) {
    memcpy(cells, row, n / 2 * 4);
    if (n % 2) cells[n / 2] = row[n - 1].bits;
  }
  static Floats load_cells(const Bf16* row, int64_t c) { return load_bits<Floats>(row + 2 * c); }
  // pairs of neighbours in a column; the second row may be missing
  static void from_rows(const Bf16* const* rows, int64_t n, uint32_t* cells) {
    static const Bf16 zeros[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
      const Halves low = load_bits<Halves>(rows[0] + i), high = load_bits<Halves>(rows[1] ? rows[1] + i : zeros);
      store_bits(cells + i, widen(low) | (widen(high) << 16));
    }
    for (; i < n; ++i) cells[i] = rows[0][i].bits | (rows[1] ? uint32_t{rows[1][i].bits} << 16 : 0);
  }
};
#endif

// c[R][VECTORS * LANES] = a[R][first ... last] b[first ... last][VECTORS * LANES], added to c where first > 0. AHEAD:
// how many cells of b are fetched before their turn, 0 for one that is in the cache.
template <class Cells, int R, int VECTORS, int64_t AHEAD = 0, class Cell = typename Cells::Cell>
inline void multiply(const Cell* a, int64_t a_row, const Cell* b, int64_t first, int64_t last, float* c,
                     int64_t c_row) {
  Floats sum[R][VECTORS] = {};
  for (int64_t k = first; k < last; ++k) {
    Floats panel[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      if (AHEAD) __builtin_prefetch(b + ((k + AHEAD) * VECTORS + v) * LANES);
      panel[v] = load_bits<Floats>(b + (k * VECTORS + v) * LANES);
    }
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i) {
      const Floats x = splat(load_bits<float>(a + i * a_row + k));
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = Cells::add_product(sum[i][v], x, panel[v]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* const to = c + i * c_row + v * LANES;
      store(to, first ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

// `multiply` of a panel of two vectors (wide) or one, for `rows` <= ROWS rows: a must have ROWS, or half where those
// are enough.
template <class Cells, class Cell = typename Cells::Cell>
inline void multiply_rows(const Cell* a, int64_t a_row, const Cell* b, int64_t first, int64_t last, float* c,
                          int64_t c_row, bool wide, int64_t rows) {
  constexpr int HALF = ROWS / 2;
  if (rows > HALF && wide) return multiply<Cells, ROWS, 2>(a, a_row, b, first, last, c, c_row);
  if (rows > HALF) return multiply<Cells, ROWS, 1>(a, a_row, b, first, last, c, c_row);
  if (wide) return multiply<Cells, HALF, 2>(a, a_row, b, first, last, c, c_row);
  multiply<Cells, HALF, 1>(a, a_row, b, first, last, c, c_row);
}

// Where column j of a packed matrix begins, and how far its rows are apart. Columns lie in panels of PANEL, the last of
// which has LANES where those are enough; `columns` is a multiple of LANES.
struct Column {
  int64_t start, step;
  Column(int64_t j, int64_t columns, int64_t depth) {
    const int64_t panel = j / PANEL * PANEL;
    step = columns - panel < PANEL ? LANES : PANEL;
    start = panel * depth + (j - panel);
  }
};

// Rows j ... j + LANES of a matrix -> these columns of a packed one. row_at(j) is where row j of n numbers begins, or
// null for a row of zeros; `row` is scratch for one row of cells.
template <class Cells, class RowAt, class Cell = typename Cells::Cell>
inline void pack_transposed(int64_t j, int64_t columns, int64_t n, const RowAt& row_at, Cell* packed, Cell* row) {
  const int64_t depth = (n + Cells::numbers - 1) / Cells::numbers, squares = n / Cells::numbers / LANES * LANES;
  const Column column(j, columns, depth);
  Cell* const to = packed + column.start;
  for (int64_t c = 0; c < squares; c += LANES) {
    Floats cells[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      const auto* from = row_at(j + i);
      cells[i] = from ? Cells::load_cells(from, c) : splat(0.0f);
    }
    transpose(cells);
    for (int64_t i = 0; i < LANES; ++i) store_bits(to + (c + i) * column.step, cells[i]);
  }
  if (squares == depth) return;
  for (int64_t i = 0; i < LANES; ++i) {
    const auto* from = row_at(j + i);
    if (from)
      Cells::from_row(from, n, row);
    else
      memset(row, 0, depth * 4);
    for (int64_t c = squares; c < depth; ++c) to[c * column.step + i] = row[c];
  }
}

}  // namespace
