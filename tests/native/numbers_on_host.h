// Tensors of the test programs whose kernels for GPUs run on the host.
#pragma once

#include <cmath>

#include "random_layout.h"

namespace vitfast {

static int bytes_in(DType dtype) { return dtype == DType::fp32 ? 4 : dtype == DType::uint8 ? 1 : 2; }

// numbers of a type in memory of their own
struct Numbers {
  DType dtype;
  int64_t count;
  char* memory;

  Numbers(DType dtype, int64_t count) : dtype(dtype), count(count), memory(new char[count * bytes_in(dtype)]) {}
  Numbers(const Numbers&) = delete;
  ~Numbers() { delete[] memory; }

  void fill(double scale, double shift = 0) {
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == DType::uint8)
        memory[i] = static_cast<char>(draw(0, 255));
      else
        put(i, shift + scale * draw(-1000, 1000) / 1000);
    }
  }

  // as rounded to the type
  void put(int64_t i, double value) {
    const float x = static_cast<float>(value);
    if (dtype == DType::fp32) std::memcpy(memory + 4 * i, &x, 4);
    const uint16_t half = dtype == DType::fp16 ? rounded(x, Half{}) : rounded(x, Bf16{});
    if (bytes_in(dtype) == 2) std::memcpy(memory + 2 * i, &half, 2);
  }

  double at(int64_t i) const {
    REQUIRE(i >= 0 && i < count, "number %ld of %ld", (long)i, (long)count);
    if (dtype == DType::uint8) return static_cast<uint8_t>(memory[i]);
    float x = 0;
    uint16_t half = 0;
    if (dtype == DType::fp32) std::memcpy(&x, memory + 4 * i, 4);
    if (bytes_in(dtype) == 2) std::memcpy(&half, memory + 2 * i, 2);
    if (dtype == DType::fp16) x = to_float(Half{half});
    if (dtype == DType::bf16) x = to_float(Bf16{half});
    return x;
  }
};

}  // namespace vitfast
