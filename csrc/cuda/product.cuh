// x weight^T by three groups of four warps: one of their threads copies tiles of both into a ring of stages, and the
// two other groups multiply. These take turns: each has a tile of the result of its own, and while one finishes its
// tile the other has the tensor cores. Blocks stay and take tile after tile; those of a cluster have tiles below each
// other, copy a part of the weight's tile each, and get all of it.
#pragma once

#include "cuda/product_math.cuh"

namespace vitfast {
namespace {

// ProductArgs as the kernel takes it.
struct Multiplication {
  TensorMap x, weight;
  int64_t M;
  int N, steps, tiles_across;
  int64_t tiles;  // of clusters
  const float *column_sums, *bias, *mean, *rstd;
  int pieces, piece;
  bool centred;
  float eps;
  char* out;
  After after;
};

template <class T_, int ROWS_, int COLUMNS_, int STAGES_, int CLUSTER_>
struct ProductPlan {
  using T = T_;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, STAGES = STAGES_, CLUSTER = CLUSTER_;
  static constexpr int GROUPS = 2, THREADS = (1 + GROUPS) * GROUP_THREADS;
  static constexpr int DEPTH = SWIZZLED / 2;
  static constexpr int OF_X = ROWS * SWIZZLED, OF_WEIGHT = COLUMNS * SWIZZLED, STAGE = OF_X + OF_WEIGHT;
  static constexpr int SHARED = STAGES * STAGE + (2 * STAGES + GROUPS) * static_cast<int>(sizeof(Barrier));
  static_assert(ROWS % 64 == 0 && COLUMNS % 32 == 0, "a group finishes 32 columns at a time");
  static_assert(COLUMNS / CLUSTER % 8 == 0, "what a block copies of the weight begins with a pattern");
  static_assert(SHARED <= 227 << 10, "too much for a block");
};

#ifdef VITFAST_WGMMA

// The ring of stages, and who may touch what when.
template <class P>
struct Ring {
  char* memory;

  // step `at` of all that this block ever multiplies has a stage, for the time of a phase
  __device__ char* rows(uint32_t at) const { return memory + at % P::STAGES * P::STAGE; }
  __device__ char* weight(uint32_t at) const { return rows(at) + P::OF_X; }
  __device__ static uint32_t parity(uint32_t at) { return at / P::STAGES % 2; }

  __device__ Barrier& full(uint32_t at) const { return barriers()[at % P::STAGES]; }
  // by the warps of all blocks that a copy from this one goes to
  __device__ Barrier& empty(uint32_t at) const { return barriers()[P::STAGES + at % P::STAGES]; }
  __device__ Barrier& turn(int group) const { return barriers()[2 * P::STAGES + group]; }

  __device__ void begin() const {
    for (int i = 0; i < P::STAGES; ++i) begin_barrier(full(i), 1), begin_barrier(empty(i), GROUP_WARPS * P::CLUSTER);
    for (int i = 0; i < P::GROUPS; ++i) begin_barrier(turn(i), GROUP_WARPS);
    show_barriers();
  }

  // by each warp that has read the stage
  __device__ void leave(uint32_t at) const {
    __syncwarp();
    if (threadIdx.x % 32) return;
    if constexpr (P::CLUSTER == 1) {
      arrive(empty(at));
    } else {
#pragma unroll
      for (int rank = 0; rank < P::CLUSTER; ++rank) arrive_in_block(empty(at), rank);
    }
  }

 private:
  __device__ Barrier* barriers() const { return reinterpret_cast<Barrier*>(memory + P::STAGES * P::STAGE); }
};

// The tiles that a block takes, one after the other; its groups by turns.
template <class P>
struct Tiles {
  int64_t cluster = blockIdx.x / P::CLUSTER, clusters = gridDim.x / P::CLUSTER;
  int rank = P::CLUSTER == 1 ? 0 : cluster_rank();

