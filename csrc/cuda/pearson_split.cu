// Launchers of the Pearson loss on CUDA, and their registration.
#include "common/cuda.h"
#include "cuda/pearson_kernels.cuh"

#include <algorithm>
#include <array>

namespace jdkd::pearson {
namespace {

using torch::headeronly::ScalarType;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One launch: its levels and its blocks.
struct Launch {
  Levels levels{};
  int64_t blocks = 0;

  void add(LevelArgs args, int64_t more_blocks) {
    args.first_block = blocks;
    levels.at[levels.count++] = args;
    blocks += more_blocks;
  }
  dim3 grid() const {
    check(blocks <= 0x7fffffff, "pearson: ", blocks, " blocks are more than a grid holds");
    return dim3(static_cast<unsigned>(blocks));
  }
};

// All levels, and the launch of each layout; usually one of the two is empty.
struct Plan {
  Launch all, planes, rows;
  int64_t cells = 0;

  void add(const Level& level, const void* x, const void* y, const void* dout, void* dx, double weight) {
    LevelArgs args{x, y, dout, dx, weight / level.c, level.n, level.c, level.hw};
    args.channels_last = level.channels_last;
    args.first_cell = cells;
    args.first_column = level.first_channel;
    if (level.channels_last) {
      args.chunk = ceil_div(ceil_div(level.positions(), kRowTile), kRowChunks) * kRowTile;
      args.chunks = ceil_div(level.positions(), args.chunk);
      rows.add(args, args.chunks * ceil_div(level.c, 32));
      cells += args.chunks * level.c * kMoments;
    } else {
      args.chunk = kPlaneChunk;
      args.chunks = ceil_div(level.hw, kPlaneChunk);
      planes.add(args, level.n * level.c * args.chunks);
      cells += level.n * level.c * args.chunks * kMoments;
    }
    all.add(args, 0);
  }
};

// Calls launch(T{}) with the element type of the tensors.
template <class Launch>
void dispatch(ScalarType type, const Launch& launch) {
  switch (type) {
    case ScalarType::Float:
      return launch(float{});
    case ScalarType::BFloat16:
      return launch(__nv_bfloat16{});
    default:
      return launch(__half{});
  }
}

void check_one_kind(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& y) {
  check(x.size() <= kMaxLevels, op, ": ", x.size(), " levels were given; the CUDA kernels take at most ", kMaxLevels);
  for (size_t i = 0; i < x.size(); ++i) {
    check(
        x[i].scalar_type() == x[0].scalar_type() && y[i].scalar_type() == x[0].scalar_type(), op,
        ": levels are of different dtypes; the CUDA kernels take one");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pearson_fwd(
    std::vector<Tensor> students, std::vector<Tensor> teachers, std::vector<double> weights, double eps,
    bool skip_constant) {
  const std::vector<Level> levels = describe_levels("pearson_fwd", students, teachers);
  check_weights("pearson_fwd", weights, levels);
  check_one_kind("pearson_fwd", students, teachers);
  Plan plan;
  for (size_t i = 0; i < levels.size(); ++i) {
    plan.add(levels[i], students[i].const_data_ptr(), teachers[i].const_data_ptr(), nullptr, nullptr, weights[i]);
  }
  const int64_t columns = total_channels(levels);
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  const cudaStream_t stream = current_stream(students[0]);
  const Results results(students[0], levels);
  Tensor cells = torch::stable::new_empty(students[0], {plan.cells}, ScalarType::Double);
  Tensor shares = torch::stable::new_empty(students[0], {columns}, ScalarType::Double);
  double* cell_data = cells.mutable_data_ptr<double>();
  dispatch(students[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (plan.planes.blocks) {
      pearson_plane_stats_kernel<T><<<plan.planes.grid(), kThreads, 0, stream>>>(plan.planes.levels, cell_data);
    }
    if (plan.rows.blocks) {
      pearson_row_stats_kernel<T><<<plan.rows.grid(), kThreads, 0, stream>>>(plan.rows.levels, cell_data);
    }
  });
  check_launch("pearson_stats");
  constexpr int kFinishThreads = 64;
  pearson_finish_kernel<<<static_cast<unsigned>(ceil_div(columns, kFinishThreads)), kFinishThreads, 0, stream>>>(
      plan.all.levels, cell_data, results.table.mutable_data_ptr<float>(), results.moments.mutable_data_ptr<double>(),
      shares.mutable_data_ptr<double>(), columns, eps, skip_constant);
  check_launch("pearson_finish");
  pearson_sum_kernel<<<1, kThreads, 0, stream>>>(
      plan.all.levels, shares.mutable_data_ptr<double>(), results.losses.mutable_data_ptr<float>(),
      results.loss.mutable_data_ptr<float>());
  check_launch("pearson_sum");
  return results.tuple();
}

std::vector<Tensor> pearson_bwd(
    Tensor dloss, std::vector<Tensor> x, std::vector<Tensor> y, Tensor coefficients, std::vector<Tensor> dout) {
  const std::vector<Level> levels = describe_levels("pearson_bwd", x, y);
  check_one_kind("pearson_bwd", x, y);
  check_backward(dloss, coefficients, x, dout, levels);
  const int64_t columns = total_channels(levels);
  const torch::stable::accelerator::DeviceGuard guard(x[0].get_device_index());
  Plan plan;
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < levels.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(x[i]));
    const void* added = dout.empty() ? nullptr : dout[i].const_data_ptr();
    plan.add(levels[i], x[i].const_data_ptr(), y[i].const_data_ptr(), added, gradients[i].mutable_data_ptr(), 0);
  }
  const cudaStream_t stream = current_stream(x[0]);
  const float* upstream = dloss.const_data_ptr<float>();
  const float* table = coefficients.const_data_ptr<float>();
  dispatch(x[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (plan.planes.blocks) {
      pearson_plane_grad_kernel<T><<<plan.planes.grid(), kThreads, 0, stream>>>(
          plan.planes.levels, upstream, table, columns);
    }
    if (plan.rows.blocks) {
      pearson_row_grad_kernel<T><<<plan.rows.grid(), kThreads, 0, stream>>>(plan.rows.levels, upstream, table, columns);
    }
  });
  check_launch("pearson_grad");
  return gradients;
}

}  // namespace
}  // namespace jdkd::pearson

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CUDA, m) {
  m.impl("pearson_fwd", TORCH_BOX(&jdkd::pearson::pearson_fwd));
  m.impl("pearson_bwd", TORCH_BOX(&jdkd::pearson::pearson_bwd));
}
