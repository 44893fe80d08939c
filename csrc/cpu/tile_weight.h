// A packed weight [D, K] of tiles as `linear` and `mlp` run it, see panel_weight.h; and one that is not packed.
#pragma once

#include "cpu/panel_weight.h"
#include "cpu/tile_product.h"

#if defined(VITFAST_TILES)
namespace {

class TileWeight {
 public:
  using Number = Bf16;
  static constexpr int64_t UNIT = TILE_ROWS, LEAST_ROWS = TILE, FEW_ROWS = 128;

  // so many that reading the weight takes less time than multiplying, and that they fit into a cache of 2 MiB
  static int64_t block(int64_t K) {
    const int64_t rows = (1 << 20) / (K * 2) / UNIT * UNIT;
    return rows > 512 ? 512 : rows < 2 * UNIT ? 2 * UNIT : rows;
  }
  static int64_t mlp_block(int64_t K, int64_t hidden) { return block(K + hidden); }
  static int64_t readable(int64_t K) { return tile_steps(K) * TILE_NUMBERS; }
  static int64_t sums(int64_t) { return TILE_ROWS * TILE_PANEL; }

  explicit TileWeight(const PackedWeight& weight)
      : w(weight),
        steps(tile_steps(w.K)),
        columns(round_up(w.D, TILE)),
        panels((columns + TILE_PANEL - 1) / TILE_PANEL) {}

  // As PanelWeight's. Numbers beyond K are there, and finite; where rows are fewer than 16, so many can be read.
  void multiply(const Bf16* x, int64_t x_row, int64_t rows, int64_t first, int64_t last, float* sums,
                const Finish<Bf16>& finish) const {
    Tiles tiles;
    // what follows a product is done to a block's sums while those of the next are still in tiles
    Waiting waiting{};
    for (int64_t column = first * TILE_PANEL; column < last * TILE_PANEL && column < columns; column += TILE_PANEL) {
      const bool wide = columns - column > TILE;
      const char* const panel = (const char*)w.cells + column / TILE * steps * TILE_BYTES;
      for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        // the last tile of rows also has some of those before it: no rows beyond the last are read
        const int64_t end = rows - row < TILE_ROWS ? rows : row + TILE_ROWS, last_tile = end > TILE ? end - TILE : 0;
        const bool two = end - row > TILE;
        const TileRows a{x + (two ? row : last_tile) * x_row, two ? x + last_tile * x_row : nullptr,
                         x_row * int64_t(sizeof(Bf16))};
        int64_t due = 0;
        multiply_tiles(tiles, a, panel, wide, steps, sums, TILE_PANEL, [&] {
          for (due += waiting.count; due >= steps; due -= steps) finish_row(waiting, sums, finish);
        });
        waiting = {.count = end - row,
                   .row = row,
                   .column = column,
                   .whole = two ? TILE : 0,
                   .skipped = two ? row + TILE - last_tile : row - last_tile};
      }
    }
    while (waiting.done < waiting.count) finish_row(waiting, sums, finish);
  }

  static int64_t packed_bytes(int64_t D, int64_t K) { return tile_packed_bytes(D, K); }

  static void pack(const PackWeightArgs& a) {
    const auto row_at = [&](int64_t j) { return j < a.D ? (const Bf16*)a.weight + j * a.K : nullptr; };
    for (int64_t j = 0; j < a.D; j += TILE)
      for (int64_t step = 0; step < tile_steps(a.K); ++step)
        pack_rows_as_columns(row_at, j, step * TILE_NUMBERS, a.K,
                             packed_tile((char*)a.packed, j, step, round_up(a.D, TILE), tile_steps(a.K)));
  }

 private:
  // A block of sums of so many rows, of which so many are done.
  struct Waiting {
    int64_t count, done, row, column;
    int64_t whole, skipped;  // rows of the first tile if there is a second; rows of the last that are another block's
  };

  void finish_row(Waiting& block, const float* sums, const Finish<Bf16>& finish) const {
    const int64_t i = block.done++;
    sums += (i < block.whole ? i : i + block.skipped) * TILE_PANEL;
    const bool wide = columns - block.column > TILE;
    if (wide)
      finish_vectors<TILE_PANEL / LANES>(block.row + i, block.column, sums, finish);
    else
      finish_vectors<TILE / LANES>(block.row + i, block.column, sums, finish);
  }

  template <int N>
  void finish_vectors(int64_t row, int64_t column, const float* from, const Finish<Bf16>& finish) const {
    Floats sums[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[i] = load(from + i * LANES);
    if (w.bias)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[i] += load(w.bias + column + i * LANES);
    finish(row, column, sums, w.D);
  }

  const PackedWeight w;
  const int64_t steps, columns;  // 32 numbers of K; D in whole tiles

 public:
  const int64_t panels;
};

}  // namespace
#endif
