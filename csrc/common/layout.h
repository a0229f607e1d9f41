// The memory layouts that kernels take without a copy.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace jdkd {

// Whether a tensor [N, C, H, W] is dense in the order its dimensions are listed in, outermost first. Dimensions of
// size one may have any stride.
inline bool is_dense(const torch::stable::Tensor& tensor, const int (&order)[4]) {
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    if (tensor.size(order[i]) != 1 && tensor.stride(order[i]) != expected) {
      return false;
    }
    expected *= tensor.size(order[i]);
  }
  return true;
}

inline bool is_dense_nchw(const torch::stable::Tensor& tensor) { return is_dense(tensor, {0, 1, 2, 3}); }
inline bool is_dense_nhwc(const torch::stable::Tensor& tensor) { return is_dense(tensor, {0, 2, 3, 1}); }

}  // namespace jdkd
