// (x - mean) * rstd * weight + bias over rows; statistics in fp32, the variance from the differences.
#pragma once

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace {

using vitfast::LayerNormArgs;

template <class T>
class LayerNorm {
 public:
  explicit LayerNorm(const LayerNormArgs& args) : a(args), whole(args.D / LANES * LANES) {}

  void run() const {
    const int64_t chunk = 16;
    run_tasks((a.rows + chunk - 1) / chunk, a.threads, [&](int64_t task, int) {
      const int64_t last = (task + 1) * chunk < a.rows ? (task + 1) * chunk : a.rows;
      for (int64_t row = task * chunk; row < last; ++row) run_row((const T*)a.x + row * a.D, (T*)a.y + row * a.D);
    });
  }

  void run_row(const T* x, T* y) const {
    const float mean = sum(x, [](Floats v) { return v; }) / a.D;
    const float variance = sum(x, [mean](Floats v) { return (v - mean) * (v - mean); }) / a.D;
    const float rstd = 1 / sqrtf(variance + a.eps);
    const T *const weight = (const T*)a.weight, *const bias = (const T*)a.bias;
    for (int64_t i = 0; i < whole; i += LANES) {
      Floats v = (load(x + i) - mean) * rstd;
      if (weight) v = v * load(weight + i);
      if (bias) v = v + load(bias + i);
      store(y + i, v);
    }
    if (whole == a.D) return;
    const int64_t n = a.D - whole;
    Floats v = (load_part(x + whole, n) - mean) * rstd;
    if (weight) v = v * load_part(weight + whole, n);
    if (bias) v = v + load_part(bias + whole, n);
    store_part(y + whole, v, n);
  }

 private:
  // two sums at a time: one would wait for itself
  template <class Term>
  float sum(const T* x, const Term& term) const {
    Floats even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= whole; i += 2 * LANES) {
      even += term(load(x + i));
      odd += term(load(x + i + LANES));
    }
    if (i < whole) even += term(load(x + i));
    float total = sum_of(even + odd);
    if (whole < a.D) {
      const Floats rest = term(load_part(x + whole, a.D - whole));
      for (int64_t j = 0; j < a.D - whole; ++j) total += rest[j];
    }
    return total;
  }

  const LayerNormArgs& a;
  const int64_t whole;
};

inline void layer_norm(const LayerNormArgs& args) {
  if (args.dtype == DType::fp32) return LayerNorm<float>(args).run();
  if (args.dtype == DType::bf16) return LayerNorm<Bf16>(args).run();
  LayerNorm<Fp16>(args).run();
}

}  // namespace
