// The product of a layer whose norm is folded into its weight. No CUDA type in here, so that bindings.cpp needs no
// toolkit; sizes and strides in elements. The call starts its kernel on args.stream of args.device, leaves the current
// device as it was, and returns a cudaError_t: 0, or why nothing was started.
#pragma once

#include <cstdint>
#include <vector>

#include "shared/dtype.h"

namespace vitfast {

// out = act(rstd * (x weight^T - mean * column_sums) + bias)
struct ProductArgs {
  const void* x;  // [M, K], rows x_row apart, in `dtype`: bf16 or fp16
  int64_t M, K, x_row;
  const void* weight;  // [N, K], rows weight_row apart, in `dtype`
  int64_t N, weight_row;
  // fp32 [N]; without column sums there is no norm
  const float *column_sums, *bias;
  // fp32 [M] each, without a mean an RMS norm; or, without rstd, in the place of mean statistics of `pieces` equal
  // parts of each row, fp32 [pieces, 2, M]: mean and sum of squared distances from it
  const float *mean, *rstd;
  int64_t pieces;
  bool centred;  // of pieces: whether the norm takes the mean away
  float eps;     // added to the variance of pieces
  void* out;     // [M, N], contiguous, in `dtype`
  DType dtype;
  int act;   // 0 none, 1 GELU, 2 GELU by tanh
  int tile;  // a number of `product_tiles()`
  int device;
  void* stream;
};

// What a group of four warps computes at a time, of two that take turns with the tensor cores.
struct ProductTile {
  int rows, columns, stages;
};

std::vector<ProductTile> product_tiles();
int product(const ProductArgs& args);

}  // namespace vitfast
