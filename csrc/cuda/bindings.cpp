// Python's view of the kernels for GPUs; vitfast/kernels/cuda is the only caller and checks what it gives.
#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cuda/patch_embed.h"
#include "cuda/product.h"

namespace py = pybind11;
using namespace vitfast;

namespace {

// data, first, H, W, strides of channel, y, x
using PackedImageGiven = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// data, [B, C, H, W], strides, patch, P, order, dtype, mean, std, patches, packed images, and these on the device
using ImagesGiven =
    std::tuple<uintptr_t, std::array<int64_t, 4>, std::array<int64_t, 4>, std::array<int64_t, 2>, int64_t, int, int,
               uintptr_t, uintptr_t, int64_t, std::vector<PackedImageGiven>, uintptr_t>;
using Tensor = std::tuple<uintptr_t, int>;  // address, dtype
using Place = std::tuple<int, uintptr_t>;   // device, stream

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

ImagesArgs images_of(const ImagesGiven& given) {
  const auto& [data, shape, strides, patch, P, order, dtype, mean, std, patches, packed, on_device] = given;
  ImagesArgs args{.geometry = patch_geometry(shape, strides, patch, P, order),
                  .data = pointer(data),
                  .B = shape[0],
                  .dtype = static_cast<DType>(dtype),
                  .mean = static_cast<const float*>(pointer(mean)),
                  .std = static_cast<const float*>(pointer(std)),
                  .packed = {},
                  .packed_on_device = static_cast<const PackedImage*>(pointer(on_device)),
                  .patches = patches};
  for (const auto& [image, first, H, W, channel, y, x] : packed)
    args.packed.push_back({.data = pointer(image), .first = first, .H = H, .W = W, .channel = channel, .y = y, .x = x});
  return args;
}

int embed(const ImagesGiven& images, const Tensor& weight, uintptr_t bias, int64_t D, const Tensor& positions,
          const Tensor& prefix, int64_t prefix_image, uintptr_t prefix_positions, const Tensor& tokens, int tile,
          const Place& place) {
  const auto& [weight_data, weight_dtype] = weight;
  const auto& [positions_data, positions_dtype] = positions;
  const auto& [prefix_data, prefix_dtype] = prefix;
  const auto& [tokens_data, tokens_dtype] = tokens;
  const auto& [device, stream] = place;
  const PatchEmbedArgs args{.images = images_of(images),
                            .weight = pointer(weight_data),
                            .bias = pointer(bias),
                            .D = D,
                            .dtype = static_cast<DType>(weight_dtype),
                            .positions = pointer(positions_data),
                            .positions_dtype = static_cast<DType>(positions_dtype),
                            .prefix = pointer(prefix_data),
                            .prefix_image = prefix_image,
                            .prefix_positions = pointer(prefix_positions),
                            .prefix_dtype = static_cast<DType>(prefix_dtype),
                            .tokens = pointer(tokens_data),
                            .tokens_dtype = static_cast<DType>(tokens_dtype),
                            .tile = tile,
                            .device = device,
                            .stream = pointer(stream)};
  py::gil_scoped_release release;
  return patch_embed(args);
}

int rows(const ImagesGiven& images, const Tensor& out, const Place& place) {
  const auto& [data, dtype] = out;
  const auto& [device, stream] = place;
  const PatchRowsOnGpuArgs args{.images = images_of(images),
                                .rows = pointer(data),
                                .dtype = static_cast<DType>(dtype),
                                .device = device,
                                .stream = pointer(stream)};
  py::gil_scoped_release release;
  return patch_rows_on_gpu(args);
}

int gradient(const ImagesGiven& images, const Tensor& grad, int64_t D, uintptr_t parts, int64_t splits,
             uintptr_t weight_grad, const Place& place) {
  const auto& [data, dtype] = grad;
  const auto& [device, stream] = place;
  const WeightGradientArgs args{.images = images_of(images),
                                .grad = pointer(data),
                                .D = D,
                                .dtype = static_cast<DType>(dtype),
                                .parts = static_cast<float*>(pointer(parts)),
                                .splits = splits,
                                .weight_grad = pointer(weight_grad),
                                .device = device,
                                .stream = pointer(stream)};
  py::gil_scoped_release release;
  return weight_gradient(args);
}

using Matrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, rows, columns, stride of rows
// column sums, mean or pieces, rstd, count of pieces, whether the norm takes the mean away, eps
using FoldedNorm = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, bool, float>;

int multiply(const Matrix& x, const Matrix& weight, uintptr_t bias, const FoldedNorm& norm, int act, const Tensor& out,
             int tile, const Place& place) {
  const auto& [x_data, M, K, x_row] = x;
  const auto& [weight_data, N, K_of_weight, weight_row] = weight;
  const auto& [column_sums, mean, rstd, pieces, centred, eps] = norm;
  const auto& [out_data, dtype] = out;
  const auto& [device, stream] = place;
  const ProductArgs args{.x = pointer(x_data),
                         .M = M,
                         .K = K,
                         .x_row = x_row,
                         .weight = pointer(weight_data),
                         .N = N,
                         .weight_row = weight_row,
                         .column_sums = static_cast<const float*>(pointer(column_sums)),
                         .bias = static_cast<const float*>(pointer(bias)),
                         .mean = static_cast<const float*>(pointer(mean)),
                         .rstd = static_cast<const float*>(pointer(rstd)),
                         .pieces = pieces,
                         .centred = centred,
                         .eps = eps,
                         .out = pointer(out_data),
                         .dtype = static_cast<DType>(dtype),
                         .act = act,
                         .tile = tile,
                         .device = device,
                         .stream = pointer(stream)};
  if (K_of_weight != K) throw py::value_error("rows of x and of the weight have other lengths");
  py::gil_scoped_release release;
  return product(args);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("patch_embed", &embed, "Starts the kernel; returns a cudaError_t.");
  m.def("patch_rows", &rows, "Starts the kernel; returns a cudaError_t.");
  m.def("weight_gradient", &gradient, "Starts two kernels; returns a cudaError_t.");
  m.def("product", &multiply, "Starts the kernel; returns a cudaError_t.");
  m.def("product_tiles", [] {
    std::vector<std::tuple<int, int, int>> found;
    for (const ProductTile& tile : product_tiles()) found.emplace_back(tile.rows, tile.columns, tile.stages);
    return found;
  });
  m.def("cuda_error_text", &cuda_error_text);
  m.def("tiles", [] {
    std::vector<std::tuple<int, int, bool, bool>> found;
    for (const Tile& tile : tiles()) found.emplace_back(tile.rows, tile.columns, tile.wgmma, tile.fp32);
    return found;
  });
}
