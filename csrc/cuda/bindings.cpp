// Python's view of the kernels for GPUs; vitfast/kernels/cuda is the only caller and checks what it gives.
#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cuda/patch_embed.h"

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

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

ImagesArgs images_of(const ImagesGiven& given) {
  const auto& [data, shape, strides, patch, P, order, dtype, mean, std, patches, packed, on_device] = given;
  ImagesArgs args{{shape[1], shape[2], shape[3], patch[0], patch[1], P, static_cast<PatchOrder>(order), strides[0],
                   strides[1], strides[2], strides[3]},
                  pointer(data),
                  shape[0],
                  static_cast<DType>(dtype),
                  static_cast<const float*>(pointer(mean)),
                  static_cast<const float*>(pointer(std)),
                  {},
                  static_cast<const PackedImage*>(pointer(on_device)),
                  patches};
  for (const auto& [image, first, H, W, channel, y, x] : packed)
    args.packed.push_back({pointer(image), first, H, W, channel, y, x});
  return args;
}

int embed(const ImagesGiven& images, const Tensor& weight, uintptr_t bias, int64_t D, const Tensor& positions,
          const Tensor& prefix, int64_t prefix_image, uintptr_t prefix_positions, const Tensor& tokens, int tile,
          const Place& place) {
  const PatchEmbedArgs args{images_of(images),
                            pointer(std::get<0>(weight)),
                            pointer(bias),
                            D,
                            static_cast<DType>(std::get<1>(weight)),
                            pointer(std::get<0>(positions)),
                            static_cast<DType>(std::get<1>(positions)),
                            pointer(std::get<0>(prefix)),
                            prefix_image,
                            pointer(prefix_positions),
                            static_cast<DType>(std::get<1>(prefix)),
                            const_cast<void*>(pointer(std::get<0>(tokens))),
                            static_cast<DType>(std::get<1>(tokens)),
                            tile,
                            std::get<0>(place),
                            const_cast<void*>(pointer(std::get<1>(place)))};
  py::gil_scoped_release release;
  return patch_embed(args);
}

int rows(const ImagesGiven& images, const Tensor& out, const Place& place) {
  const PatchRowsOnGpuArgs args{images_of(images), const_cast<void*>(pointer(std::get<0>(out))),
                                static_cast<DType>(std::get<1>(out)), std::get<0>(place),
                                const_cast<void*>(pointer(std::get<1>(place)))};
  py::gil_scoped_release release;
  return patch_rows_on_gpu(args);
}

int gradient(const ImagesGiven& images, const Tensor& grad, int64_t D, uintptr_t parts, int64_t splits,
             uintptr_t weight_grad, const Place& place) {
  const WeightGradientArgs args{images_of(images),
                                pointer(std::get<0>(grad)),
                                D,
                                static_cast<DType>(std::get<1>(grad)),
                                static_cast<float*>(const_cast<void*>(pointer(parts))),
                                splits,
                                const_cast<void*>(pointer(weight_grad)),
                                std::get<0>(place),
                                const_cast<void*>(pointer(std::get<1>(place)))};
  py::gil_scoped_release release;
  return weight_gradient(args);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("patch_embed", &embed, "Starts the kernel; returns a cudaError_t.");
  m.def("patch_rows", &rows, "Starts the kernel; returns a cudaError_t.");
  m.def("weight_gradient", &gradient, "Starts two kernels; returns a cudaError_t.");
  m.def("cuda_error_text", &cuda_error_text);
  m.def("tiles", [] {
    std::vector<std::tuple<int, int, bool, bool>> found;
    for (const Tile& tile : tiles()) found.emplace_back(tile.rows, tile.columns, tile.wgmma, tile.fp32);
    return found;
  });
}
