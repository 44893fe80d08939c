// Images -> tokens in one kernel: a tile of patch rows is gathered from the images into shared memory while the one
// before it is multiplied, bias and positions are added to the sums, and each token is written once.
#pragma once

#include "cuda/device.cuh"
#include "cuda/patch_embed.h"
#include "cuda/patch_pixels.cuh"

namespace vitfast {
namespace {

// PatchEmbedArgs as the kernel takes it.
struct Embedding {
  Images images;
  const char* weight;
  int copied;  // bytes of the weight that may be copied at once: 16, 8, 4 or 2
  const void* bias;
  int64_t D;
  DType dtype;
  const void* positions;
  DType positions_dtype;
  const void* prefix;
  int64_t prefix_image;
  const void* prefix_positions;
  DType prefix_dtype;
  void* tokens;
  DType tokens_dtype;
  int64_t tiles_across;
  bool wide;  // CHUNK numbers of every tensor of width D may be read and written at once
};

// How a tile's sums are made. Common to all: ROWS, COLUMNS, THREADS; CHUNKS of a step where the channels lie apart and
// where they lie side by side; STAGES of shared memory, and how many steps AHEAD of the product they are filled.

// mma.sync: each warp has a part of the tile.
template <class T_, int ROWS_, int COLUMNS_, int WARPS_DOWN, int WARPS_ACROSS>
class WarpProduct {
 public:
  using T = T_;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
  static constexpr int BLOCKS = 2;  // that a multiprocessor shall hold at least
  static constexpr int CHUNKS = 4, INTERLEAVED_CHUNKS = 6;
  template <int chunks>
  static constexpr int STAGES = chunks == CHUNKS ? 4 : 3;
  template <int chunks>
  static constexpr int AHEAD = STAGES<chunks> - 1;
  static constexpr bool by_wgmma = false;

  template <int chunks>
  __device__ void step(char* rows, char* weight) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int q = 0; q < chunks; q += 2) {
      uint32_t a[DOWN][4], b[ACROSS / 2][4];
#pragma unroll
      for (int i = 0; i < DOWN; ++i)
        load_matrices(a[i], cell<T, ROWS>(rows, q + lane / 16, first_row() + 16 * i + lane % 16));
#pragma unroll
      for (int j = 0; j < ACROSS / 2; ++j)
        load_matrices(b[j],
                      cell<T, COLUMNS>(weight, q + lane / 8 % 2, first_column() + 16 * j + lane / 16 * 8 + lane % 8));
#pragma unroll
      for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) multiply_fragments<T>(sums[i][j], a[i], b[j / 2] + j % 2 * 2);
    }
  }
  __device__ void settle() {}
  __device__ void finish() {}

  __device__ void write(float* to, int pitch) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) {
        float* const at = to + (first_row() + 16 * i + lane / 4) * pitch + first_column() + 8 * j + lane % 4 * 2;
        at[0] = sums[i][j][0], at[1] = sums[i][j][1];
        at[8 * pitch] = sums[i][j][2], at[8 * pitch + 1] = sums[i][j][3];
      }
  }

 private:
  static constexpr int DOWN = ROWS / WARPS_DOWN / 16, ACROSS = COLUMNS / WARPS_ACROSS / 8;
  static_assert(ACROSS % 2 == 0, "matrices of the weight are loaded in pairs");

  __device__ static int first_row() { return threadIdx.x / 32 / WARPS_ACROSS * (ROWS / WARPS_DOWN); }
  __device__ static int first_column() { return threadIdx.x / 32 % WARPS_ACROSS * (COLUMNS / WARPS_ACROSS); }

  float sums[DOWN][ACROSS][4] = {};
};

// wgmma: each of two groups of four warps has 64 rows, and multiplies while it gathers the next ones.
template <class T_>
class GroupProduct {
 public:
  using T = T_;
  static constexpr int ROWS = 128, COLUMNS = 256, THREADS = 256, BLOCKS = 1;
  static constexpr int CHUNKS = 8, INTERLEAVED_CHUNKS = 6;
  template <int chunks>
  static constexpr int STAGES = chunks == CHUNKS ? 4 : 5;
  // the product of the step before may still read its stage
  template <int chunks>
  static constexpr int AHEAD = STAGES<chunks> - 2;
  static constexpr bool by_wgmma = true;

#ifdef VITFAST_WGMMA
  template <int chunks>
  __device__ void step(char* rows, char* weight) {
    keep();
    begin_wgmma();
#pragma unroll
    for (int q = 0; q < chunks; q += 2)
      multiply_async<T>(sums, cell<T, ROWS>(rows, q, static_cast<int>(threadIdx.x) / 128 * 64), CHUNK_BYTES<T, ROWS>,
                        cell<T, COLUMNS>(weight, q, 0), CHUNK_BYTES<T, COLUMNS>);
    close_wgmma();
    keep();
  }
  __device__ void settle() { wait_for_wgmma<1>(); }
  __device__ void finish() {
    wait_for_wgmma<0>();
    keep();
  }
#endif

