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
  static int64_t sums(int64_t) { return 2 * SUMS; }

  explicit TileWeight(const PackedWeight& weight)
      : w(weight),
        steps(tile_steps(w.K)),
        columns(round_up(w.D, TILE)),
        panels((columns + TILE_PANEL - 1) / TILE_PANEL) {}

  // As PanelWeight's. Numbers beyond K are there, and finite; where rows are fewer than 16, so many can be read.
  void multiply(const Bf16* x, int64_t x_row, int64_t rows, int64_t first, int64_t last, float* sums,
                const Finish<Bf16>& finish) const {
    Tiles tiles;
    // what follows a product is done to one block of sums while the next one comes about
    Waiting waiting{};
    int64_t block = 0;
    for (int64_t column = first * TILE_PANEL; column < last * TILE_PANEL && column < columns; column += TILE_PANEL) {
      const bool wide = columns - column > TILE;
      const char* const panel = (const char*)w.cells + column / TILE * steps * TILE_BYTES;
      for (int64_t row = 0; row < rows; row += TILE_ROWS, ++block) {
        // the last tile of rows also has some of those before it: no rows beyond the last are read
        const int64_t end = rows - row < TILE_ROWS ? rows : row + TILE_ROWS, last_tile = end > TILE ? end - TILE : 0;
        const bool two = end - row > TILE;
        const TileRows a{x + (two ? row : last_tile) * x_row, two ? x + last_tile * x_row : nullptr,
                         x_row * int64_t(sizeof(Bf16))};
        float* const to = sums + block % 2 * SUMS;
        int64_t due = 0;
        multiply_tiles(tiles, a, panel, wide, steps, to, TILE_PANEL, [&] {
          for (due += waiting.count; due >= steps; due -= steps) finish_row(waiting, finish);
        });
        waiting = {.count = end - row,
                   .row = row,
                   .column = column,
                   .sums = to,
                   .whole = two ? TILE : 0,
                   .skipped = two ? row + TILE - last_tile : row - last_tile};
      }
    }
    while (waiting.done < waiting.count) finish_row(waiting, finish);
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
  static constexpr int64_t SUMS = TILE_ROWS * TILE_PANEL;

  // A block of sums of so many rows, of which so many are done.
  struct Waiting {
    int64_t count, done, row, column;
    const float* sums;
    int64_t whole, skipped;  // rows of the first tile if there is a second; rows of the last that are another block's
  };

  void finish_row(Waiting& block, const Finish<Bf16>& finish) const {
    const int64_t i = block.done++;
    const float* const sums = block.sums + (i < block.whole ? i : i + block.skipped) * TILE_PANEL;
    for (int64_t c = 0; c < TILE_PANEL && block.column + c < w.D; c += LANES) {
      const int64_t column = block.column + c;
      finish(block.row + i, column, w.bias ? load(sums + c) + load(w.bias + column) : load(sums + c), w.D);
    }
  }

  const PackedWeight w;
  const int64_t steps, columns;  // 32 numbers of K; D in whole tiles

 public:
  const int64_t panels;
};

}  // namespace
#endif
