#include "cuda/patch_embed.h"

#include "cuda/patch_embed.cuh"
#include "cuda/patch_gradient.cuh"
#include "cuda/patch_launch.cuh"
#include "cuda/patch_rows.cuh"

namespace vitfast {
namespace {

// numbers of `tiles()`
constexpr int TILE_128 = 0, TILE_64 = 1, TILE_32 = 2, WGMMA_256 = 3, FLOAT_64 = 4;

template <class From, class Product>
cudaError_t embed_from(const PatchEmbedArgs& args, const Embedding& a) {
  using T = typename Product::T;
  if (a.images.K % CHUNK == 0 && a.images.g.order == PatchOrder::chw) {
    if (all_load_together(args.images, SIDE<From>, 1))
      return embed_with<Product, PlanarPixels<From, T, Product::ROWS, Product::THREADS>>(args, a);
    if constexpr (sizeof(From) < 4)
      if (a.images.g.C == 3 && all_load_together(args.images, SIDE<From>, 3))
        return embed_with<Product, InterleavedPixels<From, T, Product::ROWS, Product::THREADS>>(args, a);
  }
  return embed_with<Product, ScatteredPixels<T, Product::ROWS, Product::THREADS>>(args, a);
}

template <class Product>
cudaError_t embed_by(const PatchEmbedArgs& args, const Embedding& a) {
  using T = typename Product::T;
  if (a.images.dtype == DType::uint8) return embed_from<uint8_t, Product>(args, a);
  if (a.images.dtype == a.dtype) return embed_from<T, Product>(args, a);
  if (a.images.dtype == DType::fp32) return embed_from<float, Product>(args, a);
  return embed_with<Product, ScatteredPixels<T, Product::ROWS, Product::THREADS>>(args, a);
}

template <class T>
cudaError_t embed_half(const PatchEmbedArgs& args, const Embedding& a) {
  switch (args.tile) {
    case TILE_128: return embed_by<WarpProduct<T, 128, 128, 2, 4>>(args, a);
    case TILE_64: return embed_by<WarpProduct<T, 64, 64, 2, 2>>(args, a);
    case TILE_32: return embed_by<WarpProduct<T, 32, 64, 2, 2>>(args, a);
    case WGMMA_256: return embed_by<GroupProduct<T>>(args, a);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t gradient_by(const WeightGradientArgs& args) {
  const Gradient a = gradient_of(args);
  constexpr int ROWS = PATCHES_OF_STEP, THREADS = GRADIENT_THREADS;
  const bool chw = a.images.K % CHUNK == 0 && a.images.g.order == PatchOrder::chw;
  if (a.images.dtype == DType::uint8 && chw) {
    if (all_load_together(args.images, SIDE<uint8_t>, 1))
      return gradient_with<T, PlanarPixels<uint8_t, T, ROWS, THREADS>>(args, a);
    if (a.images.g.C == 3 && all_load_together(args.images, SIDE<uint8_t>, 3))
      return gradient_with<T, InterleavedPixels<uint8_t, T, ROWS, THREADS>>(args, a);
  }
  if (a.images.dtype == args.dtype && chw && all_load_together(args.images, SIDE<T>, 1))
    return gradient_with<T, PlanarPixels<T, T, ROWS, THREADS>>(args, a);
  return gradient_with<T, ScatteredPixels<T, ROWS, THREADS>>(args, a);
}

}  // namespace

std::vector<Tile> tiles() {
  return {{.rows = 128, .columns = 128, .wgmma = false, .fp32 = false},
          {.rows = 64, .columns = 64, .wgmma = false, .fp32 = false},
          {.rows = 32, .columns = 64, .wgmma = false, .fp32 = false},
          {.rows = 128, .columns = 256, .wgmma = true, .fp32 = false},
          {.rows = 64, .columns = 64, .wgmma = false, .fp32 = true}};
}

int patch_embed(const PatchEmbedArgs& args) {
  const OnDevice on(args.device);
  if (on.error != cudaSuccess) return on.error;
  const Embedding a = embedding_of(args);
  if (args.dtype == DType::fp16) return embed_half<Half>(args, a);
  if (args.dtype == DType::bf16) return embed_half<Bf16>(args, a);
  if (args.tile != FLOAT_64) return cudaErrorInvalidValue;
  return embed_with<FloatProduct, ScatteredPixels<float, FloatProduct::ROWS, FloatProduct::THREADS>>(args, a);
}

int patch_rows_on_gpu(const PatchRowsOnGpuArgs& args) {
  const OnDevice on(args.device);
  if (on.error != cudaSuccess) return on.error;
  const Rows a = rows_of(args);
  const int64_t blocks = (args.images.patches + PATCHES_OF_BLOCK - 1) / PATCHES_OF_BLOCK;
  if (!fits(args.images, blocks)) return cudaErrorInvalidValue;
  const int shared = sizeof(TileRows<PATCHES_OF_BLOCK>) + static_cast<int>(args.images.geometry.C) * 8;
  if (args.dtype == DType::fp16) return start(write_patch_rows<Half>, blocks, ROWS_THREADS, shared, args.stream, a);
  if (args.dtype == DType::bf16) return start(write_patch_rows<Bf16>, blocks, ROWS_THREADS, shared, args.stream, a);
  return start(write_patch_rows<float>, blocks, ROWS_THREADS, shared, args.stream, a);
}

int weight_gradient(const WeightGradientArgs& args) {
  const OnDevice on(args.device);
  if (on.error != cudaSuccess) return on.error;
  if (args.dtype == DType::fp16) return gradient_by<Half>(args);
  if (args.dtype == DType::bf16) return gradient_by<Bf16>(args);
  return cudaErrorInvalidValue;
}

std::string cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace vitfast
