// What every operator file includes first: the libtorch version it targets, and the words for its errors.
//
// Operators are registered under torch.ops.jdkd_C with the stable ABI, each file for itself:
//
//   #include "common/checks.h"
//   STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) { m.def("pearson_fwd(...) -> ..."); }
//   STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) { m.impl("pearson_fwd", TORCH_BOX(&pearson_fwd_cpu)); }
//
// CUDA implementations live in csrc/cuda; JDKD_WITH_CUDA is defined everywhere when they are part of the build.
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace jdkd {

// "[2, 256, 100, 168]"
inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i ? ", " : "") << tensor.size(i);
  }
  text << ']';
  return text.str();
}

// Joins anything printable: check(n > 0, "pearson_fwd: n is ", n, ", but must be positive").
template <typename... Words>
inline void check(bool holds, const Words&... words) {
  if (!holds) {
    std::ostringstream text;
    (text << ... << words);
    throw std::runtime_error(text.str());
  }
}

inline void check_same_shape(
    const char* op,
    const char* left_name,
    const torch::stable::Tensor& left,
    const char* right_name,
    const torch::stable::Tensor& right) {
  bool same = left.dim() == right.dim();
  for (int64_t i = 0; same && i < left.dim(); ++i) {
    same = left.size(i) == right.size(i);
  }
  check(
      same, op, ": ", left_name, " has shape ", shape_text(left), " and ",
      right_name, " has shape ", shape_text(right), "; they must be equal");
}

}  // namespace jdkd
