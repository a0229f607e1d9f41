// From the dtype of a tensor to the type that a kernel is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/core/ScalarType.h>

namespace jdkd {

// Calls launch(T{}) with the element type: float32, bfloat16, or else float16.
template <class Launch>
void dispatch(torch::headeronly::ScalarType type, const Launch& launch) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return launch(float{});
    case ScalarType::BFloat16:
      return launch(__nv_bfloat16{});
    default:
      return launch(__half{});
  }
}

}  // namespace jdkd