  __device__ void write(float* to, int pitch) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      float* const at = to + row * pitch + 8 * j + lane % 4 * 2;
      at[0] = sums[j][0], at[1] = sums[j][1];
      at[8 * pitch] = sums[j][2], at[8 * pitch + 1] = sums[j][3];
    }
  }

 private:
#ifdef VITFAST_WGMMA
  __device__ void keep() {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) keep_in_place(sums[j][i]);
  }
#endif

  float sums[COLUMNS / 8][4] = {};
};

// fp32, every product exact to fp32: not on tensor cores, which would round to TF32.
class FloatProduct {
 public:
  using T = float;
  static constexpr int ROWS = 64, COLUMNS = 64, THREADS = 128, BLOCKS = 2, CHUNKS = 2, INTERLEAVED_CHUNKS = 6;
  template <int chunks>
  static constexpr int STAGES = 3;
  template <int chunks>
  static constexpr int AHEAD = 2;
  static constexpr bool by_wgmma = false;

  template <int chunks>
  __device__ void step(char* rows, char* weight) {
    // what one step adds is summed up apart: short chains are more exact
    float part[DOWN][ACROSS] = {};
#pragma unroll
    for (int k = 0; k < chunks * CHUNK; k += 4) {
      float a[DOWN][4], b[ACROSS][4];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) read(a[i], cell<float, ROWS>(rows, k / CHUNK, row(i)) + k % CHUNK * 4);
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) read(b[j], cell<float, COLUMNS>(weight, k / CHUNK, column(j)) + k % CHUNK * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int i = 0; i < DOWN; ++i)
#pragma unroll
          for (int j = 0; j < ACROSS; ++j) part[i][j] += a[i][e] * b[j][e];
    }
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) sums[i][j] += part[i][j];
  }
  __device__ void settle() {}
  __device__ void finish() {}

  __device__ void write(float* to, int pitch) const {
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) to[row(i) * pitch + column(j)] = sums[i][j];
  }

 private:
  static constexpr int DOWN = 4, ACROSS = 8;

  __device__ static int row(int i) { return threadIdx.x / 8 + 16 * i; }
  __device__ static int column(int j) { return threadIdx.x % 8 + 8 * j; }
  __device__ static void read(float (&to)[4], const char* from) {
    const Bytes16 all = *reinterpret_cast<const Bytes16*>(from);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = as_float(all.word[e]);
  }

  float sums[DOWN][ACROSS] = {};
};

// The rows of the weight [D, K] that a tile's columns are.
template <class Product, class Pixels, int CHUNKS>
__device__ __forceinline__ void fetch_weight(const Embedding& a, int64_t first, int step, char* stage) {
  using T = typename Product::T;
  constexpr int BYTES = CHUNK * sizeof(T), COLUMNS = Product::COLUMNS;
  // calls `copy` with a place, the numbers that belong there, and how many bytes of them exist
  const auto cell_of = [&](int i, auto copy) {
    const int chunk = i % CHUNKS, n = i / CHUNKS, q = step * CHUNKS + chunk;
    const int column = Pixels::interleaved_side
                           ? column_of_interleaved_chunk<int>(a.images.g, q, Pixels::interleaved_side)
                           : q * CHUNK;
    const bool any = q * CHUNK < a.images.K && first + n < a.D;
    const char* const from = any ? a.weight + ((first + n) * a.images.K + column) * sizeof(T) : a.weight;
    copy(cell<T, COLUMNS>(stage, chunk, n), from, any ? (a.images.K - column) * static_cast<int>(sizeof(T)) : 0);
  };
  if (a.copied == 16) {
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * CHUNKS; i += Product::THREADS)
      cell_of(i, [&](char* to, const char* from, int left) {
#pragma unroll
        for (int at = 0; at < BYTES; at += 16) copy_async<16>(to + at, at < left ? from + at : a.weight, at < left);
      });
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < COLUMNS * CHUNKS; i += Product::THREADS)
    cell_of(i, [&](char* to, const char* from, int left) {
      const auto there = [&](int at) { return at < left ? from + at : a.weight; };
#pragma unroll 1
      for (int at = 0; at < BYTES; at += a.copied) {
        if (a.copied == 8)
          copy_async<8>(to + at, there(at), at < left);
        else if (a.copied == 4)
          copy_async<4>(to + at, there(at), at < left);
        else
          *reinterpret_cast<uint16_t*>(to + at) = at < left ? load_global<uint16_t>(from + at) : 0;
      }
    });
}

