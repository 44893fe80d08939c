// The kernels for the CPU, and one table of them for each instruction set. Raw pointers, sizes and strides in elements;
// nothing is checked here, bindings.cpp and the Python side do that.
#pragma once

#include <cstdint>

#include "patch_geometry.h"

namespace vitfast {

enum class DType { fp32, bf16, fp16, uint8 };

enum class Act { gelu, gelu_tanh, quick_gelu, silu };

struct HeadsView {  // [B, N, H, D] with D side by side
  const void* data;
  int64_t image, token, head;  // strides
};

struct AttentionArgs {
  HeadsView q, k, v;
  void* out;   // [B, Nq, H, D], contiguous
  float* lse;  // [B, H, Nq] or null
  int64_t B, H, Nq, Nk, D;
  float scale;
  DType dtype;  // fp32, bf16 or fp16, of all of them
  int threads;
};

struct PatchRowsArgs {
  PatchGeometry geometry;
  const void* images;
  void* rows;           // [B, P + N, C * ph * pw], contiguous
  const float* scale;   // [C]: uint8 pixels become x * scale + shift; null: they become floats
  const float* shift;
  int64_t B;
  DType from, to;  // to is fp32, bf16 or fp16
  int threads;
};

struct LayerNormArgs {
  const void* x;                  // [rows, D], contiguous
  void* y;                        // the same, may be x
  const void *weight, *bias;      // [D] or null
  int64_t rows, D;
  float eps;
  DType dtype;  // fp32, bf16 or fp16, of all of them
  int threads;
};

struct CpuKernels {
  const char* name;
  // softmax(scale q k^T) v; logits, softmax and sums in fp32
  void (*attention)(const AttentionArgs&);
  // y = act(x) over n numbers of fp32, bf16 or fp16; y may be x
  void (*activation)(const void* x, void* y, int64_t n, DType dtype, Act act, int threads);
  void (*layer_norm)(const LayerNormArgs&);
  // images -> rows of pixels, see patch_geometry.h; zeros for prefix tokens and in the padding
  void (*patch_rows)(const PatchRowsArgs&);
};

extern const CpuKernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

}  // namespace vitfast
