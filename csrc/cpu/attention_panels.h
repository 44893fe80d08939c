// Attention's two products of a head on vectors: how their operands lie, and how they are multiplied.
#pragma once

#include "cpu/kernels.h"
#include "cpu/panels.h"

namespace {

using vitfast::AttentionArgs;

// How many cells of a query and a key, or of weights and values, are summed up in one chain: in fp32 few, for
// exactness, but chains of 16 in place of 64 would take a tenth longer; bf16 rounds more elsewhere.
template <class Cells>
constexpr int64_t PIECE = Cells::numbers == 1 ? 64 : 512;

// c[rows][columns] = a[rows][depth] b, where b is packed in panels; columns is a multiple of LANES
template <class Cells, class Cell = typename Cells::Cell>
inline void multiply_panels(const Cell* a, int64_t a_row, const Cell* b, int64_t depth, float* c, int64_t columns,
                            int64_t rows) {
  for (int64_t j = 0; j < columns; j += PANEL) {
    for (int64_t k = 0; k < depth; k += PIECE<Cells>) {
      const int64_t end = depth - k < PIECE<Cells> ? depth : k + PIECE<Cells>;
      multiply_rows<Cells>(a, a_row, b + j * depth, k, end, c + j, columns, columns - j >= PANEL, rows);
    }
  }
}

// Sizes are of cells, 4 bytes each.
template <class Cells, class T>
class PanelProducts {
  using Cell = typename Cells::Cell;

 public:
  using Number = T;
  using Weight = typename Cells::Weight;
  struct Registers {};                      // no others than every function has
  static constexpr int64_t QUERIES = ROWS;  // at a time

  explicit PanelProducts(const AttentionArgs& args)
      : logits_row(round_up(args.Nk, LANES)),
        out_row(round_up(args.D, LANES)),
        D(args.D),
        depth((D + Cells::numbers - 1) / Cells::numbers),
        key_depth((args.Nk + Cells::numbers - 1) / Cells::numbers) {}

  int64_t keys_size() const { return logits_row * depth; }
  int64_t values_size() const { return out_row * key_depth; }
  int64_t queries_size() const { return ROWS * depth; }
  int64_t scratch_size() const { return depth + out_row; }

  template <class RowAt>
  void pack_keys(const RowAt& key_at, float* packed, float* scratch) const {
    for (int64_t j = 0; j < logits_row; j += LANES)
      pack_transposed<Cells>(j, logits_row, D, key_at, (Cell*)packed, (Cell*)scratch);
  }

  template <class RowAt>
  void pack_values(const RowAt& value_at, float* packed, float* scratch) const {
    Cell* const row = (Cell*)scratch;
    memset(row, 0, out_row * 4);
    for (int64_t c = 0; c < key_depth; ++c) {
      const T* rows[Cells::numbers];
      for (int64_t i = 0; i < Cells::numbers; ++i) rows[i] = value_at(c * Cells::numbers + i);
      Cells::from_rows(rows, D, row);
      for (int64_t d = 0; d < out_row; d += LANES) {
        const Column column(d, out_row, key_depth);
        memcpy((Cell*)packed + column.start + c * column.step, row + d, LANES * 4);
      }
    }
  }

  template <class RowAt>
  void pack_queries(const RowAt& query_at, int64_t rows, float* packed) const {
    memset(packed, 0, queries_size() * 4);
    for (int64_t r = 0; r < rows; ++r) Cells::from_row(query_at(r), D, (Cell*)packed + r * depth);
  }

  void multiply_keys(Registers&, const float* queries, const float* keys, float* logits, int64_t rows) const {
    multiply_panels<Cells>((const Cell*)queries, depth, (const Cell*)keys, depth, logits, logits_row, rows);
  }

  void multiply_values(Registers&, const Weight* weights, const float* values, float* out, int64_t rows) const {
    multiply_panels<Cells>((const Cell*)weights, logits_row / Cells::numbers, (const Cell*)values, key_depth, out,
                           out_row, rows);
  }

  const int64_t logits_row, out_row;  // from row to row of logits, weights and results: Nk and D in whole vectors

 private:
  const int64_t D, depth, key_depth;  // the last two: cells in D and Nk numbers
};

}  // namespace
