// One vector type for every instruction set: GCC's and clang's vector extensions, as wide as this translation unit is
// compiled for. kernels.cpp includes this once per instruction set; everything is in an unnamed namespace and no
// template of the standard library is used, because the linker would merge their AVX-512 code into the portable one.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <class Vector>
inline Vector load_bits(const void* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class Vector>
inline void store_bits(void* to, Vector v) {
  memcpy(to, &v, sizeof v);
}

// Written out: compilers make one broadcast of it. `Floats{} + x` would change a -0 and the bits of a pair of bf16.
inline Floats splat(float x) {
#if defined(__AVX512F__)
  return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return Floats{x, x, x, x, x, x, x, x};
#else
  return Floats{x, x, x, x};
#endif
}
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// a * b, rounded: never in one step with what is added to it.
inline Floats rounded_product(Floats a, Floats b) {
  Floats product = a * b;
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

inline float sum_of(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += v[i];
  return sum;
}
inline float largest_of(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float most = v[0];
  for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

inline Words widen(Halves h) { return __builtin_convertvector(h, Words); }
inline Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }

inline Floats load(const float* from) { return load_bits<Floats>(from); }
inline Floats load(const Bf16* from) { return (Floats)(widen(load_bits<Halves>(from)) << 16); }
// By hand where there is an instruction: GCC 12 makes a chain of shuffles of the conversion, three times as slow.
inline Floats load(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bits<__m128i>(from)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return __builtin_convertvector(__builtin_convertvector(load_bits<Bytes>(from), Ints), Floats);
#endif
}
inline Floats load(const Fp16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load_bits<__m256i>(from));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  const Words h = widen(load_bits<Halves>(from));
  // the exponent's bias grows by 112; a multiplication does that for denormals too
  const Floats magnitude = (Floats)((h & 0x7fff) << 13) * 0x1p112f;
  const Words infinite = (Words)((h & 0x7c00) == 0x7c00) & 0x7f800000u;
  return (Floats)((Words)magnitude | infinite | ((h & 0x8000) << 16));
#endif
}

inline void store(float* to, Floats x) { store_bits(to, x); }
inline void store(Bf16* to, Floats x) {
#if defined(__AVX512BF16__)
  store_bits(to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const Words u = (Words)x;
  const Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  store_bits(to, narrow((Words)(x == x) ? rounded : (Words)((u >> 16) | 0x40)));
#endif
}
inline void store(Fp16* to, Floats x) {
#if defined(__AVX512F__)
  store_bits(to, (__m256i)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store_bits(to, (__m128i)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const Words u = (Words)x & 0x7fffffff, sign = ((Words)x >> 16) & 0x8000;
  const Words normal = (u + 0xfff + ((u >> 13) & 1) - (112u << 23)) >> 13;
  // near 0.5 floats are as far apart as half's denormals, so the addition rounds as they do
  const Words small = (Words)((Floats)u + 0.5f) - 0x3f000000u;
  Words h = (Words)((Floats)u < 0x1p-14f) ? small : normal;
  h = (Words)((Floats)u >= 65520.0f) ? Words{} + 0x7c00u : h;
  h = (Words)(x == x) ? h : Words{} + 0x7e00u;
  store_bits(to, narrow(h | sign));
#endif
}

// The same for one number; a loop's last few elements go through a vector, so that they get the same bits.
template <class T>
inline Floats load_part(const T* from, int64_t n) {
  T padded[LANES] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = from[i];
  return load(padded);
}
template <class T>
inline void store_part(T* to, Floats x, int64_t n) {
  T padded[LANES];
  store(padded, x);
  for (int64_t i = 0; i < n; ++i) to[i] = padded[i];
}
template <class T>
inline float to_float(T x) {
  return load_part(&x, 1)[0];
}
inline float to_float(float x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(Bf16 x) {
  const uint32_t u = uint32_t{x.bits} << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// rows[i][j] -> rows[j][i]
inline void transpose(Floats (&rows)[LANES]) {
#if defined(__clang__)
  Floats old[LANES];
  for (int i = 0; i < LANES; ++i) old[i] = rows[i];
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j) rows[i][j] = old[j][i];
#else
  // swap the off-diagonal quarters of squares of 2, 4, ... rows
#pragma GCC unroll 4
  for (int half = 1; half < LANES; half *= 2) {
    Ints upper, lower;
    for (int lane = 0; lane < LANES; ++lane) {
      upper[lane] = lane & half ? LANES + lane - half : lane;
      lower[lane] = lane & half ? LANES + lane : lane + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & half) continue;
      const Floats a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + half] = __builtin_shuffle(a, b, lower);
    }
  }
#endif
}

// 2^x for x <= 126 from 2^f = polynomial(f), |f| <= 1/2; below -126 it may be 0. With AVX-512 for all x: scalef makes
// infinity and 0 of f = inf - inf too.
template <class Polynomial>
inline Floats exp2_by(Floats x, const Polynomial& polynomial) {
#if defined(__AVX512F__)
  const Floats rounded = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = x - rounded;
#else
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
  const Floats shifted = x + magic, f = x - (shifted - magic);
#endif
  const Floats p = polynomial(f);
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)rounded);
#else
  const Words power = ((Words)shifted << 23) + 0x3f800000u;
  return x < -126.0f ? splat(0.0f) : p * (Floats)power;
#endif
}

// Relative error below 1e-7 (least squares on Chebyshev nodes); exact for x = 0.
inline Floats exp2_of(Floats x) {
  return exp2_by(x, [](Floats f) {
    Floats p = splat(1.53375775e-4f);
    p = p * f + 1.33998599e-3f;
    p = p * f + 9.61851981e-3f;
    p = p * f + 5.55032901e-2f;
    p = p * f + 2.40226462e-1f;
    p = p * f + 6.93147182e-1f;
    return p * f + 1.0f;
  });
}

// Relative error below 2.6e-6 (minimax): a thousandth of what rounding to bf16 adds.
inline Floats exp2_for_bf16(Floats x) {
  return exp2_by(x, [](Floats f) {
    Floats p = splat(9.570100018e-3f);
    p = p * f + 5.591786017e-2f;
    p = p * f + 2.402474487e-1f;
    p = p * f + 6.931218148e-1f;
    return p * f + 9.999992614e-1f;
  });
}

}  // namespace
