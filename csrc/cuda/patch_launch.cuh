// What has to be known before a kernel starts: the device, what may be read at once, whether it fits.
#pragma once

#include <cstdint>

#include "cuda/on_device.cuh"
#include "cuda/patch_embed.cuh"
#include "cuda/patch_embed.h"
#include "cuda/patch_gradient.cuh"
#include "cuda/patch_rows.cuh"

namespace vitfast {
namespace {

// Whether `side` pixels load together in all images; see loads_together.
inline bool all_load_together(const ImagesArgs& args, int64_t side, int64_t step) {
  const auto together = [&](const PatchGeometry& g, const void* data) {
    return loads_together(g, reinterpret_cast<uintptr_t>(data), bytes_of(args.dtype), side, step);
  };
  if (args.packed.empty()) return together(args.geometry, args.data);
  for (const PackedImage& image : args.packed)
    if (!together(geometry_of(args.geometry, image), image.data)) return false;
  return true;
}

inline Images images_of(const ImagesArgs& args) {
  Images images;
  images.g = args.geometry;
  images.data = static_cast<const char*>(args.packed.empty() ? args.data : args.packed[0].data);
  images.dtype = args.dtype;
  images.bytes = bytes_of(args.dtype);
  images.mean = args.mean, images.std = args.std;
  images.packed = args.packed.empty() ? nullptr : args.packed_on_device;
  images.count = args.packed.empty() ? args.B : static_cast<int64_t>(args.packed.size());
  images.patches = args.patches;
  images.K = static_cast<int>(columns(args.geometry));
  const bool chw = args.geometry.order == PatchOrder::chw;
  images.together = chw && all_load_together(args, 4, 1) ? 4 : chw && all_load_together(args, 2, 1) ? 2 : 1;
  return images;
}

// A program decodes columns in 32 bits, and a grid counts its programs in 31.
inline bool fits(const ImagesArgs& args, int64_t programs) {
  return columns(args.geometry) < (int64_t{1} << 29) && programs < (int64_t{1} << 31);
}

// How many bytes of the weight's rows may be copied at once.
inline int copied_bytes(const PatchEmbedArgs& args) {
  const int64_t row = columns(args.images.geometry) * bytes_of(args.dtype);
  for (int bytes : {16, 8, 4})
    if (row % bytes == 0 && aligned(args.weight, bytes)) return bytes;
  return 2;
}

inline bool reads_wide(const PatchEmbedArgs& args) {
  const bool all_aligned = aligned(args.bias, 16) && aligned(args.positions, 16) && aligned(args.prefix, 16) &&
                           aligned(args.prefix_positions, 16) && aligned(args.tokens, 16);
  return args.D % CHUNK == 0 && args.prefix_image % CHUNK == 0 && all_aligned;
}

inline Embedding embedding_of(const PatchEmbedArgs& args) {
  return {.images = images_of(args.images),
          .weight = static_cast<const char*>(args.weight),
          .copied = copied_bytes(args),
          .bias = args.bias,
          .D = args.D,
          .dtype = args.dtype,
          .positions = args.positions,
          .positions_dtype = args.positions_dtype,
          .prefix = args.prefix,
          .prefix_image = args.prefix_image,
          .prefix_positions = args.prefix_positions,
          .prefix_dtype = args.prefix_dtype,
          .tokens = args.tokens,
          .tokens_dtype = args.tokens_dtype,
          .tiles_across = 0,
          .wide = reads_wide(args)};
}

inline Rows rows_of(const PatchRowsOnGpuArgs& args) {
  const int64_t K = columns(args.images.geometry);
  return {.images = images_of(args.images),
          .rows = args.rows,
          .wide = K % CHUNK == 0 && aligned(args.rows, 16),
          .chunks = (K + CHUNK - 1) / CHUNK};
}

inline Gradient gradient_of(const WeightGradientArgs& args) {
  const int64_t steps = (args.images.patches + PATCHES_OF_STEP - 1) / PATCHES_OF_STEP;
  return {.images = images_of(args.images),
          .grad = static_cast<const char*>(args.grad),
          .D = args.D,
          .wide = args.D % CHUNK == 0 && aligned(args.grad, 16),
          .parts = args.parts,
          .steps = (steps + args.splits - 1) / args.splits,
          .tiles_down = 0,
          .tiles_across = 0};
}

template <class T, class Pixels>
cudaError_t gradient_with(const WeightGradientArgs& args, Gradient a) {
  using P = GradientPlan<T, Pixels>;
  a.tiles_down = (a.D + GRAD_CHUNKS * CHUNK - 1) / (GRAD_CHUNKS * CHUNK);
  a.tiles_across = (a.images.K + P::CHUNKS * CHUNK - 1) / (P::CHUNKS * CHUNK);
  const int64_t programs = a.tiles_down * a.tiles_across * args.splits, count = a.D * a.images.K;
  const int64_t blocks = (count + SUM_THREADS - 1) / SUM_THREADS;
  if (args.splits < 1 || !fits(args.images, programs) || !fits(args.images, blocks)) return cudaErrorInvalidValue;
  const int shared = P::SHARED + static_cast<int>(a.images.g.C) * P::OF_CHANNEL;
  const cudaError_t error = start(sum_weight_gradient<T, Pixels>, programs, GRADIENT_THREADS, shared, args.stream, a);
  if (error != cudaSuccess) return error;
  return start(add_parts<T>, blocks, SUM_THREADS, 0, args.stream,
               Parts{.parts = args.parts, .splits = args.splits, .count = count, .sum = args.weight_grad});
}

template <class Product, class Pixels>
cudaError_t embed_with(const PatchEmbedArgs& args, Embedding a) {
  const int64_t down = (a.images.patches + Product::ROWS - 1) / Product::ROWS;
  a.tiles_across = (a.D + Product::COLUMNS - 1) / Product::COLUMNS;
  if (!fits(args.images, down * a.tiles_across)) return cudaErrorInvalidValue;
  using P = Plan<Product, Pixels>;
  const int shared = P::SHARED + static_cast<int>(a.images.g.C) * P::OF_CHANNEL;
  return start(embed_patches<Product, Pixels>, down * a.tiles_across, Product::THREADS, shared, args.stream, a);
}

}  // namespace
}  // namespace vitfast
