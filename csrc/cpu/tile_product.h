// The product of tiles inside attention and linear layers: 32 rows times a panel of 32 packed columns, four tiles of
// sums for two of either side, because a tile takes half as long to load as to multiply.
#pragma once

#include "cpu/panels.h"
#include "cpu/tiles.h"

#if defined(VITFAST_TILES)
namespace {

constexpr int64_t TILE_ROWS = 2 * TILE, TILE_PANEL = 2 * TILE;  // of the four tiles of sums

inline int64_t tile_steps(int64_t K) { return (K + TILE_NUMBERS - 1) / TILE_NUMBERS; }

// Bytes of a packed matrix [columns][K]: panels of two tiles of columns, the last of which has one where that is
// enough; in a panel the tiles of each 32 numbers of K one after the other, zeros beyond either end.
inline int64_t tile_packed_bytes(int64_t columns, int64_t K) {
  return round_up(columns, TILE) / TILE * tile_steps(K) * TILE_BYTES;
}

// Where the tile of column j and of step k / 32 is.
inline char* packed_tile(char* packed, int64_t j, int64_t step, int64_t columns, int64_t steps) {
  const int64_t panel = j / TILE_PANEL * TILE_PANEL, tiles = columns - panel > TILE ? 2 : 1;
  return packed + panel / TILE * steps * TILE_BYTES + (step * tiles + (j - panel) / TILE) * TILE_BYTES;
}

// LANES numbers, of which these are there; zeros in place of the others.
inline Halves load_halves(const Bf16* from, int64_t there) {
  if (there >= LANES) return load_bits<Halves>(from);
  uint16_t part[LANES] = {};
  if (there > 0) memcpy(part, from, there * 2);
  return load_bits<Halves>(part);
}

// LANES pairs of numbers, the same.
inline Floats load_pairs(const Bf16* from, int64_t there) {
  if (there >= 2 * LANES) return load_bits<Floats>(from);
  uint32_t part[LANES] = {};
  if (there > 0) memcpy(part, from, there * 2);
  return load_bits<Floats>(part);
}

// Numbers k ... k + 32 of rows j ... j + 16 of a matrix -> the tile whose columns they are. row_at(j) is where row j of
// n numbers begins, or null for a row of zeros.
template <class RowAt>
inline void pack_rows_as_columns(const RowAt& row_at, int64_t j, int64_t k, int64_t n, char* tile) {
  for (int64_t row = 0; row < TILE; row += LANES) {
    for (int64_t cell = 0; cell < TILE; cell += LANES) {
      Floats cells[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        const Bf16* const from = row_at(j + row + i);
        cells[i] = from ? load_pairs(from + k + 2 * cell, n - k - 2 * cell) : Floats{};
      }
      transpose(cells);
      for (int64_t i = 0; i < LANES; ++i) store_bits(tile + (cell + i) * TILE_ROW_BYTES + row * 4, cells[i]);
    }
  }
}

// Numbers d ... d + 16 of rows k ... k + 32 of a matrix, as `row_at` has it, -> the tile of these columns.
template <class RowAt>
inline void pack_pairs_of_rows(const RowAt& row_at, int64_t k, int64_t d, int64_t n, char* tile) {
  for (int64_t pair = 0; pair < TILE; ++pair) {
    const Bf16* const rows[] = {row_at(k + 2 * pair), row_at(k + 2 * pair + 1)};
    for (int64_t i = 0; i < TILE; i += LANES) {
      Halves sides[2];
      for (int side = 0; side < 2; ++side)
        sides[side] = rows[side] ? load_halves(rows[side] + d + i, n - d - i) : Halves{};
      store_bits(tile + pair * TILE_ROW_BYTES + i * 4, widen(sides[0]) | (widen(sides[1]) << 16));
    }
  }
}

// Rows of the first operand, of which two tiles begin at these places; row_bytes apart, 64 bytes a step.
struct TileRows {
  const void *first, *second;
  int64_t row_bytes;
};

// sums[R * 16][V * 16], sums_row apart, = rows times V packed tiles a step. between() is called after every step: what
// it does on vectors runs beside the tiles.
template <int R, int V, class Between>
__attribute__((noinline)) void multiply_tiles(Tiles& tiles, const TileRows& rows, const char* packed, int64_t steps,
                                              float* sums, int64_t sums_row, const Between& between) {
  tiles.zero<0>();
  if constexpr (V == 2) tiles.zero<1>();
  if constexpr (R == 2) tiles.zero<2>();
  if constexpr (R == 2 && V == 2) tiles.zero<3>();
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t column = step * TILE_ROW_BYTES;
    tiles.load<6>(packed, TILE_ROW_BYTES);
    tiles.load<4>((const char*)rows.first + column, rows.row_bytes);
    tiles.multiply<0, 4, 6>();
    if constexpr (R == 2) {
      tiles.load<5>((const char*)rows.second + column, rows.row_bytes);
      tiles.multiply<2, 5, 6>();
    }
    if constexpr (V == 2) {
      tiles.load<7>(packed + TILE_BYTES, TILE_ROW_BYTES);
      tiles.multiply<1, 4, 7>();
      if constexpr (R == 2) tiles.multiply<3, 5, 7>();
    }
    packed += V * TILE_BYTES;
    between();
  }
  tiles.store<0>(sums, sums_row * 4);
  if constexpr (V == 2) tiles.store<1>(sums + TILE, sums_row * 4);
  if constexpr (R == 2) tiles.store<2>(sums + TILE * sums_row, sums_row * 4);
  if constexpr (R == 2 && V == 2) tiles.store<3>(sums + TILE * sums_row + TILE, sums_row * 4);
}

// The same of one or two tiles of rows and of columns.
template <class Between>
inline void multiply_tiles(Tiles& tiles, const TileRows& rows, const char* packed, bool wide, int64_t steps,
                           float* sums, int64_t sums_row, const Between& between) {
  if (rows.second && wide) return multiply_tiles<2, 2>(tiles, rows, packed, steps, sums, sums_row, between);
  if (rows.second) return multiply_tiles<2, 1>(tiles, rows, packed, steps, sums, sums_row, between);
  if (wide) return multiply_tiles<1, 2>(tiles, rows, packed, steps, sums, sums_row, between);
  multiply_tiles<1, 1>(tiles, rows, packed, steps, sums, sums_row, between);
}

inline void multiply_tiles(Tiles& tiles, const TileRows& rows, const char* packed, bool wide, int64_t steps,
                           float* sums, int64_t sums_row) {
  multiply_tiles(tiles, rows, packed, wide, steps, sums, sums_row, [] {});
}

}  // namespace
#endif
