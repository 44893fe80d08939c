// Elementwise activations: GELU with erf and with tanh, quick GELU, SiLU.
#pragma once

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace {

using vitfast::Act;
using vitfast::DType;

template <class T>
constexpr bool ROUNDS_TO_BF16 = false;
template <>
constexpr bool ROUNDS_TO_BF16<Bf16> = true;

inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

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

// x Phi(x) for a result that is rounded to bf16, which is off by up to 4e-3 of itself: this by 1.1e-4 for x > -4, by
// 6e-4 at -11.7 (|x Phi(x)| = 7e-31), below which it is 0. For a >= 0 Phi(-a) is near p(a)^32, p of degree 6: five
// squarings in the place of an exponential. What the first three add makes it four times as exact at no further
// instruction. All ten numbers are a minimax fit of the relative error (Gauss-Newton with Lawson's weights, on
// Chebyshev nodes; five times less strict at the end than up to 4).
inline Floats gelu_for_bf16(Floats x) {
  const Floats a = magnitude(x);
  Floats p = splat(3.450648259e-07f);
  p = p * a + -1.700758869e-05f;
  p = p * a + 2.678817037e-04f;
  p = p * a + -9.498844998e-04f;
  p = p * a + -9.423476564e-03f;
  p = p * a + -2.459054790e-02f;
  p = p * a + 9.723160611e-01f;
  p = p * p + 1.225189439e-02f;
  p = p * p + -7.857309029e-05f;
  p = p * p + -2.960338247e-09f;
  p *= p;
  const Floats tail = a < 11.7f ? p * p : splat(0.0f);
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

// x / (1 + 2^t); far below zero nothing is left of x; of -inf NaN, as in torch
template <class T>
inline Floats over_1_plus_exp2(Floats x, Floats t) {
#if defined(__AVX512F__)
  // a reciprocal that is 6e-5 off at most, and 0 where the sum is infinite
  if constexpr (ROUNDS_TO_BF16<T>) return x * (Floats)_mm512_rcp14_ps((__m512)(exp2_for_bf16(t) + 1.0f));
#endif
  const Floats inside = t > 126.0f ? splat(126.0f) : t;
  const Floats power = ROUNDS_TO_BF16<T> ? exp2_for_bf16(inside) : exp2_of(inside);
  return t > 126.0f ? x * 0.0f : x / (1.0f + power);
}

// for a result that is stored as T
template <Act act, class T>
inline Floats activate(Floats x) {
  const float log2_e = 1.44269504f;
  if constexpr (act == Act::gelu) return ROUNDS_TO_BF16<T> ? gelu_for_bf16(x) : gelu(x);
  // (1 + tanh(y)) / 2 = sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3)
  if constexpr (act == Act::gelu_tanh) {
    const float cube = 0.044715f, scale = -1.59576912f * log2_e;
    const Floats u = x * x;
    return over_1_plus_exp2<T>(x, ROUNDS_TO_BF16<T> ? x * (u * (cube * scale) + scale) : x * (u * cube + 1.0f) * scale);
  }
  if constexpr (act == Act::quick_gelu) return over_1_plus_exp2<T>(x, x * (-1.702f * log2_e));
  return over_1_plus_exp2<T>(x, x * -log2_e);
}

template <Act act, class T>
inline void activation_of(const void* x, void* y, int64_t n, int threads) {
  const int64_t chunk = 1 << 14;
  run_tasks((n + chunk - 1) / chunk, threads, [=](int64_t task, int) {
    const T* const from = (const T*)x;
    T* const to = (T*)y;
    const int64_t last = (task + 1) * chunk < n ? (task + 1) * chunk : n;
    int64_t i = task * chunk;
    for (; i + LANES <= last; i += LANES) store(to + i, activate<act, T>(load(from + i)));
    if (i < last) store_part(to + i, activate<act, T>(load_part(from + i, last - i)), last - i);
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
