// What follows the sums of a product: a folded norm and an activation, in fp32. The same code on host and device.
#pragma once

#include "cuda/hopper.cuh"

namespace vitfast {
namespace {

enum class After { none, gelu, gelu_tanh };

// Phi by Abramowitz and Stegun 7.1.26, as vitfast/kernels/triton/activations.py has it.
VITFAST_BOTH float gelu(float x) {
  const float a = (x < 0 ? -x : x) * 0.7071067811865476f;
  const float t = reciprocal_about(1 + 0.3275911f * a);
  const float p =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * p * exp2_about(a * -1.4426950408889634f * a);
  return x * (x < 0 ? tail : 1 - tail);
}

VITFAST_BOTH float gelu_tanh(float x) {
  // beyond it the sigmoid is 0 or 1, and the cube of the largest numbers is infinite; NaN stays
  const float near = x > 16 ? 16 : x < -16 ? -16 : x;
  const float inner = (near + near * 0.044715f * near * near) * 1.5957691216057308f;
  return x * reciprocal_about(1 + exp2_about(inner * -1.4426950408889634f));
}

template <After after>
VITFAST_BOTH float followed(float x) {
  return after == After::gelu ? gelu(x) : after == After::gelu_tanh ? gelu_tanh(x) : x;
}

// of a row: a norm folded into the weight takes mean * column sum from a sum and multiplies with rstd
struct RowNorm {
  float mean, rstd;
};

VITFAST_BOTH float normed(float sum, RowNorm row, float column_sum, float bias) {
  return (sum - row.mean * column_sum) * row.rstd + bias;
}

// Of mean and sum of squared distances of `count` parts of `length` numbers each (Chan et al., "Updating formulae and a
// pairwise algorithm for computing sample variances"); `statistics` gives number i of part p.
template <class Statistics>
VITFAST_BOTH RowNorm put_together(int count, int length, bool centred, float eps, Statistics statistics) {
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
