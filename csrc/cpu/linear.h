// residual + act(norm(x) W^T + bias), and two of them in a row as an MLP. A block of rows stays in a thread's cache
// while panels of the weight pass by: what comes before the product is done to the block once, what follows it to its
// sums, and between the two products of an MLP nothing goes to memory, unless too few of its hidden rows fit into a
// cache.
#pragma once

#include "cpu/layer_norm.h"
#include "cpu/panel_weight.h"
#include "cpu/parallel.h"
#include "cpu/tile_weight.h"

namespace {

using vitfast::LinearArgs;
using vitfast::MlpArgs;

// How far rows of n numbers in a workspace are apart: an odd number of cache lines, because the rows of a tile are read
// side by side and powers of two would send all of them to the same few places of the cache.
template <class T>
inline int64_t row_in_workspace(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return (round_up(n, line) / line | 1) * line;
}

// Of the hidden rows of an MLP that are in memory at a time: with the rest in what a thread keeps, and in a shared
// cache.
constexpr int64_t HIDDEN_BYTES = 24 << 20;

inline int64_t blocks_of(int64_t rows, int64_t block, int threads) {
  return round_up((rows + block - 1) / block, threads);
}

// Few rows would leave threads idle, or with too few rows each to hide the reading of the weight: they share its
// columns.
template <class Weight>
inline bool few_rows(int64_t rows, int threads) {
  return rows < threads * Weight::FEW_ROWS;
}

// Rows in blocks of whole units.
struct Blocks {
  int64_t rows, unit, count;
  int64_t units() const { return (rows + unit - 1) / unit; }
  // the first row of a block
  int64_t start(int64_t block) const {
    const int64_t row = units() * block / count * unit;
    return row < rows ? row : rows;
  }
  int64_t most() const { return (units() + count - 1) / count * unit; }
};

// Rows of x as a product reads them: normed, or only copied to where they lie better, with zeros where it reads on.
template <class Weight, class T = typename Weight::Number>
class MovedRows {
 public:
  MovedRows(const LayerNormArgs& norm_args, bool normalises, int64_t K)
      : row(row_in_workspace<T>(K)), K(K), normalises(normalises), norm(norm_args) {}

  int64_t bytes(int64_t rows) const {
    return (rows < Weight::LEAST_ROWS ? Weight::LEAST_ROWS : rows) * row * int64_t(sizeof(T));
  }
  void move(const T* x, int64_t rows, T* to) const {
    for (int64_t i = 0; i < rows; ++i, x += K, to += row) {
      if (normalises)
        norm.run_row(x, to);
      else
        memcpy(to, x, K * sizeof(T));
      if (Weight::readable(K) > K) memset(to + K, 0, (Weight::readable(K) - K) * sizeof(T));
    }
  }

  const int64_t row;  // from row to row

 private:
  const int64_t K;
  const bool normalises;
  const LayerNorm<T> norm;
};

template <class Weight>
inline void linear_of(const LinearArgs& a) {
  using T = typename Weight::Number;
  const Weight weight(a.weight);
  if (!a.rows) return;
  const int64_t K = a.weight.K, D = a.weight.D, block = Weight::block(K);
  const bool few = few_rows<Weight>(a.rows, a.threads);
  const Blocks blocks{a.rows, Weight::UNIT, few ? (a.rows + block - 1) / block : blocks_of(a.rows, block, a.threads)};
  int64_t parts = few ? (4 * a.threads + blocks.count - 1) / blocks.count : 1;
  if (parts > weight.panels) parts = weight.panels;
  const MovedRows<Weight> moved(a.norm, a.normalises, K);
  const bool moves = a.normalises || K * sizeof(T) % 2048 == 0 || Weight::readable(K) > K;
  // once for all parts of the columns
  const bool shares = moves && parts > 1;
  const int64_t sums_bytes = Weight::sums(blocks.most()) * 4;
  const Workspaces shared(1, shares ? moved.bytes(a.rows) : 1);
  const Workspaces workspaces(a.threads,
                              sums_bytes + (shares ? 0 : moved.bytes(moves ? blocks.most() : Weight::LEAST_ROWS)));
  if (shares) {
    const Blocks chunks{a.rows, 1, 4 * a.threads};
    run_tasks(chunks.count, a.threads, [&](int64_t task, int) {
      const int64_t first = chunks.start(task);
      moved.move((const T*)a.x + first * K, chunks.start(task + 1) - first, (T*)shared.of(0) + first * moved.row);
    });
  }
  run_tasks(blocks.count * parts, a.threads, [&](int64_t task, int thread) {
    const int64_t part = task % parts, first = blocks.start(task / parts);
    const int64_t rows = blocks.start(task / parts + 1) - first;
    if (!rows) return;
    const T* x = (const T*)a.x + first * K;
    int64_t x_row = K;
    if (shares) {
      x = (const T*)shared.of(0) + first * moved.row;
      x_row = moved.row;
    } else if (moves || rows < Weight::LEAST_ROWS) {
      T* const copy = (T*)(workspaces.of(thread) + whole_lines(sums_bytes));
      moved.move(x, rows, copy);
      x = copy;
      x_row = moved.row;
    }
    weight.multiply(x, x_row, rows, weight.panels * part / parts, weight.panels * (part + 1) / parts,
                    (float*)workspaces.of(thread),
                    Finish<T>{.y = (T*)a.out + first * D,
                              .y_row = D,
                              .residual = {(const T*)a.residual, first, a.residual_rows},
                              .activate = {a.act}});
  });
}

// One product after the other, with the hidden rows between them in memory.
template <class Weight>
inline void mlp_in_turn(const MlpArgs& a) {
  using T = typename Weight::Number;
  const int64_t K = a.fc1.K, hidden = a.fc1.D, row_bytes = hidden * int64_t(sizeof(T));
  const Blocks chunks{a.rows, Weight::UNIT, (a.rows * row_bytes + HIDDEN_BYTES - 1) / HIDDEN_BYTES};
  const Workspaces memory(1, (chunks.most() < a.rows ? chunks.most() : a.rows) * row_bytes);
  void* const h = memory.of(0);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t first = chunks.start(chunk), rows = chunks.start(chunk + 1) - first;
    const T* const x = (const T*)a.x + first * K;
    linear_of<Weight>({.x = x,
                       .norm = a.norm,
                       .normalises = true,
                       .weight = a.fc1,
                       .out = h,
                       .rows = rows,
                       .dtype = a.dtype,
                       .act = a.act,
                       .threads = a.threads});
    linear_of<Weight>({.x = h,
                       .weight = a.fc2,
                       .residual = x,
                       .residual_rows = rows,
                       .out = (T*)a.out + first * K,
                       .rows = rows,
                       .dtype = a.dtype,
                       .threads = a.threads});
  }
}

