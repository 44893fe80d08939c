// Python's view of the extension. No torch header anywhere in csrc: it builds without torch and survives its upgrades.
// Tensors arrive as addresses, sizes and strides; vitfast/kernels/cpu is the only caller and checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "cpu/features.h"
#include "cpu/kernels.h"
#ifdef VITFAST_CUDA
#include "cuda/bindings.h"
#include "cuda/probe.h"
#endif

namespace py = pybind11;
using namespace vitfast;

namespace {

using View = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides of image, token and head

HeadsView heads_view(const View& view) {
  const auto& [data, image, token, head] = view;
  return {.data = reinterpret_cast<const void*>(data), .image = image, .token = token, .head = head};
}

void attention(const CpuKernels& kernels, const View& q, const View& k, const View& v, uintptr_t out, uintptr_t lse,
               int64_t B, int64_t H, int64_t Nq, int64_t Nk, int64_t D, float scale, int dtype, int threads) {
  py::gil_scoped_release release;
  kernels.attention({.q = heads_view(q),
                     .k = heads_view(k),
                     .v = heads_view(v),
                     .out = reinterpret_cast<void*>(out),
                     .lse = reinterpret_cast<float*>(lse),
                     .B = B,
                     .H = H,
                     .Nq = Nq,
                     .Nk = Nk,
                     .D = D,
                     .scale = scale,
                     .dtype = static_cast<DType>(dtype),
                     .threads = threads});
}

void activation(const CpuKernels& kernels, uintptr_t x, uintptr_t y, int64_t n, int dtype, int act, int threads) {
  py::gil_scoped_release release;
  kernels.activation(reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), n, static_cast<DType>(dtype),
                     static_cast<Act>(act), threads);
}

// shape: B, C, H, W; strides as many; patch: ph, pw
PatchRowsArgs patch_rows_args(uintptr_t images, const std::array<int64_t, 4>& shape,
                              const std::array<int64_t, 4>& strides, const std::array<int64_t, 2>& patch, int64_t P,
                              int order, uintptr_t rows, uintptr_t scale, uintptr_t shift, int from, int to,
                              int threads) {
  return {.geometry = patch_geometry(shape, strides, patch, P, order),
          .images = reinterpret_cast<const void*>(images),
          .rows = reinterpret_cast<void*>(rows),
          .scale = reinterpret_cast<const float*>(scale),
          .shift = reinterpret_cast<const float*>(shift),
          .B = shape[0],
          .from = static_cast<DType>(from),
          .to = static_cast<DType>(to),
          .threads = threads};
}

void patch_rows(const CpuKernels& kernels, uintptr_t images, const std::array<int64_t, 4>& shape,
                const std::array<int64_t, 4>& strides, const std::array<int64_t, 2>& patch, int64_t P, int order,
                uintptr_t rows, uintptr_t scale, uintptr_t shift, int from, int to, int threads) {
  py::gil_scoped_release release;
  kernels.patch_rows(patch_rows_args(images, shape, strides, patch, P, order, rows, scale, shift, from, to, threads));
}

void layer_norm(const CpuKernels& kernels, uintptr_t x, uintptr_t y, uintptr_t weight, uintptr_t bias, int64_t rows,
                int64_t D, float eps, int dtype, int threads) {
  py::gil_scoped_release release;
  kernels.layer_norm({.x = reinterpret_cast<const void*>(x),
                      .y = reinterpret_cast<void*>(y),
                      .weight = reinterpret_cast<const void*>(weight),
                      .bias = reinterpret_cast<const void*>(bias),
                      .rows = rows,
                      .D = D,
                      .eps = eps,
                      .dtype = static_cast<DType>(dtype),
                      .threads = threads});
}

using Norm = std::tuple<uintptr_t, uintptr_t, float>;               // weight, bias, eps
using Packed = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;  // cells, bias, K, D

LayerNormArgs layer_norm_of(const Norm& norm, int64_t D, DType dtype) {
  const auto& [weight, bias, eps] = norm;
  return {.weight = reinterpret_cast<const void*>(weight),
          .bias = reinterpret_cast<const void*>(bias),
          .D = D,
          .eps = eps,
          .dtype = dtype,
          .threads = 1};
}

