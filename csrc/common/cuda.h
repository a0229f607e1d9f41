// What a CUDA operator needs from torch: the current stream, and the error of a launch as an exception.
#pragma once

#include "common/checks.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

namespace jdkd {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, kernel, " was not launched: ", cudaGetErrorString(error));
}

}  // namespace jdkd