// numbers [index, index + count) of a tensor are added to v; CHUNK of them where it is read at once
__device__ __forceinline__ void add_numbers(float (&v)[CHUNK], const void* tensor, DType dtype, int64_t index,
                                            int count, bool wide) {
  if (!tensor) return;
  const char* const from = static_cast<const char*>(tensor) + index * (dtype == DType::fp32 ? 4 : 2);
  if (dtype == DType::fp32) {
#pragma unroll
    for (int e = 0; e < CHUNK; e += 4) {
      Bytes16 words{};
      if (wide) words = load_global<Bytes16>(from + 4 * e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!wide && e + i < count) words.word[i] = load_global<uint32_t>(from + 4 * (e + i));
        v[e + i] += as_float(words.word[i]);
      }
    }
    return;
  }
  Bytes16 words{};
  if (wide) words = load_global<Bytes16>(from);
#pragma unroll
  for (int e = 0; e < CHUNK; ++e) {
    uint16_t bits = static_cast<uint16_t>(words.word[e / 2] >> (16 * (e % 2)));
    if (!wide && e < count) bits = load_global<uint16_t>(from + 2 * e);
    v[e] += dtype == DType::fp16 ? to_float(Half{bits}) : to_float(Bf16{bits});
  }
}

__device__ __forceinline__ void write_numbers(const float (&v)[CHUNK], void* tensor, DType dtype, int64_t index,
                                              int count, bool wide) {
  char* const to = static_cast<char*>(tensor) + index * (dtype == DType::fp32 ? 4 : 2);
  if (dtype == DType::fp32) {
#pragma unroll
    for (int e = 0; e < CHUNK; e += 4) {
      auto* const four = reinterpret_cast<Bytes16*>(to + 4 * e);
      if (wide)
        *four = {{as_bits(v[e]), as_bits(v[e + 1]), as_bits(v[e + 2]), as_bits(v[e + 3])}};
      else
        for (int i = e; i < e + 4; ++i)
          if (i < count) reinterpret_cast<float*>(to)[i] = v[i];
    }
    return;
  }
  const Bytes16 words = dtype == DType::fp16 ? packed<Half>(v) : packed<Bf16>(v);
  if (wide) {
    *reinterpret_cast<Bytes16*>(to) = words;
    return;
  }
#pragma unroll
  for (int e = 0; e < CHUNK; ++e)
    if (e < count) reinterpret_cast<uint16_t*>(to)[e] = static_cast<uint16_t>(words.word[e / 2] >> (16 * (e % 2)));
}

__device__ __forceinline__ int chunk_left(const Embedding& a, int64_t column) {
  const int64_t left = a.D - column;
  return left < CHUNK ? (left > 0 ? static_cast<int>(left) : 0) : CHUNK;
}

// sums + bias + positions -> tokens
template <class Product>
__device__ void write_tokens(const Embedding& a, const TileRows<Product::ROWS>& rows, int64_t first_patch,
                             int64_t first_column, const float* sums, int pitch) {
  constexpr int ACROSS = Product::COLUMNS / CHUNK;
  for (int i = threadIdx.x; i < Product::ROWS * ACROSS; i += Product::THREADS) {
    const int r = i / ACROSS, c = i % ACROSS * CHUNK, count = chunk_left(a, first_column + c);
    if (first_patch + r >= a.images.patches || !count) continue;
    float v[CHUNK];
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) v[e] = sums[r * pitch + c + e];
    add_numbers(v, a.bias, a.dtype, first_column + c, count, a.wide);
    add_numbers(v, a.positions, a.positions_dtype, rows.position[r] * a.D + first_column + c, count, a.wide);
    write_numbers(v, a.tokens, a.tokens_dtype, rows.token[r] * a.D + first_column + c, count, a.wide);
  }
}

// The prefix tokens of the images whose first patch is in this tile.
template <class Product>
__device__ void write_prefix(const Embedding& a, int64_t first_patch, int64_t first_column) {
  constexpr int ACROSS = Product::COLUMNS / CHUNK;
  const Images& images = a.images;
  const int64_t P = images.g.P, N = images.packed ? 0 : grid_height(images.g) * grid_width(images.g);
  const auto begin_of = [&](int64_t b) { return images.packed ? images.packed[b].first : b * N; };
  int64_t b = images.packed ? image_of(images.packed, images.count, first_patch) : first_patch / N;
  if (begin_of(b) < first_patch) ++b;
  for (; b < images.count && begin_of(b) < first_patch + Product::ROWS; ++b) {
    const int64_t row = row_of(images.g, b, begin_of(b)) - P;
    for (int64_t i = threadIdx.x; i < P * ACROSS; i += Product::THREADS) {
      const int64_t p = i / ACROSS, column = first_column + i % ACROSS * CHUNK;
      const int count = chunk_left(a, column);
      if (!count) continue;
      float v[CHUNK] = {};
      add_numbers(v, a.prefix, a.prefix_dtype, b * a.prefix_image + p * a.D + column, count, a.wide);
      add_numbers(v, a.prefix_positions, a.positions_dtype, p * a.D + column, count, a.wide);
      write_numbers(v, a.tokens, a.tokens_dtype, (row + p) * a.D + column, count, a.wide);
    }
  }
}