PackedWeight packed_weight(const Packed& weight) {
  const auto& [cells, bias, K, D] = weight;
  return {.cells = reinterpret_cast<const void*>(cells), .bias = reinterpret_cast<const float*>(bias), .K = K, .D = D};
}

LinearArgs linear_args(uintptr_t x, const std::optional<Norm>& norm, const Packed& weight, uintptr_t residual,
                       uintptr_t out, int64_t rows, int dtype_number, int act, int threads) {
  const PackedWeight packed = packed_weight(weight);
  const DType dtype = static_cast<DType>(dtype_number);
  return {.x = reinterpret_cast<const void*>(x),
          .norm = layer_norm_of(norm.value_or(Norm{}), packed.K, dtype),
          .normalises = norm.has_value(),
          .weight = packed,
          .residual = reinterpret_cast<const void*>(residual),
          .residual_rows = rows,
          .out = reinterpret_cast<void*>(out),
          .rows = rows,
          .dtype = dtype,
          .act = act,
          .threads = threads};
}

void linear(const CpuKernels& kernels, uintptr_t x, const std::optional<Norm>& norm, const Packed& weight,
            uintptr_t residual, uintptr_t out, int64_t rows, int dtype, int act, int threads) {
  py::gil_scoped_release release;
  kernels.linear(linear_args(x, norm, weight, residual, out, rows, dtype, act, threads));
}

void linear_unpacked(const CpuKernels& kernels, uintptr_t x, const std::optional<Norm>& norm, const Packed& weight,
                     uintptr_t residual, uintptr_t out, int64_t rows, int dtype, int act, int threads) {
  py::gil_scoped_release release;
  kernels.linear_unpacked(linear_args(x, norm, weight, residual, out, rows, dtype, act, threads));
}

void mlp(const CpuKernels& kernels, uintptr_t x, const Norm& norm, const Packed& fc1, const Packed& fc2, uintptr_t out,
         int64_t rows, int dtype_number, int act, int threads) {
  py::gil_scoped_release release;
  const PackedWeight first = packed_weight(fc1);
  const DType dtype = static_cast<DType>(dtype_number);
  kernels.mlp({.x = reinterpret_cast<const void*>(x),
               .norm = layer_norm_of(norm, first.K, dtype),
               .fc1 = first,
               .fc2 = packed_weight(fc2),
               .out = reinterpret_cast<void*>(out),
               .rows = rows,
               .dtype = dtype,
               .act = act,
               .threads = threads});
}

// norm1, qkv, proj, norm2, fc1, fc2, act
using BlockWeights = std::tuple<Norm, Packed, Packed, Norm, Packed, Packed, int>;

void block(const CpuKernels& kernels, uintptr_t x, const BlockWeights& weights, uintptr_t out, int64_t B, int64_t N,
           int64_t H, int64_t D, float scale, int dtype_number, int threads) {
  py::gil_scoped_release release;
  const auto& [norm1, qkv, proj, norm2, fc1, fc2, act] = weights;
  const int64_t C = packed_weight(qkv).K;
  const DType dtype = static_cast<DType>(dtype_number);
  kernels.block({.x = reinterpret_cast<const void*>(x),
                 .norm1 = layer_norm_of(norm1, C, dtype),
                 .norm2 = layer_norm_of(norm2, C, dtype),
                 .qkv = packed_weight(qkv),
                 .proj = packed_weight(proj),
                 .fc1 = packed_weight(fc1),
                 .fc2 = packed_weight(fc2),
                 .out = reinterpret_cast<void*>(out),
                 .B = B,
                 .N = N,
                 .H = H,
                 .D = D,
                 .scale = scale,
                 .dtype = dtype,
                 .act = act,
                 .threads = threads});
}

