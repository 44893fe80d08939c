// The gradient of the projection's weight, from the tokens' gradient and the images: grad[patches, D]^T pixels[patches,
// K] without rows of pixels in memory. Patches are split among programs, whose sums another kernel adds up in order:
// the result is the same in every run.
#pragma once

#include "cuda/device.cuh"
#include "cuda/patch_embed.h"
#include "cuda/patch_pixels.cuh"

namespace vitfast {
namespace {

struct Gradient {
  Images images;
  const char* grad;  // of tokens, rows of D numbers
  int64_t D;
  bool wide;      // CHUNK of these may be copied at once
  float* parts;   // [splits, D, K]
  int64_t steps;  // of PATCHES_OF_STEP patches, of a program
  int64_t tiles_down, tiles_across;
};

constexpr int PATCHES_OF_STEP = 32, GRADIENT_THREADS = 256, GRADIENT_STAGES = 3, GRADIENT_AHEAD = 2;

// How the sums of a tile [GRAD_CHUNKS * CHUNK][chunks * CHUNK] lie in the warps: 4 down, 2 across.
constexpr int GRAD_CHUNKS = 16, WARPS_DOWN = 4, WARPS_ACROSS = 2;

template <class T, int chunks>
class GradientProduct {
 public:
  __device__ void step(char* grad, char* pixels) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
    for (int p = 0; p < PATCHES_OF_STEP; p += 16) {
      uint32_t a[DOWN][4], b[ACROSS / 2][4];
#pragma unroll
      for (int i = 0; i < DOWN; ++i)
        load_transposed(
            a[i], cell<T, PATCHES_OF_STEP>(grad, first_down() + 2 * i + matrix % 2, p + matrix / 2 * 8 + lane % 8));
#pragma unroll
      for (int j = 0; j < ACROSS / 2; ++j)
        load_transposed(
            b[j], cell<T, PATCHES_OF_STEP>(pixels, first_across() + 2 * j + matrix / 2, p + matrix % 2 * 8 + lane % 8));
#pragma unroll
      for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) multiply_fragments<T>(sums[i][j], a[i], b[j / 2] + j % 2 * 2);
    }
  }

  // `column_of(chunk)` of the tile is where a chunk of pixels belongs in a row of the weight
  template <class ColumnOf>
  __device__ void write(float* to, int64_t first_row, int64_t D, int K, ColumnOf column_of) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) {
      const int column = column_of(first_across() + j);
      if (column < 0) continue;
#pragma unroll
      for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t row = first_row + first_down() * CHUNK + 16 * i + lane / 4 + e / 2 * 8;
          const int at = column + lane % 4 * 2 + e % 2;
          if (row < D && at < K) to[row * K + at] = sums[i][j][e];
        }
    }
  }

 private:
  // in chunks
  static constexpr int DOWN = GRAD_CHUNKS / WARPS_DOWN / 2, ACROSS = chunks / WARPS_ACROSS;
  static_assert(ACROSS % 2 == 0, "matrices of pixels are loaded in pairs");

  __device__ static int first_down() { return threadIdx.x / 32 / WARPS_ACROSS * (GRAD_CHUNKS / WARPS_DOWN); }
  __device__ static int first_across() { return threadIdx.x / 32 % WARPS_ACROSS * ACROSS; }

  float sums[DOWN][ACROSS][4] = {};
};

template <class T>
__device__ __forceinline__ void fetch_grad(const Gradient& a, const TileRows<PATCHES_OF_STEP>& rows, int64_t first,
                                           char* stage) {
#pragma unroll
  for (int i = threadIdx.x; i < PATCHES_OF_STEP * GRAD_CHUNKS; i += GRADIENT_THREADS) {
    const int chunk = i % GRAD_CHUNKS, row = i / GRAD_CHUNKS;
    const int64_t d = first + chunk * CHUNK;
    const bool there = rows.row[row].height > 0 && d < a.D;
    const char* const from = there ? a.grad + (rows.token[row] * a.D + d) * sizeof(T) : a.grad;
    char* const to = cell<T, PATCHES_OF_STEP>(stage, chunk, row);
    if (a.wide) {
      copy_async<16>(to, from, there);
      continue;
    }
    Bytes16 words{};
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) {
      const uint32_t bits = there && d + e < a.D ? load_global<uint16_t>(from + 2 * e) : 0;
      words.word[e / 2] |= bits << (16 * (e % 2));
    }
    store_shared(to, words);
  }
}

