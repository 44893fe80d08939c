// What the CUDA driver and runtime say of themselves. No CUDA type in here, so that bindings.cpp needs no toolkit.
#pragma once

#include <string>
#include <vector>

namespace vitfast {

struct CudaProbe {
  int driver_version = 0;   // CUDA version the driver supports, 1000 * major + 10 * minor; 0: no driver
  int runtime_version = 0;  // CUDA version this extension was built with
  int error = 0;            // cudaError_t of counting devices
  std::string error_text;
  std::vector<std::string> devices;  // "NVIDIA H200, sm_90"
};

CudaProbe probe_cuda();

}  // namespace vitfast
