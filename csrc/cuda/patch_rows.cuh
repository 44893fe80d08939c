// Images -> rows of pixels in memory, [patches, C * ph * pw]: for what multiplies them elsewhere, as the weight's
// gradient.
#pragma once

#include "cuda/device.cuh"
#include "cuda/patch_embed.h"
#include "cuda/patch_pixels.cuh"

namespace vitfast {
namespace {

struct Rows {
  Images images;
  void* rows;
  bool wide;       // CHUNK numbers of a row may be written at once
  int64_t chunks;  // of a row
};

constexpr int PATCHES_OF_BLOCK = 32, ROWS_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(ROWS_THREADS) write_patch_rows(const __grid_constant__ Rows a) {
  auto& rows = *reinterpret_cast<TileRows<PATCHES_OF_BLOCK>*>(shared_memory());
  float* const scaling = reinterpret_cast<float*>(&rows + 1);
  const int64_t first = blockIdx.x * static_cast<int64_t>(PATCHES_OF_BLOCK);
  rows.find(a.images, first);
  find_scaling(a.images, scaling);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < PATCHES_OF_BLOCK * a.chunks; i += ROWS_THREADS) {
    const int row = static_cast<int>(i / a.chunks), column = static_cast<int>(i % a.chunks) * CHUNK;
    if (first + row >= a.images.patches) break;
    uint32_t words[CHUNK], inside;
    float v[CHUNK];
    load_chunk(words, inside, a.images, rows, row, column);
    pixels_of_chunk(v, words, inside, a.images, scaling, column);
    T* const to = static_cast<T*>(a.rows) + (first + row) * a.images.K + column;
    if constexpr (sizeof(T) == 4) {
      if (a.wide) {
        *reinterpret_cast<Bytes16*>(to) = {{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])}};
        *reinterpret_cast<Bytes16*>(to + 4) = {{as_bits(v[4]), as_bits(v[5]), as_bits(v[6]), as_bits(v[7])}};
      } else {
        for (int e = 0; e < CHUNK && column + e < a.images.K; ++e) to[e] = v[e];
      }
    } else {
      const Bytes16 words_of_row = packed<T>(v);
      if (a.wide) {
        *reinterpret_cast<Bytes16*>(to) = words_of_row;
      } else {
#pragma unroll
        for (int e = 0; e < CHUNK; ++e)
          if (column + e < a.images.K) to[e].bits = static_cast<uint16_t>(words_of_row.word[e / 2] >> (16 * (e % 2)));
      }
    }
  }
}

}  // namespace
}  // namespace vitfast
