#include "cuda/product.h"

#include "cuda/product_launch.cuh"

namespace vitfast {
namespace {

// numbers of `product_tiles()`
constexpr int SQUARE = 0, WIDE = 1;
constexpr int STAGES = 4, CLUSTER = 2;

template <class T>
cudaError_t product_in(const ProductArgs& args) {
  switch (args.tile) {
    case SQUARE: return multiply_with<ProductPlan<T, 128, 128, STAGES, CLUSTER>>(args);
    case WIDE: return multiply_with<ProductPlan<T, 64, 256, STAGES, CLUSTER>>(args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

std::vector<ProductTile> product_tiles() {
  return {{.rows = 128, .columns = 128, .stages = STAGES}, {.rows = 64, .columns = 256, .stages = STAGES}};
}

int product(const ProductArgs& args) {
  const OnDevice on(args.device);
  if (on.error != cudaSuccess) return on.error;
  if (args.dtype == DType::fp16) return product_in<Half>(args);
  if (args.dtype == DType::bf16) return product_in<Bf16>(args);
  return cudaErrorInvalidValue;
}

}  // namespace vitfast