// wgmma is compiled for 9.0 only, where it takes the place of the largest tile of mma.sync: nvcc takes long for each.
template <class Product>
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool COMPILED = Product::by_wgmma || Product::ROWS * Product::COLUMNS < 128 * 128;
#elif defined(__CUDA_ARCH__)
constexpr bool COMPILED = !Product::by_wgmma;
#else
constexpr bool COMPILED = true;
#endif

template <class Product, class Pixels>
struct Plan {
  using T = typename Product::T;
  static constexpr int CHUNKS = Pixels::interleaved_side ? Product::INTERLEAVED_CHUNKS : Product::CHUNKS;
  static constexpr int STAGES = Product::template STAGES<CHUNKS>, AHEAD = Product::template AHEAD<CHUNKS>;
  static constexpr int ROWS_BYTES = CHUNKS * CHUNK_BYTES<T, Product::ROWS>;
  static constexpr int STAGE = ROWS_BYTES + CHUNKS * CHUNK_BYTES<T, Product::COLUMNS>;
  // sums take the place of the stages at the end
  static constexpr int PITCH = Product::COLUMNS + 4, SUMS = Product::ROWS * PITCH * 4;
  static constexpr int TILES = STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS;
  // and behind them two numbers for each channel
  static constexpr int SHARED = TILES + static_cast<int>(sizeof(TileRows<Product::ROWS>)), OF_CHANNEL = 8;
  // what a block may have on 8.9, and on 9.0
  static_assert(SHARED + MOST_CHANNELS * OF_CHANNEL <= (Product::by_wgmma ? 227 : 99) << 10, "too much for a block");
};

template <class Product, class Pixels>
__global__ void __launch_bounds__(Product::THREADS, Product::BLOCKS)
    embed_patches(const __grid_constant__ Embedding a) {
  if constexpr (COMPILED<Product>) {
    using P = Plan<Product, Pixels>;
    note_shared_bytes<P::SHARED + 3 * P::OF_CHANNEL>();
    constexpr int CHUNKS = P::CHUNKS, STAGES = P::STAGES, AHEAD = P::AHEAD;
    char* const memory = shared_memory();
    auto& rows = *reinterpret_cast<TileRows<Product::ROWS>*>(memory + P::TILES);
    float* const scaling = reinterpret_cast<float*>(&rows + 1);
    // tiles of the same patches follow each other, so that their pixels come from memory once
    const int64_t first_patch = blockIdx.x / a.tiles_across * Product::ROWS;
    const int64_t first_column = blockIdx.x % a.tiles_across * Product::COLUMNS;
    rows.find(a.images, first_patch);
    find_scaling(a.images, scaling);
    __syncthreads();

    const int steps = (a.images.K + CHUNKS * CHUNK - 1) / (CHUNKS * CHUNK);
    typename Pixels::template Loader<CHUNKS> pixels;
    Product product;
    // the first steps fill stages only
    for (int step = -AHEAD; step < steps; ++step) {
      wait_for_copies<AHEAD - 1>();
#ifdef VITFAST_WGMMA
      if constexpr (Product::by_wgmma) show_to_wgmma();
#endif
      __syncthreads();
      const int next = step + AHEAD;
      char* const filled = memory + next % STAGES * P::STAGE;
      if (next < steps) {
        pixels.fetch(a.images, rows, next, filled);
        fetch_weight<Product, Pixels, CHUNKS>(a, first_column, next, filled + P::ROWS_BYTES);
      }
      close_copies();
      if (step >= 0) {
        char* const stage = memory + step % STAGES * P::STAGE;
        product.template step<CHUNKS>(stage, stage + P::ROWS_BYTES);
      }
      if (next < steps) pixels.put(scaling, filled);
      product.settle();
    }
    product.finish();
    __syncthreads();
    product.write(reinterpret_cast<float*>(memory), P::PITCH);
    __syncthreads();
    write_tokens<Product>(a, rows, first_patch, first_column, reinterpret_cast<float*>(memory), P::PITCH);
    if (a.images.g.P) write_prefix<Product>(a, first_patch, first_column);
  } else {
    // whoever chose this tile did not look at the architectures that there is code for
    stop();
  }
}

}  // namespace
}  // namespace vitfast