template <class Weight>
inline void mlp_of(const MlpArgs& a) {
  using T = typename Weight::Number;
  const Weight fc1(a.fc1), fc2(a.fc2);
  if (!a.rows) return;
  const int64_t K = a.fc1.K, hidden = a.fc1.D;
  const MovedRows<Weight> normed_rows(a.norm, true, K), hidden_rows(a.norm, false, hidden);
  const int64_t most_rows = Weight::mlp_block(normed_rows.row, hidden_rows.row);
  if (!most_rows || few_rows<Weight>(a.rows, a.threads)) return mlp_in_turn<Weight>(a);
  const Blocks blocks{a.rows, Weight::UNIT, blocks_of(a.rows, most_rows, a.threads)};
  const int64_t most = blocks.most(), normed_bytes = normed_rows.bytes(most), hidden_bytes = hidden_rows.bytes(most);
  const Workspaces workspaces(a.threads, normed_bytes + hidden_bytes + Weight::sums(most) * 4);
  run_tasks(blocks.count, a.threads, [&](int64_t block, int thread) {
    const int64_t first = blocks.start(block), rows = blocks.start(block + 1) - first;
    if (!rows) return;
    const T* const x = (const T*)a.x + first * K;
    char* const memory = workspaces.of(thread);
    T* const normed = (T*)memory;
    T* const h = (T*)(memory + normed_bytes);
    float* const sums = (float*)(memory + normed_bytes + hidden_bytes);
    normed_rows.move(x, rows, normed);
    for (int64_t row = 0; Weight::readable(hidden) > hidden && row < rows; ++row)
      memset(h + row * hidden_rows.row + hidden, 0, (Weight::readable(hidden) - hidden) * sizeof(T));
    fc1.multiply(normed, normed_rows.row, rows, 0, fc1.panels, sums,
                 Finish<T>{.y = h, .y_row = hidden_rows.row, .residual = {}, .activate = {a.act}});
    fc2.multiply(
        h, hidden_rows.row, rows, 0, fc2.panels, sums,
        Finish<T>{.y = (T*)a.out + first * K, .y_row = K, .residual = {x, 0, rows}, .activate = {vitfast::NO_ACT}});
  });
}

// The packed weights of a dtype, for what is to be done with them.
template <class Do>
inline auto with_weight_of(DType dtype, const Do& run) {
#if defined(VITFAST_TILES)
  if (dtype == DType::bf16) return run.template operator()<TileWeight>();
#elif defined(__AVX512BF16__)
  if (dtype == DType::bf16) return run.template operator()<PanelWeight<PairCells, Bf16>>();
#endif
  return run.template operator()<PanelWeight<SingleCells, float>>();
}

inline void linear(const LinearArgs& args) {
  with_weight_of(args.dtype, [&]<class Weight>() { linear_of<Weight>(args); });
}

inline void mlp(const MlpArgs& args) {
  with_weight_of(args.dtype, [&]<class Weight>() { mlp_of<Weight>(args); });
}

inline void pack_weight(const PackWeightArgs& args) {
  with_weight_of(args.dtype, [&]<class Weight>() { Weight::pack(args); });
}

inline int64_t packed_bytes(int64_t D, int64_t K, DType dtype) {
  return with_weight_of(dtype, [&]<class Weight>() { return Weight::packed_bytes(D, K); });
}

// which dtypes `linear` and `mlp` take in this instruction set
inline bool multiplies(DType dtype) {
#if defined(VITFAST_TILES) || defined(__AVX512BF16__)
  if (dtype == DType::bf16) return true;
#endif
  return dtype == DType::fp32;
}

}  // namespace