  __device__ int64_t number(int i) const { return cluster + i * clusters; }
  // those of the same rows follow each other, so that x comes from memory once
  __device__ int64_t first_row(const Multiplication& a, int i) const {
    return (number(i) / a.tiles_across * P::CLUSTER + rank) * P::ROWS;
  }
  __device__ int first_column(const Multiplication& a, int i) const {
    return static_cast<int>(number(i) % a.tiles_across) * P::COLUMNS;
  }
};

template <class P>
__device__ __forceinline__ void copy_tiles(const Multiplication& a, const Ring<P>& ring) {
  constexpr int SHARE = P::COLUMNS / P::CLUSTER;
  const Tiles<P> tiles;
  uint32_t at = 0;
  for (int i = 0; tiles.number(i) < a.tiles; ++i) {
    const int64_t row = tiles.first_row(a, i);
    const int column = tiles.first_column(a, i) + tiles.rank * SHARE;
    for (int step = 0; step < a.steps; ++step, ++at) {
      wait_for(ring.empty(at), ring.parity(at) ^ 1);
      // what other blocks copy may arrive before this
      arrive_and_expect(ring.full(at), P::STAGE);
      copy_box<1>(ring.rows(at), a.x, row, step * P::DEPTH, ring.full(at));
      copy_box<P::CLUSTER>(ring.weight(at) + tiles.rank * SHARE * SWIZZLED, a.weight, column, step * P::DEPTH,
                           ring.full(at));
    }
  }
}

template <class P>
using Sums = float[P::ROWS / 64][P::COLUMNS / 8][4];

template <class P>
__device__ __forceinline__ void keep_all_in_place(Sums<P>& sums) {
#pragma unroll
  for (int d = 0; d < P::ROWS / 64; ++d)
#pragma unroll
    for (int j = 0; j < P::COLUMNS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) keep_in_place(sums[d][j][i]);
}

template <class P>
__device__ __forceinline__ void multiply_stage(Sums<P>& sums, const char* rows, const char* weight) {
  keep_all_in_place<P>(sums);
  begin_wgmma();
#pragma unroll
  for (int k = 0; k < SWIZZLED; k += 32)
#pragma unroll
    for (int d = 0; d < P::ROWS / 64; ++d)
      multiply_swizzled<typename P::T>(sums[d], rows + d * 64 * SWIZZLED + k, weight + k);
  close_wgmma();
  keep_all_in_place<P>(sums);
}

// Of the two rows of each 64 that this thread has sums of.
template <class P>
__device__ __forceinline__ void find_norms(const Multiplication& a, int64_t first, RowNorm (&norms)[P::ROWS / 64][2]) {
#pragma unroll
  for (int d = 0; d < P::ROWS / 64; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first + 64 * d + 8 * h;
      norms[d][h] = {0, 1};
      if (!a.column_sums || row >= a.M) continue;
      if (a.rstd)
        norms[d][h] = {a.mean ? load_global<float>(a.mean + row) : 0, load_global<float>(a.rstd + row)};
      else
        norms[d][h] = put_together(a.pieces, a.piece, a.centred, a.eps, [&](int p, int which) {
          return load_global<float>(a.mean + (2 * p + which) * a.M + row);
        });
    }
}

// Lane i of four has words i of four blocks, and gets all four of block i.
__device__ __forceinline__ void turn_words(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &low = word[distance == 1 ? 2 * i : i], &high = word[distance == 1 ? 2 * i + 1 : i + 2];
      const uint32_t got = exchanged(upper ? low : high, distance);
      (upper ? low : high) = got;
    }
  }
}

