// residual + act(norm(x) W^T + bias), and two of them in a row as an MLP. A block of rows stays in a thread's cache
// while panels of the weight pass by: what comes before the product is done to the block once, what follows it to its
// sums, and between the two products of an MLP nothing goes to memory.
#pragma once

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"

namespace {

using vitfast::LinearArgs;
using vitfast::MlpArgs;
using vitfast::PackedWeight;
using vitfast::PackWeightArgs;

constexpr int64_t BLOCK = 96;                // rows, or a few more or less
constexpr int64_t HIDDEN_BYTES = 600 << 10;  // of a block between the products of an MLP, for a cache of 1 MiB
// How many cells are summed up in one chain: a panel of as many stays in the cache. In fp32 shorter ones make the
// result more exact, but each costs a pass over the sums: 96 cells would be twice as exact and 4 % slower.
template <class Cells>
constexpr int64_t WEIGHT_PIECE = Cells::numbers == 1 ? 192 : 512;

// One function for all of them: the choice is as good as free for a vector, and compiling five kernels is not.
// T is what the result is stored as.
template <class T>
struct Activation {
  int act;
  Floats operator()(Floats x) const {
    if (act == vitfast::NO_ACT) return x;
    switch (static_cast<Act>(act)) {
      case Act::gelu: return activate<Act::gelu, T>(x);
      case Act::gelu_tanh: return activate<Act::gelu_tanh, T>(x);
      case Act::quick_gelu: return activate<Act::quick_gelu, T>(x);
      case Act::silu: return activate<Act::silu, T>(x);
    }
    return x;
  }
};

// Functions of their own: among what surrounds a product, the compiler runs out of registers inside it.
template <class Cells, int R, int VECTORS, class Cell = typename Cells::Cell>
__attribute__((noinline)) void multiply_apart(const Cell* a, int64_t a_row, const Cell* b, int64_t depth, float* sums) {
  for (int64_t k = 0; k < depth; k += WEIGHT_PIECE<Cells>) {
    const int64_t end = depth - k < WEIGHT_PIECE<Cells> ? depth : k + WEIGHT_PIECE<Cells>;
    multiply<Cells, R, VECTORS>(a, a_row, b, k, end, sums, PANEL);
  }
}

// sums[rows][VECTORS * LANES], PANEL apart, of exactly `rows` < 2 R: tiles of R rows, of half as many, ...
template <class Cells, int R, int VECTORS, class Cell = typename Cells::Cell>
inline void multiply_exactly(int64_t rows, const Cell* a, int64_t a_row, const Cell* b, int64_t depth, float* sums) {
  if (rows >= R) {
    multiply_apart<Cells, R, VECTORS>(a, a_row, b, depth, sums);
    rows -= R, a += R * a_row, sums += R * PANEL;
  }
  if constexpr (R > 1) {
    if (rows) multiply_exactly<Cells, R == 3 ? 2 : R / 2, VECTORS>(rows, a, a_row, b, depth, sums);
  }
}

// Rows to add, from row `first` on; after the last the first follows.
template <class T>
struct Residual {
  const T* data;
  int64_t first, rows;
  int64_t row(int64_t i) const { return first + i < rows ? first + i : (first + i) % rows; }
};

template <class Cells, class T>
class Weight {
  using Cell = typename Cells::Cell;

 public:
  explicit Weight(const PackedWeight& weight)
      : w(weight), depth(w.K / Cells::numbers), columns(round_up(w.D, LANES)), panels((columns + PANEL - 1) / PANEL) {}

  // then(row, column, sums plus bias) for each vector of x[rows][K] W^T + bias in these panels; x_row is from row to
  // row of x, sums is scratch [rows][PANEL]
  template <class Then>
  void multiply(const T* x, int64_t x_row, int64_t rows, int64_t first, int64_t last, float* sums,
                const Then& then) const {
    const int64_t a_row = x_row / Cells::numbers;
    for (int64_t column = first * PANEL; column < last * PANEL && column < columns; column += PANEL) {
      const bool wide = columns - column >= PANEL;
      const Cell* const panel = (const Cell*)w.cells + column * depth;
      for (int64_t row = 0; row < rows; row += ROWS) {
        const Cell* const a = (const Cell*)x + row * a_row;
        const int64_t rows_left = rows - row < ROWS ? rows - row : ROWS;
        if (wide)
          multiply_exactly<Cells, ROWS, 2>(rows_left, a, a_row, panel, depth, sums + row * PANEL);
        else
          multiply_exactly<Cells, ROWS, 1>(rows_left, a, a_row, panel, depth, sums + row * PANEL);
      }
      for (int64_t c = column; c < column + PANEL && c < columns; c += LANES) {
        const Floats bias = w.bias ? load(w.bias + c) : Floats{};
        for (int64_t row = 0; row < rows; ++row) then(row, c, load(sums + row * PANEL + c - column) + bias);
      }
    }
  }

