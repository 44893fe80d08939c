// Attention's two products of a head on tiles, as attention_panels.h has them on vectors.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tile_product.h"

#if defined(VITFAST_TILES)
namespace {

using vitfast::AttentionArgs;

class TileProducts {
 public:
  using Number = Bf16;
  using Weight = Bf16;
  using Registers = Tiles;                       // that a thread has while it multiplies
  static constexpr int64_t QUERIES = TILE_ROWS;  // at a time

  explicit TileProducts(const AttentionArgs& args)
      : logits_row(round_up(args.Nk, TILE_NUMBERS)),
        out_row(round_up(args.D, TILE)),
        Nk(args.Nk),
        D(args.D),
        keys(round_up(Nk, TILE)) {}

  int64_t keys_size() const { return tile_packed_bytes(keys, D) / 4; }
  int64_t values_size() const { return tile_packed_bytes(out_row, Nk) / 4; }
  int64_t queries_size() const { return TILE_ROWS * query_row() / 2; }
  int64_t scratch_size() const { return 0; }

  template <class RowAt>
  void pack_keys(const RowAt& key_at, float* packed, float*) const {
    for (int64_t j = 0; j < keys; j += TILE)
      for (int64_t step = 0; step < tile_steps(D); ++step)
        pack_rows_as_columns(key_at, j, step * TILE_NUMBERS, D,
                             packed_tile((char*)packed, j, step, keys, tile_steps(D)));
  }

  template <class RowAt>
  void pack_values(const RowAt& value_at, float* packed, float*) const {
    for (int64_t d = 0; d < out_row; d += TILE)
      for (int64_t step = 0; step < tile_steps(Nk); ++step)
        pack_pairs_of_rows(value_at, step * TILE_NUMBERS, d, D,
                           packed_tile((char*)packed, d, step, out_row, tile_steps(Nk)));
  }

  // zeros beyond a row, and rows of them up to a whole tile
  template <class RowAt>
  void pack_queries(const RowAt& query_at, int64_t rows, float* packed) const {
    Bf16* const to = (Bf16*)packed;
    for (int64_t r = 0; r < round_up(rows, TILE); ++r) {
      const int64_t n = r < rows ? D : 0;
      if (n) memcpy(to + r * query_row(), query_at(r), n * sizeof(Bf16));
      memset(to + r * query_row() + n, 0, (query_row() - n) * sizeof(Bf16));
    }
  }

  void multiply_keys(Tiles& tiles, const float* queries, const float* packed, float* logits, int64_t rows) const {
    multiply(tiles, (const Bf16*)queries, query_row(), rows, (const char*)packed, keys, tile_steps(D), logits,
             logits_row);
  }

  void multiply_values(Tiles& tiles, const Bf16* weights, const float* packed, float* out, int64_t rows) const {
    multiply(tiles, weights, logits_row, rows, (const char*)packed, out_row, tile_steps(Nk), out, out_row);
  }

  const int64_t logits_row, out_row;  // from row to row of logits, weights and results

 private:
  int64_t query_row() const { return tile_steps(D) * TILE_NUMBERS; }

  static void multiply(Tiles& tiles, const Bf16* rows, int64_t row, int64_t count, const char* packed, int64_t columns,
                       int64_t steps, float* sums, int64_t sums_row) {
    const TileRows a{rows, count > TILE ? rows + TILE * row : nullptr, row * int64_t(sizeof(Bf16))};
    for (int64_t j = 0; j < columns; j += TILE_PANEL)
      multiply_tiles(tiles, a, packed + j / TILE * steps * TILE_BYTES, columns - j > TILE, steps, sums + j, sums_row);
  }

  const int64_t Nk, D, keys;  // the last: Nk in whole tiles
};

}  // namespace
#endif
