// The Pearson loss on the CPU: one sweep over memory for the statistics, one for the gradient.
#include "cpu/pearson_levels.h"

namespace jdkd::cpu {

void check_written(
    const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& dx, const std::vector<Level>& levels) {
  check(
      dx.size() == x.size(), op, ": ", dx.size(), " gradients were given for ", x.size(), " levels; give one a level");
  for (size_t i = 0; i < dx.size(); ++i) {
    check_same_shape(op, "a gradient", dx[i], "its level", x[i]);
    check(
        dx[i].scalar_type() == x[i].scalar_type() && dx[i].is_cpu() &&
            (levels[i].channels_last ? is_dense_nhwc(dx[i]) : is_dense_nchw(dx[i])),
        op, ": the gradient of level ", i, " differs from it in dtype, device or layout; make it with empty_like");
  }
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> pearson_fwd(
    std::vector<Tensor> students, std::vector<Tensor> teachers, std::vector<double> weights, double eps,
    bool skip_constant) {
  const std::vector<Level> levels = pearson::describe_levels("pearson_fwd", students, teachers);
  pearson::check_weights("pearson_fwd", weights, levels);
  const int64_t channels = pearson::total_channels(levels);
  const pearson::Results results(students[0], levels);
  double total = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    const Level& level = levels[i];
    std::vector<Moments> moments(level.c);
    (level.channels_last ? forward_rows : forward_planes)(level, students[i], teachers[i], moments.data());
    float* table = results.table.mutable_data_ptr<float>() + level.first_channel;
    double* sums = results.moments.mutable_data_ptr<double>() + level.first_channel;
    double loss = 0;
    for (int64_t j = 0; j < level.c; ++j) {
      store_moments(moments[j], sums + j, channels);
      loss += pearson::finish_channel(moments[j], weights[i] / level.c, eps, skip_constant, table + j, channels);
    }
    results.losses.mutable_data_ptr<float>()[i] = static_cast<float>(loss);
    total += loss;
  }
  *results.loss.mutable_data_ptr<float>() = static_cast<float>(total);
  return results.tuple();
}

void pearson_bwd_into(
    Tensor dloss, std::vector<Tensor> x, std::vector<Tensor> y, Tensor coefficients, std::vector<Tensor> dout,
    std::vector<Tensor> dx) {
  const std::vector<Level> levels = pearson::describe_levels("pearson_bwd_into", x, y);
  pearson::check_backward(dloss, coefficients, x, dout, levels);
  check_written("pearson_bwd_into", x, dx, levels);
  const int64_t channels = pearson::total_channels(levels);
  const float upstream = *dloss.const_data_ptr<float>();
  for (size_t i = 0; i < levels.size(); ++i) {
    const char* added = dout.empty() ? nullptr : static_cast<const char*>(dout[i].const_data_ptr());
    const GradientOf of{cursor(x[i]), cursor(y[i]), added, static_cast<char*>(dx[i].mutable_data_ptr())};
    const float* table = coefficients.const_data_ptr<float>() + levels[i].first_channel;
    (levels[i].channels_last ? backward_rows : backward_planes)(levels[i], {of, table, channels, upstream});
  }
}

std::vector<Tensor> pearson_bwd(
    Tensor dloss, std::vector<Tensor> x, std::vector<Tensor> y, Tensor coefficients, std::vector<Tensor> dout) {
  std::vector<Tensor> dx;
  for (const Tensor& level : x) {
    dx.push_back(torch::stable::empty_like(level));
  }
  pearson_bwd_into(dloss, x, y, coefficients, dout, dx);
  return dx;
}

}  // namespace
}  // namespace jdkd::cpu

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) {
  m.impl("pearson_fwd", TORCH_BOX(&jdkd::cpu::pearson_fwd));
  m.impl("pearson_bwd", TORCH_BOX(&jdkd::cpu::pearson_bwd));
  m.impl("pearson_bwd_into", TORCH_BOX(&jdkd::cpu::pearson_bwd_into));
}
