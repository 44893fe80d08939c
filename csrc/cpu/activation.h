// Elementwise activations: GELU with erf and with tanh, quick GELU, SiLU.
#pragma once

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace {

using vitfast::Act;
using vitfast::DType;

// x Phi(x). Phi(x) = 1/2 + x p(x^2), p fitted by least squares on Chebyshev nodes (weight max(|x|, 2)) for |x| < 5.4,
// beyond which Phi is 0 or 1 to fp32's accuracy. On normal x of spread 0.1 to 10 the rms error is 0.7 to 1.1 times that
// of torch's erf.
inline Floats gelu(Floats x) {
  const float limit = 5.4f;
  const Floats high = x > limit ? splat(limit) : x, inside = high < -limit ? splat(-limit) : high;
  const Floats u = inside * inside * (2 / (limit * limit)) - 1.0f;
  Floats p = splat(4.237765970e-04f);
  p = p * u + -1.059757895e-03f;
  p = p * u + 7.868693210e-04f;
  p = p * u + -1.095387386e-03f;
  p = p * u + 3.752816701e-03f;
  p = p * u + -6.815334782e-03f;
  p = p * u + 9.605193511e-03f;
  p = p * u + -1.391159371e-02f;
  p = p * u + 1.965522021e-02f;
  p = p * u + -2.575914748e-02f;
  p = p * u + 3.211585060e-02f;
  p = p * u + -3.920552135e-02f;
  p = p * u + 4.849958420e-02f;
  p = p * u + -6.532809138e-02f;
  p = p * u + 1.309281141e-01f;
  const Floats phi = inside * p + 0.5f;
  return x * (x < -limit ? splat(0.0f) : phi);
}

// x / (1 + 2^-t)
inline Floats times_sigmoid2(Floats x, Floats t) {
  const Floats inside = t < -126.0f ? splat(126.0f) : -t;
  // far below zero nothing is left of x; of -inf NaN, as in torch
  return t < -126.0f ? x * 0.0f : x / (1.0f + exp2_of(inside));
}

template <Act act>
inline Floats activate(Floats x) {
  const float log2_e = 1.44269504f;
  if constexpr (act == Act::gelu) return gelu(x);
  // (1 + tanh(y)) / 2 = sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3)
  if constexpr (act == Act::gelu_tanh)
    return times_sigmoid2(x, x * (x * x * 0.044715f + 1.0f) * (1.59576912f * log2_e));
  if constexpr (act == Act::quick_gelu) return times_sigmoid2(x, x * (1.702f * log2_e));
  return times_sigmoid2(x, x * log2_e);
}

template <Act act, class T>
inline void activation_of(const void* x, void* y, int64_t n, int threads) {
  const int64_t chunk = 1 << 14;
  run_tasks((n + chunk - 1) / chunk, threads, [=](int64_t task, int) {
    const T* const from = (const T*)x;
    T* const to = (T*)y;
    const int64_t last = (task + 1) * chunk < n ? (task + 1) * chunk : n;
    int64_t i = task * chunk;
    for (; i + LANES <= last; i += LANES) store(to + i, activate<act>(load(from + i)));
    if (i < last) store_part(to + i, activate<act>(load_part(from + i, last - i)), last - i);
  });
}

template <Act act>
inline void activation_in(const void* x, void* y, int64_t n, DType dtype, int threads) {
  if (dtype == DType::fp32) return activation_of<act, float>(x, y, n, threads);
  if (dtype == DType::bf16) return activation_of<act, Bf16>(x, y, n, threads);
  activation_of<act, Fp16>(x, y, n, threads);
}

inline void activation(const void* x, void* y, int64_t n, DType dtype, Act act, int threads) {
  switch (act) {
    case Act::gelu: return activation_in<Act::gelu>(x, y, n, dtype, threads);
    case Act::gelu_tanh: return activation_in<Act::gelu_tanh>(x, y, n, dtype, threads);
    case Act::quick_gelu: return activation_in<Act::quick_gelu>(x, y, n, dtype, threads);
    case Act::silu: return activation_in<Act::silu>(x, y, n, dtype, threads);
  }
}

}  // namespace
