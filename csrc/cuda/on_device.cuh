// What every launcher asks and does first.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "shared/dtype.h"

namespace vitfast {
namespace {

// The current device of this thread, put back at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before);
    if (error == cudaSuccess && device != before) error = cudaSetDevice(device);
    // or the next call would report it
    if (error != cudaSuccess) cudaGetLastError();
  }
  ~OnDevice() {
    int now = before;
    if (cudaGetDevice(&now) == cudaSuccess && now != before) cudaSetDevice(before);
  }
  OnDevice(const OnDevice&) = delete;

  cudaError_t error;

 private:
  int before = 0;
};

inline int bytes_of(DType dtype) { return dtype == DType::fp32 ? 4 : dtype == DType::uint8 ? 1 : 2; }

inline bool aligned(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

}  // namespace
}  // namespace vitfast