void embed(const CpuKernels& kernels, uintptr_t images, const std::array<int64_t, 4>& shape,
           const std::array<int64_t, 4>& strides, const std::array<int64_t, 2>& patch, int64_t P, int order,
           uintptr_t scale, uintptr_t shift, int from, int to, int threads, const Packed& weight, uintptr_t positions,
           uintptr_t prefix, uintptr_t tokens) {
  py::gil_scoped_release release;
  kernels.embed(
      {.patches = patch_rows_args(images, shape, strides, patch, P, order, 0, scale, shift, from, to, threads),
       .weight = packed_weight(weight),
       .positions = reinterpret_cast<const void*>(positions),
       .prefix = reinterpret_cast<const void*>(prefix),
       .tokens = reinterpret_cast<void*>(tokens)});
}

void pack_weight(const CpuKernels& kernels, uintptr_t weight, uintptr_t packed, int64_t D, int64_t K, int dtype) {
  py::gil_scoped_release release;
  kernels.pack_weight({.weight = reinterpret_cast<const void*>(weight),
                       .packed = reinterpret_cast<void*>(packed),
                       .D = D,
                       .K = K,
                       .dtype = static_cast<DType>(dtype)});
}

// The tables that were built and that this CPU can run, best last.
std::vector<const CpuKernels*> usable_kernels() {
  std::vector<const CpuKernels*> usable{&kernels_plain_tiles, &kernels_portable};
  std::map<std::string, bool> can = cpu_features();
#ifdef VITFAST_HAS_AVX2
  if (can["avx2"]) usable.push_back(&kernels_avx2);
#endif
#ifdef VITFAST_HAS_AVX512
  if (can["avx512"]) usable.push_back(&kernels_avx512);
#endif
#ifdef VITFAST_HAS_AVX512_BF16
  if (can["avx512_bf16"]) usable.push_back(&kernels_avx512_bf16);
#endif
#ifdef VITFAST_HAS_AMX_BF16
  if (can["avx512_bf16"] && can["amx_bf16"]) usable.push_back(&kernels_amx_bf16);
#endif
  return usable;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of vitfast; use it through the package.";
  m.def("why_no_tiles", &why_no_tiles,
        "Why this CPU's AMX cannot be used; empty where it can, or where there is none.");
  m.def("cpu_features", &cpu_features, "Instruction set -> usable on this machine.");
  py::class_<CpuKernels>(m, "CpuKernels", "The kernels compiled for one instruction set.")
      .def_property_readonly("name", [](const CpuKernels& kernels) { return kernels.name; })
      .def("attention", &attention)
      .def("activation", &activation)
      .def("layer_norm", &layer_norm)
      .def("linear", &linear)
      .def("linear_unpacked", &linear_unpacked)
      .def("takes_unpacked", [](const CpuKernels& kernels, int64_t D, int64_t K,
                                int dtype) { return kernels.takes_unpacked(D, K, static_cast<DType>(dtype)); })
      .def("mlp", &mlp)
      .def("block", &block)
      .def("embed", &embed)
      .def("packed_bytes", [](const CpuKernels& kernels, int64_t D, int64_t K,
                              int dtype) { return kernels.packed_bytes(D, K, static_cast<DType>(dtype)); })
      .def("pack_weight", &pack_weight)
      .def("multiplies",
           [](const CpuKernels& kernels, int dtype) { return kernels.multiplies(static_cast<DType>(dtype)); })
      .def("patch_rows", &patch_rows);
  m.def("usable_kernels", &usable_kernels, py::return_value_policy::reference,
        "The instruction sets that this CPU has and this build knows, best last.");
#ifdef VITFAST_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The kernels for GPUs that this build has.");
  bind_cuda(cuda);
  m.def(
      "probe_cuda",
      [] {
        CudaProbe probe;
        {
          py::gil_scoped_release release;
          probe = probe_cuda();
        }
        py::dict result;
        result["driver_version"] = probe.driver_version;
        result["runtime_version"] = probe.runtime_version;
        result["error"] = probe.error;
        result["error_text"] = probe.error_text;
        result["devices"] = probe.devices;
        return result;
      },
      "Versions, devices and the error of the CUDA runtime that this extension was built with.");
#endif
}
