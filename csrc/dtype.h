// Number types of tensors, as vitfast/kernels/cpu counts them.
#pragma once

namespace vitfast {

enum class DType { fp32, bf16, fp16, uint8 };

}  // namespace vitfast
