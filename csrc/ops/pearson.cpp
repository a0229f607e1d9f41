#include "ops/pearson.h"

namespace jdkd::pearson {

using torch::headeronly::ScalarType;

namespace {

bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

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
        on_one_device(x[i], x[0]) && on_one_device(y[i], x[0]), op, ": level ", i,
        " is on another device than the first student level; move all levels to one");
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

void check_weights(const char* op, const std::vector<double>& weights, const std::vector<Level>& levels) {
  check(
      weights.size() == levels.size(), op, ": ", weights.size(), " weights were given for ", levels.size(),
      " levels; give one a level");
}

void check_backward(
    const Tensor& dloss, const Tensor& coefficients, const std::vector<Tensor>& x, const std::vector<Tensor>& dout,
    const std::vector<Level>& levels) {
  const int64_t channels = total_channels(levels);
  check(
      dloss.numel() == 1 && dloss.scalar_type() == ScalarType::Float, "pearson_bwd: dloss has shape ",
      shape_text(dloss), "; it must be one float32 value");
  check(
      coefficients.dim() == 2 && coefficients.size(0) == kRows && coefficients.size(1) == channels &&
          coefficients.is_contiguous() && coefficients.scalar_type() == ScalarType::Float,
      "pearson_bwd: coefficients have shape ", shape_text(coefficients), "; they must be a contiguous float32 [",
      static_cast<int>(kRows), ", ", channels, "]");
  check(
      on_one_device(dloss, x[0]) && on_one_device(coefficients, x[0]),
      "pearson_bwd: dloss or coefficients are not on the device of x; move them there");
  check(
      dout.empty() || dout.size() == x.size(), "pearson_bwd: ", dout.size(), " tensors dout were given for ", x.size(),
      " levels; give none, or one a level");
  for (size_t i = 0; i < dout.size(); ++i) {
    check_same_shape("pearson_bwd", "a level of dout", dout[i], "its level of x", x[i]);
    check(
        dout[i].scalar_type() == x[i].scalar_type() && on_one_device(dout[i], x[0]), "pearson_bwd: dout of level ", i,
        " differs in dtype or device from x; convert it to those of x");
    check(
        levels[i].channels_last ? is_dense_nhwc(dout[i]) : is_dense_nchw(dout[i]), "pearson_bwd: dout of level ", i,
        " is not dense in the layout of x, ", levels[i].channels_last ? "channels-last" : "NCHW", "; copy it to that");
  }
}

Results::Results(const Tensor& like, const std::vector<Level>& levels)
    : loss(torch::stable::new_empty(like, {}, ScalarType::Float)),
      losses(torch::stable::new_empty(like, {static_cast<int64_t>(levels.size())}, ScalarType::Float)),
      table(torch::stable::new_empty(like, {2, kRows, total_channels(levels)}, ScalarType::Float)),
      moments(torch::stable::new_empty(like, {kMoments, total_channels(levels)}, ScalarType::Double)) {}

}  // namespace jdkd::pearson

STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) {
  // (loss [], losses [L], coefficients [2, 5, sum of C], moments [6, sum of C]); the last float64, the others float32
  m.def(
      "pearson_fwd(Tensor[] students, Tensor[] teachers, float[] weights, float eps, bool skip_constant)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  // dout plus the gradients with respect to x, shaped and laid out like x; coefficients [5, sum of C] are x's entry of
  // the table, dout is empty or like x
  m.def("pearson_bwd(Tensor dloss, Tensor[] x, Tensor[] y, Tensor coefficients, Tensor[] dout) -> Tensor[]");
  // the same, on a CPU, into memory that is given
  m.def(
      "pearson_bwd_into(Tensor dloss, Tensor[] x, Tensor[] y, Tensor coefficients, Tensor[] dout, Tensor(a!)[] dx)"
      " -> ()");
}
