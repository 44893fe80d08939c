// What has to be known before a product starts: the device, and whether bulk copies take its matrices.
#pragma once

#include "cuda/on_device.cuh"
#include "cuda/product.cuh"
#include "cuda/product.h"

namespace vitfast {
namespace {

template <class P>
cudaError_t multiply_with(const ProductArgs& args) {
  const int64_t bytes = 2, down = (args.M + P::ROWS * P::CLUSTER - 1) / (P::ROWS * P::CLUSTER);
  const int64_t across = (args.N + P::COLUMNS - 1) / P::COLUMNS, steps = (args.K + P::DEPTH - 1) / P::DEPTH;
  constexpr int64_t MOST = int64_t{1} << 31;
  const bool takes = aligned(args.x, 16) && aligned(args.weight, 16) && aligned(args.out, 16) &&
                     aligned(args.column_sums, 8) && aligned(args.bias, 8) && args.x_row % 8 == 0 &&
                     args.weight_row % 8 == 0 && args.x_row >= args.K && args.weight_row >= args.K && args.N % 8 == 0;
  // rows of a box are counted in 31 bits, and so is what a block takes
  if (!takes || args.M < 1 || args.N < 1 || args.K < 1 || args.M >= MOST - 2 * P::ROWS * P::CLUSTER ||
      args.N >= MOST - P::COLUMNS || args.K >= MOST - P::DEPTH || args.pieces >= MOST)
    return cudaErrorInvalidValue;
  if (args.column_sums && !args.rstd && (!args.mean || args.pieces < 1 || args.K % args.pieces))
    return cudaErrorInvalidValue;
  if (args.act < 0 || args.act > static_cast<int>(After::gelu_tanh)) return cudaErrorInvalidValue;
  Multiplication a{.x = {},
                   .weight = {},
                   .M = args.M,
                   .N = static_cast<int>(args.N),
                   .steps = static_cast<int>(steps),
                   .tiles_across = static_cast<int>(across),
                   .tiles = down * across,
                   .column_sums = args.column_sums,
                   .bias = args.bias,
                   .mean = args.mean,
                   .rstd = args.rstd,
                   .pieces = static_cast<int>(args.pieces),
                   .piece = args.pieces ? static_cast<int>(args.K / args.pieces) : 0,
                   .centred = args.centred,
                   .eps = args.eps,
                   .out = static_cast<char*>(args.out),
                   .after = static_cast<After>(args.act)};
  const bool bf16 = args.dtype == DType::bf16;
  if (const cudaError_t error = describe(&a.x, args.x, bf16, args.M, args.K, args.x_row * bytes, P::ROWS)) return error;
  if (const cudaError_t error =
          describe(&a.weight, args.weight, bf16, args.N, args.K, args.weight_row * bytes, P::COLUMNS / P::CLUSTER))
    return error;
  int multiprocessors = 0;
  if (const cudaError_t error = multiprocessors_of(args.device, &multiprocessors)) return error;
  const int64_t room = multiprocessors / P::CLUSTER, clusters = a.tiles < room ? a.tiles : room;
  if (clusters < 1) return cudaErrorInvalidValue;
  return start_clusters(multiply_by_turns<P>, P::CLUSTER, clusters * P::CLUSTER, P::THREADS, P::SHARED, args.stream, a);
}

}  // namespace
}  // namespace vitfast
