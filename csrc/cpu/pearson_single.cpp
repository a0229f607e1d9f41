// The Pearson loss and its gradient on the CPU, one channel after the other: what is read for the statistics is read for
// the gradient from a cache, so that memory sees student and teacher once. Bit for bit what pearson_fwd and pearson_bwd
// of an incoming gradient of 1 give.
#include "cpu/pearson_levels.h"

#include <numeric>
#include <tuple>

namespace jdkd::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> pearson_single_into(
    std::vector<Tensor> students, std::vector<Tensor> teachers, std::vector<double> weights, double eps,
    bool skip_constant, std::vector<Tensor> gradients) {
  const char* op = "pearson_single_into";
  const std::vector<Level> levels = pearson::describe_levels(op, students, teachers);
  pearson::check_weights(op, weights, levels);
  check_written(op, students, gradients, levels);
  const int64_t columns = pearson::total_channels(levels);
  const pearson::Results results(students[0], levels);
  double total = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    const Level& level = levels[i];
    const GradientOf of{
        cursor(students[i]), cursor(teachers[i]), nullptr, static_cast<char*>(gradients[i].mutable_data_ptr())};
    float* table = results.table.mutable_data_ptr<float>() + level.first_channel;
    const Backward to_do{of, table, columns, 1.0f};
    std::vector<double> losses(level.c);
    const auto finish = [&](const Moments& q, int64_t j) {
      losses[j] = pearson::finish_channel(q, weights[i] / level.c, eps, skip_constant, table + j, columns);
    };
    if (level.channels_last) {  // channels lie among each other: two sweeps
      std::vector<Moments> moments(level.c);
      forward_rows(level, students[i], teachers[i], moments.data());
      for (int64_t j = 0; j < level.c; ++j) {
        finish(moments[j], j);
      }
      backward_rows(level, to_do);
    } else {
      torch::stable::parallel_for(0, level.c, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          finish(channel_moments(level, students[i], teachers[i], j), j);
          channel_gradient(level, to_do, j);
        }
      });
    }
    const double loss = std::accumulate(losses.begin(), losses.end(), 0.0);
    results.losses.mutable_data_ptr<float>()[i] = static_cast<float>(loss);
    total += loss;
  }
  *results.loss.mutable_data_ptr<float>() = static_cast<float>(total);
  return {results.loss, results.losses, results.table};
}

}  // namespace
}  // namespace jdkd::cpu

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) {
  m.impl("pearson_single_into", TORCH_BOX(&jdkd::cpu::pearson_single_into));
}