template <class T, class Pixels>
struct GradientPlan {
  static constexpr int CHUNKS = Pixels::interleaved_side ? 12 : 16;
  static constexpr int GRAD_BYTES = GRAD_CHUNKS * CHUNK_BYTES<T, PATCHES_OF_STEP>;
  static constexpr int STAGE = GRAD_BYTES + CHUNKS * CHUNK_BYTES<T, PATCHES_OF_STEP>;
  static constexpr int SHARED = GRADIENT_STAGES * STAGE + 2 * static_cast<int>(sizeof(TileRows<PATCHES_OF_STEP>));
  static constexpr int OF_CHANNEL = 8;
  static_assert(SHARED + MOST_CHANNELS * OF_CHANNEL <= 99 << 10, "too much for a block on 8.9");
};

template <class T, class Pixels>
__global__ void __launch_bounds__(GRADIENT_THREADS, Pixels::one_by_one ? 1 : 2)
    sum_weight_gradient(const __grid_constant__ Gradient a) {
  using P = GradientPlan<T, Pixels>;
  constexpr int CHUNKS = P::CHUNKS, AHEAD = GRADIENT_AHEAD;
  note_shared_bytes<P::SHARED + 3 * P::OF_CHANNEL>();
  char* const memory = shared_memory();
  auto* const rows = reinterpret_cast<TileRows<PATCHES_OF_STEP>*>(memory + GRADIENT_STAGES * P::STAGE);
  float* const scaling = reinterpret_cast<float*>(rows + 2);
  const int64_t tile = blockIdx.x % (a.tiles_down * a.tiles_across),
                split = blockIdx.x / (a.tiles_down * a.tiles_across);
  const int64_t first_row = tile / a.tiles_across * GRAD_CHUNKS * CHUNK;
  const int across = static_cast<int>(tile % a.tiles_across);
  const int64_t first_patch = split * a.steps * PATCHES_OF_STEP;
  find_scaling(a.images, scaling);
  rows[0].find(a.images, first_patch);
  __syncthreads();

  typename Pixels::template Loader<CHUNKS> pixels;
  GradientProduct<T, CHUNKS> product;
  for (int64_t step = -AHEAD; step < a.steps; ++step) {
    wait_for_copies<AHEAD - 1>();
    __syncthreads();
    const int64_t next = step + AHEAD;
    char* const filled = memory + next % GRADIENT_STAGES * P::STAGE;
    if (next < a.steps) {
      fetch_grad<T>(a, rows[next % 2], first_row, filled);
      pixels.fetch(a.images, rows[next % 2], across, filled + P::GRAD_BYTES);
      rows[(next + 1) % 2].find(a.images, first_patch + (next + 1) * PATCHES_OF_STEP);
    }
    close_copies();
    if (step >= 0) {
      char* const stage = memory + step % GRADIENT_STAGES * P::STAGE;
      product.step(stage, stage + P::GRAD_BYTES);
    }
    if (next < a.steps) pixels.put(scaling, filled + P::GRAD_BYTES);
  }
  product.write(a.parts + split * a.D * a.images.K, first_row, a.D, a.images.K, [&](int chunk) {
    const int q = across * CHUNKS + chunk;
    if (q * CHUNK >= a.images.K) return -1;
    if (!Pixels::interleaved_side) return q * CHUNK;
    return column_of_interleaved_chunk<int>(a.images.g, q, Pixels::interleaved_side);
  });
}

struct Parts {
  const float* parts;  // [splits, count]
  int64_t splits, count;
  void* sum;  // [count]
};

constexpr int SUM_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(SUM_THREADS) add_parts(const __grid_constant__ Parts a) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(SUM_THREADS) + threadIdx.x;
  if (i >= a.count) return;
  float sum = 0;
  for (int64_t split = 0; split < a.splits; ++split) sum += a.parts[split * a.count + i];
  static_cast<T*>(a.sum)[i].bits = static_cast<uint16_t>(pack<T>(sum, 0));
}

}  // namespace
}  // namespace vitfast