  // residual + act(x W^T + bias) -> y, where residual and y have y_row from row to row
  void multiply(const T* x, int64_t x_row, int64_t rows, int64_t first, int64_t last, float* sums,
                const Residual<T>& residual, T* y, int64_t y_row, const Activation<T>& activate) const {
    multiply(x, x_row, rows, first, last, sums, [=, this](int64_t row, int64_t column, Floats sum) {
      T* const to = y + row * y_row + column;
      const int64_t n = w.D - column;
      const T* const added = residual.data ? residual.row(row) * y_row + column + residual.data : nullptr;
      sum = activate(sum);
      if (n >= LANES) return store(to, added ? sum + load(added) : sum);
      store_part(to, added ? sum + load_part(added, n) : sum, n);
    });
  }

  const PackedWeight w;
  const int64_t depth, columns, panels;  // cells in K numbers; D in whole vectors; and in panels
};

// How far rows of n numbers in a workspace are apart: an odd number of cache lines, because the rows of a tile are read
// side by side and powers of two would send all of them to the same few places of the cache.
template <class T>
inline int64_t row_in_workspace(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return (round_up(n, line) / line | 1) * line;
}

inline int64_t blocks_of(int64_t rows, int64_t block, int threads) {
  return round_up((rows + block - 1) / block, threads);
}

// Few rows would leave threads idle, or with too few rows each to hide the reading of the weight: they share its
// columns.
inline bool few_rows(int64_t rows, int threads) { return rows < threads * BLOCK / 2; }

// the first row of a block
inline int64_t start_of(int64_t block, int64_t blocks, int64_t rows) { return rows * block / blocks; }

template <class Cells, class T>
inline void linear_of(const LinearArgs& a, const Activation<T>& activate) {
  const Weight<Cells, T> weight(a.weight);
  const LayerNorm<T> norm(a.norm);
  if (!a.rows) return;
  const int64_t K = a.weight.K, D = a.weight.D;
  const bool few = few_rows(a.rows, a.threads);
  const int64_t blocks = few ? (a.rows + BLOCK - 1) / BLOCK : blocks_of(a.rows, BLOCK, a.threads);
  int64_t parts = few ? (4 * a.threads + blocks - 1) / blocks : 1;
  if (parts > weight.panels) parts = weight.panels;
  const int64_t most = (a.rows + blocks - 1) / blocks;
  const bool copies = a.normalises || K * sizeof(T) % 2048 == 0;
  const int64_t x_row = copies ? row_in_workspace<T>(K) : K, copy_bytes = copies ? most * x_row * sizeof(T) : 0;
  const Workspaces workspaces(a.threads, copy_bytes + most * PANEL * 4);
  run_tasks(blocks * parts, a.threads, [&](int64_t task, int thread) {
    const int64_t part = task % parts, first = start_of(task / parts, blocks, a.rows);
    const int64_t rows = start_of(task / parts + 1, blocks, a.rows) - first;
    const T* x = (const T*)a.x + first * K;
    if (copies) {
      T* const copy = (T*)workspaces.of(thread);
      for (int64_t row = 0; row < rows; ++row) {
        if (a.normalises)
          norm.run_row(x + row * K, copy + row * x_row);
        else
          memcpy(copy + row * x_row, x + row * K, K * sizeof(T));
      }
      x = copy;
    }
    const Residual<T> residual{(const T*)a.residual, first, a.residual_rows};
    weight.multiply(x, x_row, rows, weight.panels * part / parts, weight.panels * (part + 1) / parts,
                    (float*)(workspaces.of(thread) + copy_bytes), residual, (T*)a.out + first * D, D, activate);
  });
}

template <class Cells, class T>
inline void mlp_of(const MlpArgs& a, const Activation<T>& activate) {
  const Weight<Cells, T> fc1(a.fc1), fc2(a.fc2);
  const LayerNorm<T> norm(a.norm);
  if (!a.rows) return;
  const int64_t K = a.fc1.K, hidden = a.fc1.D;
  if (few_rows(a.rows, a.threads)) {
    const Workspaces memory(1, a.rows * hidden * sizeof(T));
    void* const h = memory.of(0);
    linear_of<Cells, T>({.x = a.x,
                         .norm = a.norm,
                         .normalises = true,
                         .weight = a.fc1,
                         .out = h,
                         .rows = a.rows,
                         .dtype = a.dtype,
                         .act = a.act,
                         .threads = a.threads},
                        activate);
    linear_of<Cells, T>({.x = h,
                         .weight = a.fc2,
                         .residual = a.x,
                         .residual_rows = a.rows,
                         .out = a.out,
                         .rows = a.rows,
                         .dtype = a.dtype,
                         .threads = a.threads},
                        Activation<T>{vitfast::NO_ACT});
    return;
  }
  const int64_t normed_row = row_in_workspace<T>(K), hidden_row = row_in_workspace<T>(hidden);
  int64_t block = HIDDEN_BYTES / (hidden_row * sizeof(T)) / ROWS * ROWS;
  block = block > BLOCK ? BLOCK : block < 2 * ROWS ? 2 * ROWS : block;
  const int64_t blocks = blocks_of(a.rows, block, a.threads), most = (a.rows + blocks - 1) / blocks;
  const int64_t normed_bytes = most * normed_row * sizeof(T), hidden_bytes = most * hidden_row * sizeof(T);
  const Workspaces workspaces(a.threads, normed_bytes + hidden_bytes + most * PANEL * 4);
  run_tasks(blocks, a.threads, [&](int64_t block, int thread) {
    const int64_t first = start_of(block, blocks, a.rows), rows = start_of(block + 1, blocks, a.rows) - first;
    const T* const x = (const T*)a.x + first * K;
    char* const memory = workspaces.of(thread);
    T* const normed = (T*)memory;
    T* const h = (T*)(memory + normed_bytes);
    float* const sums = (float*)(memory + normed_bytes + hidden_bytes);
    for (int64_t row = 0; row < rows; ++row) norm.run_row(x + row * K, normed + row * normed_row);
    fc1.multiply(normed, normed_row, rows, 0, fc1.panels, sums, {}, h, hidden_row, activate);
    fc2.multiply(h, hidden_row, rows, 0, fc2.panels, sums, {x, 0, rows}, (T*)a.out + first * K, K,
                 Activation<T>{vitfast::NO_ACT});
  });
}

inline void linear(const LinearArgs& args) {
  if (args.dtype == DType::fp32) return linear_of<SingleCells, float>(args, Activation<float>{args.act});
#if defined(__AVX512BF16__)
  linear_of<PairCells, Bf16>(args, Activation<Bf16>{args.act});
#endif
}

inline void mlp(const MlpArgs& args) {
  if (args.dtype == DType::fp32) return mlp_of<SingleCells, float>(args, Activation<float>{args.act});
#if defined(__AVX512BF16__)
  mlp_of<PairCells, Bf16>(args, Activation<Bf16>{args.act});
#endif
}

template <class Cells, class T, class Cell = typename Cells::Cell>
inline void pack_weight_in(const PackWeightArgs& a) {
  const int64_t columns = round_up(a.D, LANES), depth = a.K / Cells::numbers;
  const Workspaces row(1, depth * 4);
  const auto row_at = [&](int64_t j) { return j < a.D ? (const T*)a.weight + j * a.K : nullptr; };
  for (int64_t j = 0; j < columns; j += LANES)
    pack_transposed<Cells>(j, columns, a.K, row_at, (Cell*)a.packed, (Cell*)row.of(0));
}

inline void pack_weight(const PackWeightArgs& args) {
  if (args.dtype == DType::fp32) return pack_weight_in<SingleCells, float>(args);
#if defined(__AVX512BF16__)
  pack_weight_in<PairCells, Bf16>(args);
#endif
}

// which dtypes `linear` and `mlp` take in this instruction set
inline bool multiplies(DType dtype) {
#if defined(__AVX512BF16__)
  if (dtype == DType::bf16) return true;
#endif
  return dtype == DType::fp32;
}

}  // namespace
