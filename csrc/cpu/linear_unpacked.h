// residual + act(norm(x) W^T + bias) by tiles with the weight as it lies in memory, for calls that cannot keep a packed
// one: its rows are the first operand, the rows of x, packed on the way, the second. So sums come out as y^T.
#pragma once

#include "cpu/linear.h"

namespace {

#if defined(VITFAST_TILES)

class UnpackedLinear {
 public:
  explicit UnpackedLinear(const LinearArgs& args)
      : a(args), K(a.weight.K), D(a.weight.D), steps(tile_steps(K)), norm(a.norm) {}

  void run() const {
    const int64_t block = TileWeight::block(K);
    const bool few = few_rows<TileWeight>(a.rows, a.threads);
    const Blocks blocks{a.rows, TILE_PANEL, few ? (a.rows + block - 1) / block : blocks_of(a.rows, block, a.threads)};
    const int64_t pairs = (D + TILE_ROWS - 1) / TILE_ROWS;
    int64_t parts = few ? (4 * a.threads + blocks.count - 1) / blocks.count : 1;
    if (parts > pairs) parts = pairs;
    // what is packed once for all parts of the columns, or by each thread for itself
    const Blocks panels{a.rows, TILE_PANEL, (a.rows + TILE_PANEL - 1) / TILE_PANEL};
    const int64_t packed_bytes = packed_size(parts > 1 ? a.rows : blocks.most()), normed_bytes = TILE * K * 2;
    const Workspaces shared(1, parts > 1 ? packed_bytes : 1);
    const Workspaces workspaces(a.threads, SUMS_BYTES + normed_bytes + (parts > 1 ? 0 : packed_bytes));
    if (parts > 1) {
      run_tasks(panels.count, a.threads, [&](int64_t task, int thread) {
        const int64_t first = panels.start(task);
        pack(first, panels.start(task + 1), (Bf16*)(workspaces.of(thread) + SUMS_BYTES),
             shared.of(0) + packed_size(first));
      });
    }
    run_tasks(blocks.count * parts, a.threads, [&](int64_t task, int thread) {
      const int64_t part = task % parts, first = blocks.start(task / parts), last = blocks.start(task / parts + 1);
      if (first == last) return;
      char* const memory = workspaces.of(thread);
      char* packed = memory + SUMS_BYTES + normed_bytes;
      if (parts > 1)
        packed = shared.of(0) + packed_size(first);
      else
        pack(first, last, (Bf16*)(memory + SUMS_BYTES), packed);
      multiply(first, last, pairs * part / parts * TILE_ROWS, pairs * (part + 1) / parts * TILE_ROWS, packed,
               (float*)memory);
    });
  }

 private:
  static constexpr int64_t SUMS_BYTES = TILE_ROWS * TILE_PANEL * 4;

  int64_t packed_size(int64_t rows) const { return round_up(rows, TILE_PANEL) / TILE * steps * TILE_BYTES; }

  // rows first ... last of x, normed: panels of 32, of whose tiles a second one of no rows may be any numbers
  void pack(int64_t first, int64_t last, Bf16* normed, char* packed) const {
    for (int64_t row = first; row < last; row += TILE) {
      const auto row_at = [&](int64_t i) -> const Bf16* {
        if (i >= last) return nullptr;
        return a.normalises ? normed + (i - row) * K : (const Bf16*)a.x + i * K;
      };
      for (int64_t i = row; a.normalises && i < row + TILE && i < last; ++i)
        norm.run_row((const Bf16*)a.x + i * K, normed + (i - row) * K);
      for (int64_t step = 0; step < steps; ++step)
        pack_rows_as_columns(row_at, row, step * TILE_NUMBERS, K,
                             packed_tile(packed, row - first, step, round_up(last - first, TILE), steps));
    }
  }

  // columns of the result, and rows of it whose x is packed
  void multiply(int64_t first, int64_t last, int64_t column, int64_t end, const char* packed, float* sums) const {
    const Finish<Bf16> finish{
        .y = (Bf16*)a.out, .y_row = D, .residual = {(const Bf16*)a.residual, 0, a.residual_rows}, .activate = {a.act}};
    Tiles tiles;
    for (; column < end && column < D; column += TILE_ROWS) {
      const Bf16* const weight = (const Bf16*)a.weight.cells + column * K;
      const TileRows rows{weight, D - column > TILE ? weight + TILE * K : nullptr, K * int64_t(sizeof(Bf16))};
      for (int64_t row = first; row < last; row += TILE_PANEL) {
        multiply_tiles(tiles, rows, packed + packed_size(row - first), last - row > TILE, steps, sums, TILE_PANEL);
        for (int64_t r = 0; r < TILE_PANEL && row + r < last; r += LANES)
          for (int64_t c = 0; c < TILE_ROWS && column + c < D; c += LANES)
            finish_square(row + r, last, column + c, sums + c * TILE_PANEL + r, finish);
      }
    }
  }

  // LANES rows and columns of y out of y^T
  void finish_square(int64_t row, int64_t last, int64_t column, const float* sums, const Finish<Bf16>& finish) const {
    Floats square[LANES];
    for (int64_t i = 0; i < LANES; ++i) square[i] = load(sums + i * TILE_PANEL);
    transpose(square);
    // nothing in place of a bias that is not there: of -0 zeros would make +0
    for (int64_t i = 0; i < LANES && row + i < last; ++i) {
      Floats sums[] = {a.weight.bias ? square[i] + load(a.weight.bias + column) : square[i]};
      finish(row + i, column, sums, D);
    }
  }

  const LinearArgs& a;
  const int64_t K, D, steps;
  const LayerNorm<Bf16> norm;
};

#endif

// Whether `linear_unpacked` takes a weight [D, K]: of tiles that are full, because no zeros can be put beside it.
inline bool takes_unpacked(int64_t D, int64_t K, DType dtype) {
#if defined(VITFAST_TILES)
  return dtype == DType::bf16 && K > 0 && D % TILE == 0 && K % TILE_NUMBERS == 0;
#else
  return false;
#endif
}

#if defined(VITFAST_TILES)
inline void linear_unpacked(const LinearArgs& args) {
  if (args.rows) UnpackedLinear(args).run();
}
#else
constexpr void (*linear_unpacked)(const LinearArgs&) = nullptr;
#endif

}  // namespace
