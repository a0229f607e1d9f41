// What a CUDA operator needs from torch: the current stream, and the error of a launch as an exception.
#pragma once

#include "common/checks.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <utility>

namespace jdkd {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches a kernel over `blocks` blocks of `threads` threads. The arguments take the kernel's own types.
template <class... Parameters, class... Arguments>
void launch_kernel(
    const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
    Arguments&&... arguments) {
  check(blocks <= 0x7fffffff, name, ": ", blocks, " blocks are more than a grid holds");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // else whoever launches next would report it again
  }
  check(error == cudaSuccess, name, " was not launched: ", cudaGetErrorString(error));
}

}  // namespace jdkd
