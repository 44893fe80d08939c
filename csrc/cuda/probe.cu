#include <cuda_runtime_api.h>

#include "cuda/probe.h"

namespace vitfast {

CudaProbe probe_cuda() {
  CudaProbe probe;
  cudaDriverGetVersion(&probe.driver_version);
  cudaRuntimeGetVersion(&probe.runtime_version);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  probe.error = static_cast<int>(error);
  probe.error_text = cudaGetErrorString(error);
  cudaGetLastError();  // or the next call of this runtime would report it
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    probe.devices.push_back(std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                            std::to_string(properties.minor));
  }
  return probe;
}

}  // namespace vitfast
