// The kernels for the CPU, and one table of them for each instruction set. Raw pointers, sizes and strides in elements;
// nothing is checked here, bindings.cpp and the Python side do that.
#pragma once

#include <cstdint>

#include "shared/dtype.h"
#include "shared/patch_geometry.h"

namespace vitfast {

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
  void* rows;          // [B, P + N, C * ph * pw], contiguous
  const float* scale;  // [C]: uint8 pixels become x * scale + shift; null: they become floats
  const float* shift;
  int64_t B;
  DType from, to;  // to is fp32, bf16 or fp16
  int threads;
};

struct LayerNormArgs {
  const void* x;              // [rows, D], contiguous
  void* y;                    // the same, may be x
  const void *weight, *bias;  // [D] or null
  int64_t rows, D;
  float eps;
  DType dtype;  // fp32, bf16 or fp16, of all of them
  int threads;
};

struct PackedWeight {
  const void* cells;  // what pack_weight made, or of linear_unpacked the weight itself
  const float* bias;  // [D], zeros up to a multiple of MAX_LANES behind it, or null
  int64_t K, D;       // K even for bf16 by vectors
};

constexpr int NO_ACT = -1;

struct LinearArgs {
  const void* x;       // [rows, K], contiguous
  LayerNormArgs norm;  // of x: weight, bias, D and eps of it, if it
  bool normalises;
  PackedWeight weight;
  const void* residual;  // [residual_rows, D], contiguous, or null; begins again after its last row
  int64_t residual_rows;
  void* out;  // [rows, D], contiguous; may be the residual
  int64_t rows;
  DType dtype;       // fp32 or bf16, of all but the bias
  int act = NO_ACT;  // an Act or NO_ACT
  int threads;
};

struct MlpArgs {
  const void* x;  // [rows, K], contiguous
  LayerNormArgs norm;
  PackedWeight fc1, fc2;
  void* out;  // [rows, K], may be x
  int64_t rows;
  DType dtype;
  int act, threads;
};

struct BlockArgs {
  const void* x;  // [B, N, C], contiguous
  LayerNormArgs norm1, norm2;
  PackedWeight qkv, proj, fc1, fc2;
  void* out;  // [B, N, C]
  int64_t B, N, H, D;
  float scale;
  DType dtype;
  int act, threads;
};

struct EmbedArgs {
  PatchRowsArgs patches;  // to fp32 or bf16; its rows are not looked at
  PackedWeight weight;    // of the projection
  const void* positions;  // [P + N, D], or null; those of prefix tokens are not looked at
  const void* prefix;     // [P, D]
  void* tokens;           // [B, P + N, D]
};

struct PackWeightArgs {
  const void* weight;  // [D, K], contiguous
  void* packed;        // of packed_bytes
  int64_t D, K;
  DType dtype;
};

// of any instruction set
constexpr int64_t MAX_LANES = 16;

struct CpuKernels {
  const char* name;
  // softmax(scale q k^T) v; logits, softmax and sums in fp32
  void (*attention)(const AttentionArgs&);
  // y = act(x) over n numbers of fp32, bf16 or fp16; y may be x
  void (*activation)(const void* x, void* y, int64_t n, DType dtype, Act act, int threads);
  void (*layer_norm)(const LayerNormArgs&);
  // residual + act(norm(x) weight^T + bias), sums in fp32, rounded once
  void (*linear)(const LinearArgs&);
  // the same of a weight [D, K] that is not packed, if it `takes_unpacked`, or null where none is; out is not the
  // residual
  void (*linear_unpacked)(const LinearArgs&);
  bool (*takes_unpacked)(int64_t D, int64_t K, DType dtype);
  // x + fc2(act(fc1(norm(x))))
  void (*mlp)(const MlpArgs&);
  int64_t (*packed_bytes)(int64_t D, int64_t K, DType dtype);
  void (*pack_weight)(const PackWeightArgs&);
  // a transformer block: y = x + proj(attention(qkv(norm1(x)))), out = y + fc2(act(fc1(norm2(y))))
  void (*block)(const BlockArgs&);
  // images -> tokens: prefix, and pixels weight^T + bias + positions
  void (*embed)(const EmbedArgs&);
  bool (*multiplies)(DType dtype);  // whether linear and mlp take it
  // images -> rows of pixels, see patch_geometry.h; zeros for prefix tokens and in the padding
  void (*patch_rows)(const PatchRowsArgs&);
};

extern const CpuKernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx_bf16;
// bf16 as kernels_amx_bf16, in C++ that any CPU runs
extern const CpuKernels kernels_plain_tiles;

}  // namespace vitfast
