// The kernels for GPUs as a Python module that runs them on the host, with the bindings and launchers of the real one.
#include "cuda/bindings.h"
#include "cuda/patch_embed.cu"
#include "cuda/product.cu"

PYBIND11_MODULE(cuda_kernels_on_host, m) {
  bind_cuda(m);
  m.def(
      "set_shared_limit", [](int bytes) { on_host::gpu.shared_limit = bytes; },
      "Bytes of shared memory a block may have.");
  m.def("device", [] { return on_host::gpu.device; });
}
