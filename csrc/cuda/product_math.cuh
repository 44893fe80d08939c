// What follows the sums of a product: a folded norm and an activation, in fp32. The same code on host and device.
#pragma once

#include "cuda/hopper.cuh"

namespace vitfast {
namespace {

enum class After { none, gelu, gelu_tanh };

// max(x, 0) - a Phi(-a) with a = |x|: log2(Phi(-a)) is a polynomial, as for results in half precision in
// vitfast/kernels/triton/activations.py.
__device__ __forceinline__ float gelu(float x) {
  // finite where the tail is 0
  const float least = smaller(x, 16), a = least < 0 ? -least : least;
  const float p = a * (a * (a * (a * -0.000488101621f + 0.00719871512f) - 0.0521466248f) - 0.459595859f) - 1.1510005f;
  return fmaxf(x, 0) - a * exp2_about(a * p - 1);
}

__device__ __forceinline__ float gelu_tanh(float x) {
  // beyond it the sigmoid is 0 or 1, and the cube of the largest numbers is infinite
  const float near = -smaller(-smaller(x, 16), 16);
  const float inner = (near + near * 0.044715f * near * near) * 1.5957691216057308f;
  return x * reciprocal_about(1 + exp2_about(inner * -1.4426950408889634f));
}

template <After after>
__device__ __forceinline__ float followed(float x) {
  return after == After::gelu ? gelu(x) : after == After::gelu_tanh ? gelu_tanh(x) : x;
}

// of a row: a norm folded into the weight takes mean * column sum from a sum and multiplies with rstd
struct RowNorm {
  float mean, rstd;
};

__device__ __forceinline__ float normed(float sum, RowNorm row, float column_sum, float bias) {
  return (sum - row.mean * column_sum) * row.rstd + bias;
}

// Of mean and sum of squared distances of `count` parts of `length` numbers each (Chan et al., "Updating formulae and a
// pairwise algorithm for computing sample variances"); `statistics` gives number i of part p.
template <class Statistics>
__device__ __forceinline__ RowNorm put_together(int count, int length, bool centred, float eps, Statistics statistics) {
  float mean = 0, squares = 0;
#pragma unroll 4
  for (int p = 0; p < count; ++p) mean += statistics(p, 0);
  mean /= static_cast<float>(count);
#pragma unroll 4
  for (int p = 0; p < count; ++p) {
    const float mean_of_part = statistics(p, 0), away = centred ? mean_of_part - mean : mean_of_part;
    squares += statistics(p, 1) + static_cast<float>(length) * away * away;
  }
  const float variance = squares / (static_cast<float>(count) * static_cast<float>(length));
  return {centred ? mean : 0, 1 / sqrtf(variance + eps)};
}

}  // namespace
}  // namespace vitfast
