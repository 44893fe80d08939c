// The CUDA kernels of patch embedding. No CUDA type in here, so that bindings.cpp needs no toolkit; sizes and strides
// in elements. Each call starts its kernels on args.stream of args.device, leaves the current device as it was, and
// returns a cudaError_t: 0, or why nothing was started.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shared/dtype.h"
#include "shared/patch_geometry.h"

namespace vitfast {

// Images [B, C, H, W] by geometry.image ..., or several of different sizes.
struct ImagesArgs {
  PatchGeometry geometry;  // of packed images C, ph, pw, P and order only
  const void* data;
  int64_t B;
  DType dtype;
  // [C], both or neither: a pixel becomes (x / 255 - mean) / std
  const float *mean, *std;
  std::vector<PackedImage> packed;  // empty: a batch
  const PackedImage* packed_on_device;
  int64_t patches;  // of all images
};

struct PatchEmbedArgs {
  ImagesArgs images;
  const void* weight;  // [D, C * ph * pw], contiguous, in `dtype`: fp32, bf16 or fp16
  const void* bias;    // [D], the same, or null
  int64_t D;
  DType dtype;
  // [N, D], contiguous, of a batch for each image the same; [patches, D] of packed images; or null
  const void* positions;
  DType positions_dtype;
  // [P, D], contiguous, or null; prefix_image apart for each image where that is not 0
  const void* prefix;
  int64_t prefix_image;
  const void* prefix_positions;  // [P, D] to add, in positions_dtype, or null
  DType prefix_dtype;
  void* tokens;        // [B, P + N, D] or [sum of P + N_i, D], contiguous
  DType tokens_dtype;  // `dtype` or fp32
  int tile;            // a number of `tiles()`
  int device;
  void* stream;
};

struct PatchRowsOnGpuArgs {
  ImagesArgs images;
  void* rows;   // [patches, C * ph * pw], contiguous
  DType dtype;  // fp32, bf16 or fp16
  int device;
  void* stream;
};

// The gradient of the projection's weight, in two kernels. The second adds up what the first leaves in `parts`.
struct WeightGradientArgs {
  ImagesArgs images;
  const void* grad;  // of the tokens, [B, P + N, D] or [sum of P + N_i, D], contiguous, in `dtype`: bf16 or fp16
  int64_t D;
  DType dtype;
  float* parts;  // [splits, D, C * ph * pw]
  int64_t splits;
  void* weight_grad;  // [D, C * ph * pw], contiguous, in `dtype`
  int device;
  void* stream;
};

// A way to cut the tokens [patches, D] into tiles of programs.
struct Tile {
  int rows, columns;
  bool wgmma;  // only in code for sm_90a, which in turn has no other tile of 128 rows
  bool fp32;   // for weights in fp32, others for half precision
};

std::vector<Tile> tiles();
int patch_embed(const PatchEmbedArgs& args);
int patch_rows_on_gpu(const PatchRowsOnGpuArgs& args);
int weight_gradient(const WeightGradientArgs& args);
std::string cuda_error_text(int error);

}  // namespace vitfast