template <class P, After after>
__device__ __forceinline__ void write_tile(const Multiplication& a, const Sums<P>& sums,
                                           const RowNorm (&norms)[P::ROWS / 64][2], int64_t first_row,
                                           int first_column) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < P::COLUMNS / 8; j += 4) {
    float column_sum[4][2] = {}, bias[4][2] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int column = first_column + 8 * (j + q) + 2 * lane;
      if (column >= a.N) continue;
      const Bytes8 of_bias = load_global<Bytes8>(a.bias + column);
      bias[q][0] = as_float(of_bias.word[0]), bias[q][1] = as_float(of_bias.word[1]);
      if (!a.column_sums) continue;
      const Bytes8 of_sums = load_global<Bytes8>(a.column_sums + column);
      column_sum[q][0] = as_float(of_sums.word[0]), column_sum[q][1] = as_float(of_sums.word[1]);
    }
    const int column = first_column + 8 * (j + lane);
#pragma unroll
    for (int d = 0; d < P::ROWS / 64; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t words[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float* const pair = &sums[d][j + q][2 * h];
          words[q] = pack<typename P::T>(followed<after>(normed(pair[0], norms[d][h], column_sum[q][0], bias[q][0])),
                                         followed<after>(normed(pair[1], norms[d][h], column_sum[q][1], bias[q][1])));
        }
        turn_words(words, lane);
        const int64_t row = first_row + 64 * d + 8 * h;
        if (row >= a.M || column >= a.N) continue;
        *reinterpret_cast<Bytes16*>(a.out + (row * a.N + column) * 2) = {{words[0], words[1], words[2], words[3]}};
      }
  }
}

template <class P>
__device__ __forceinline__ void multiply_tiles(const Multiplication& a, const Ring<P>& ring, int group) {
  const Tiles<P> tiles;
  const int thread = threadIdx.x % GROUP_THREADS;
  for (int i = group; tiles.number(i) < a.tiles; i += P::GROUPS) {
    Sums<P> sums = {};
    RowNorm norms[P::ROWS / 64][2];
    // the warp's 16 rows, of which this thread has one and that 8 below it
    const int64_t first_row = tiles.first_row(a, i) + thread / 32 * 16 + thread % 32 / 4;
    find_norms<P>(a, first_row, norms);
    // the first group has the first turn
    wait_for(ring.turn(group), (i / P::GROUPS + (group == 0)) % 2);
    uint32_t at = static_cast<uint32_t>(i) * a.steps;
    for (int step = 0; step < a.steps; ++step, ++at) {
      wait_for(ring.full(at), ring.parity(at));
      multiply_stage<P>(sums, ring.rows(at), ring.weight(at));
      // all but the last
      wait_for_wgmma<1>();
      if (step > 0) ring.leave(at - 1);
    }
    if (thread % 32 == 0) arrive(ring.turn(1 - group));
    wait_for_wgmma<0>();
    keep_all_in_place<P>(sums);
    ring.leave(at - 1);
    const int first_column = tiles.first_column(a, i);
    if (a.after == After::gelu)
      write_tile<P, After::gelu>(a, sums, norms, first_row, first_column);
    else if (a.after == After::gelu_tanh)
      write_tile<P, After::gelu_tanh>(a, sums, norms, first_row, first_column);
    else
      write_tile<P, After::none>(a, sums, norms, first_row, first_column);
  }
}

#endif  // VITFAST_WGMMA

template <class P>
__global__ void __launch_bounds__(P::THREADS, 1) multiply_by_turns(const __grid_constant__ Multiplication a) {
#ifdef VITFAST_WGMMA
  note_shared_bytes<P::SHARED>();
  const Ring<P> ring{swizzled_memory()};
  if (threadIdx.x == 0) ring.begin();
  meet_cluster<P::CLUSTER>();
  const int group = static_cast<int>(threadIdx.x) / GROUP_THREADS;
  // 128 * (40 + 2 * 232) of the 384 * 168 that the block began with
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) copy_tiles<P>(a, ring);
    __syncwarp();
  } else {
    take_registers<232>();
    multiply_tiles<P>(a, ring, group - 1);
  }
  // others still arrive at barriers of this block, or copy into it
  if constexpr (P::CLUSTER > 1) meet_cluster<P::CLUSTER>();
#else
  // whoever started this did not look at the architectures that there is code for
  stop();
#endif
}

}  // namespace
}  // namespace vitfast
