// A packed weight [D, K] of vectors as `linear` and `mlp` run it, panel by panel, and what follows the product.
#pragma once

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/workspace.h"

namespace {

using vitfast::PackedWeight;
using vitfast::PackWeightArgs;

// How many cells are summed up in one chain: a panel of as many stays in the cache. In fp32 shorter ones make the
// result more exact, but each costs a pass over the sums: 96 cells would be twice as exact and 4 % slower.
template <class Cells>
constexpr int64_t WEIGHT_PIECE = Cells::numbers == 1 ? 192 : 512;

// Weights come from memory, which a model reads once a pass: a panel ends before the processor has seen that it is read
// in order.
constexpr int64_t WEIGHT_AHEAD = 128;

// One function for all of them: the choice is as good as free for some vectors, and compiling five kernels is not.
// T is what the result is stored as.
template <class T>
struct Activation {
  int act;
  template <int N>
  void operator()(Floats (&x)[N]) const {
    if (act == vitfast::NO_ACT) return;
    switch (static_cast<Act>(act)) {
      case Act::gelu: return activate_all<Act::gelu>(x);
      case Act::gelu_tanh: return activate_all<Act::gelu_tanh>(x);
      case Act::quick_gelu: return activate_all<Act::quick_gelu>(x);
      case Act::silu: return activate_all<Act::silu>(x);
    }
  }

 private:
  template <Act function, int N>
  static void activate_all(Floats (&x)[N]) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = activate<function, T>(x[i]);
  }
};

// Rows to add, from row `first` on; after the last the first follows.
template <class T>
struct Residual {
  const T* data;
  int64_t first, rows;
  int64_t row(int64_t i) const { return first + i < rows ? first + i : (first + i) % rows; }
};

// What follows a product: residual + act(sums + bias) -> y, rounded once.
template <class T>
struct Finish {
  T* y;
  int64_t y_row;  // from row to row of y and of the residual
  Residual<T> residual;
  Activation<T> activate;

  // sums with the bias in them, side by side from this column on; of y's row there are D
  template <int N>
  void operator()(int64_t row, int64_t column, Floats (&sums)[N], int64_t D) const {
    T* const to = y + row * y_row + column;
    const T* const added = residual.data ? residual.data + residual.row(row) * y_row + column : nullptr;
    activate(sums);
    const int64_t there = D - column;
    if (there >= N * LANES) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) store(to + i * LANES, added ? sums[i] + load(added + i * LANES) : sums[i]);
      return;
    }
    for (int64_t i = 0, c = 0; c < there; ++i, c += LANES) {
      const int64_t n = there - c < LANES ? there - c : LANES;
      store_part(to + c, added ? sums[i] + load_part(added + c, n) : sums[i], n);
    }
  }
};

// Functions of their own: among what surrounds a product, the compiler runs out of registers inside it.
template <class Cells, int R, int VECTORS, class Cell = typename Cells::Cell>
__attribute__((noinline)) void multiply_apart(const Cell* a, int64_t a_row, const Cell* b, int64_t depth, float* sums) {
  for (int64_t k = 0; k < depth; k += WEIGHT_PIECE<Cells>) {
    const int64_t end = depth - k < WEIGHT_PIECE<Cells> ? depth : k + WEIGHT_PIECE<Cells>;
    multiply<Cells, R, VECTORS, WEIGHT_AHEAD>(a, a_row, b, k, end, sums, PANEL);
  }
}

// Rows of a tile at most: with two vectors each, a panel and a broadcast fill the registers.
constexpr int TILE_HEIGHT = REGISTERS == 32 ? 14 : 6;

// sums[rows][VECTORS * LANES], PANEL apart, of 1 to R rows
template <class Cells, int VECTORS, int R = TILE_HEIGHT, class Cell = typename Cells::Cell>
inline void multiply_exactly(int64_t rows, const Cell* a, int64_t a_row, const Cell* b, int64_t depth, float* sums) {
  if (rows == R) return multiply_apart<Cells, R, VECTORS>(a, a_row, b, depth, sums);
  if constexpr (R > 1) multiply_exactly<Cells, VECTORS, R - 1>(rows, a, a_row, b, depth, sums);
}

template <class Cells, class T>
class PanelWeight {
  using Cell = typename Cells::Cell;
  static constexpr int64_t BLOCK = 96;

 public:
  using Number = T;
  static constexpr int64_t UNIT = 1;        // rows that blocks of rows are whole multiples of
  static constexpr int64_t LEAST_ROWS = 1;  // that must be there to be read
  static constexpr int64_t FEW_ROWS = 48;   // of a thread, below which columns are shared out in place of rows

  // rows of K numbers that share a reading of the weight, or a few more or less
  static int64_t block(int64_t) { return BLOCK; }
  // the same between the products of an MLP, where each has a hidden row too, in a cache of 1 MiB; 0 where too few fit
  static int64_t mlp_block(int64_t, int64_t hidden) {
    return BLOCK * hidden * int64_t(sizeof(T)) <= 640 << 10 ? BLOCK : 0;
  }
  // numbers in a row that must be there to be read
  static int64_t readable(int64_t K) { return K; }
  static int64_t sums(int64_t rows) { return rows * PANEL; }

  explicit PanelWeight(const PackedWeight& weight)
      : w(weight), depth(w.K / Cells::numbers), columns(round_up(w.D, LANES)), panels((columns + PANEL - 1) / PANEL) {}

  // x[rows][K] W^T in these panels; x_row is from row to row of x, sums is scratch. Finish by value: behind a reference
  // it would be read again after every store.
  void multiply(const T* x, int64_t x_row, int64_t rows, int64_t first, int64_t last, float* sums,
                const Finish<T> finish) const {
    const int64_t a_row = x_row / Cells::numbers;
    for (int64_t column = first * PANEL; column < last * PANEL && column < columns; column += PANEL) {
      const bool wide = columns - column >= PANEL;
      const Cell* const panel = (const Cell*)w.cells + column * depth;
      // alike, because one of a row or two waits for each of its sums
      const int64_t tiles = (rows + TILE_HEIGHT - 1) / TILE_HEIGHT;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
        const Cell* const a = (const Cell*)x + row * a_row;
        if (wide)
          multiply_exactly<Cells, 2>(height, a, a_row, panel, depth, sums + row * PANEL);
        else
          multiply_exactly<Cells, 1>(height, a, a_row, panel, depth, sums + row * PANEL);
      }
      for (int64_t c = column; c < column + PANEL && c < columns; c += LANES) {
        const Floats bias = w.bias ? load(w.bias + c) : Floats{};
        for (int64_t row = 0; row < rows; ++row) {
          Floats sum[] = {load(sums + row * PANEL + c - column) + bias};
          finish(row, c, sum, w.D);
        }
      }
    }
  }

  static int64_t packed_bytes(int64_t D, int64_t K) {
    return round_up(D, LANES) * (K / Cells::numbers) * int64_t(sizeof(Cell));
  }

  static void pack(const PackWeightArgs& a) {
    const int64_t columns = round_up(a.D, LANES), depth = a.K / Cells::numbers;
    const Workspaces row(1, depth * 4);
    const auto row_at = [&](int64_t j) { return j < a.D ? (const T*)a.weight + j * a.K : nullptr; };
    for (int64_t j = 0; j < columns; j += LANES)
      pack_transposed<Cells>(j, columns, a.K, row_at, (Cell*)a.packed, (Cell*)row.of(0));
  }

 private:
  const PackedWeight w;
  const int64_t depth, columns;  // cells in K numbers; D in whole vectors

 public:
  const int64_t panels;
};

}  // namespace
