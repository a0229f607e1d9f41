#include "ops/pearson.h"

namespace jdkd::pearson {

using torch::headeronly::ScalarType;

namespace {

bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

}  // namespace

std::vector<Level> describe_levels(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& y) {
  check(
      !x.empty() && x.size() == y.size(), op, ": ", x.size(), " and ", y.size(),
      " levels were given; give as many of both, at least one");
  std::vector<Level> levels;
  int64_t channels = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    check_same_shape(op, "a student level", x[i], "its teacher level", y[i]);
    check(
        x[i].dim() == 4 && x[i].numel() > 0, op, ": level ", i, " has shape ", shape_text(x[i]),
        "; it must be [N, C, H, W] and not empty");
    check(
        is_supported(x[i].scalar_type()) && is_supported(y[i].scalar_type()), op, ": level ", i,
        " is not of float32, bfloat16 or float16");
    // A 1x1 map is dense in both layouts; as rows of channels it can be read in vectors.
    const bool nchw = is_dense_nchw(x[i]) && is_dense_nchw(y[i]);
    const bool nhwc = is_dense_nhwc(x[i]) && is_dense_nhwc(y[i]);
    const int64_t hw = x[i].size(2) * x[i].size(3);
    check(
        nchw || nhwc, op, ": level ", i,
        " must be dense in the same layout, NCHW or channels-last, for both tensors");
    levels.push_back({x[i].size(0), x[i].size(1), hw, channels, nhwc && (!nchw || hw == 1)});
    channels += x[i].size(1);
  }
  return levels;
}

void check_backward(const Tensor& dloss, const Tensor& coefficients, int64_t channels) {
  check(
      dloss.numel() == 1 && dloss.scalar_type() == ScalarType::Float, "pearson_bwd: dloss has shape ",
      shape_text(dloss), "; it must be one float32 value");
  check(
      coefficients.dim() == 2 && coefficients.size(0) == kRows && coefficients.size(1) == channels &&
          coefficients.is_contiguous() && coefficients.scalar_type() == ScalarType::Float,
      "pearson_bwd: coefficients have shape ", shape_text(coefficients), "; they must be a contiguous float32 [",
      static_cast<int>(kRows), ", ", channels, "]");
}

}  // namespace jdkd::pearson

STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) {
  // (loss [], coefficients [2, 5, sum of C]), both float32
  m.def("pearson_fwd(Tensor[] students, Tensor[] teachers, float loss_weight) -> (Tensor, Tensor)");
  // the gradients with respect to x, shaped and laid out like x; coefficients [5, sum of C] are x's entry of the table
  m.def("pearson_bwd(Tensor dloss, Tensor[] x, Tensor[] y, Tensor coefficients) -> Tensor[]");
}
