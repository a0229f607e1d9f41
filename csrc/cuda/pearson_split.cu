// Launchers of the Pearson loss on CUDA, and their registration.
#include "common/cuda.h"
#include "common/element_type.cuh"
#include "cuda/pearson_kernels.cuh"

#include <algorithm>

namespace jdkd::pearson {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kRowBlocks = 256;  // of a level of rows, about, where its chunks have at most kRowChunk

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One launch: some levels of one layout, and their blocks.
struct Launch {
  bool channels_last;
  Levels levels{};
  int64_t blocks = 0, channels = 0;

  void add(LevelArgs args, int64_t more_blocks) {
    args.first_block = blocks;
    levels.at[levels.count++] = args;
    blocks += more_blocks;
    channels += args.c;
  }
};

// Cuts one level into chunks; returns the number of its blocks.
int64_t cut(LevelArgs& args, bool channels_last, int64_t itemsize) {
  if (channels_last) {
    const bool is_wide = args.c * itemsize % kPackBytes == 0 && is_pack_aligned(args.x) && is_pack_aligned(args.y) &&
        is_pack_aligned(args.dout) && is_pack_aligned(args.dx);
    const int64_t rows = args.n * args.hw;
    const int64_t across = is_wide ? kWideColumns * kPackBytes / itemsize : kNarrowColumns;
    const int64_t blocks = ceil_div(args.c, across), most = ceil_div(kRowBlocks, blocks);
    args.form = is_wide ? Form::kWideRows : Form::kNarrowRows;
    args.chunk = std::min(kRowChunk, ceil_div(ceil_div(rows, kRowBlock), most) * kRowBlock);
    args.chunks = ceil_div(rows, args.chunk);
    return args.chunks * blocks;
  }
  const bool is_small = args.hw <= kSmallPlane;
  args.form = is_small ? Form::kSmallPlanes : Form::kPlanes;
  args.chunks = ceil_div(args.hw, kPlaneChunk);
  args.chunk = ceil_div(args.hw, args.chunks);
  const int64_t chunks = args.n * args.c * args.chunks;
  return is_small ? ceil_div(chunks, kThreads / 32) : chunks;
}

// The launches for any number of levels, of each layout by itself. The largest level first, so that small ones fill the
// end.
struct Plan {
  std::vector<Launch> launches;
  int64_t cells = 0;

  Plan(std::vector<LevelArgs> levels, const std::vector<Level>& described, int64_t itemsize) {
    for (size_t i = 0; i < levels.size(); ++i) {
      levels[i].n = described[i].n, levels[i].c = described[i].c, levels[i].hw = described[i].hw;
      levels[i].first_column = described[i].first_channel;
      levels[i].index = static_cast<int>(i);
    }
    std::stable_sort(levels.begin(), levels.end(), [&](const LevelArgs& a, const LevelArgs& b) {
      const bool a_rows = described[a.index].channels_last, b_rows = described[b.index].channels_last;
      return a_rows != b_rows ? b_rows : a.n * a.c * a.hw > b.n * b.c * b.hw;
    });
    for (LevelArgs& args : levels) {
      const bool channels_last = described[args.index].channels_last;
      if (launches.empty() || launches.back().levels.count == kMaxLevels ||
          launches.back().channels_last != channels_last) {
        launches.push_back({channels_last});
      }
      const int64_t blocks = cut(args, channels_last, itemsize);
      args.first_cell = cells;
      cells += args.c * args.cells();
      launches.back().add(args, blocks);
    }
  }
};

void check_one_dtype(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& y) {
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
  check_one_dtype("pearson_fwd", students, teachers);
  std::vector<LevelArgs> args;
  for (size_t i = 0; i < levels.size(); ++i) {
    const double scale = weights[i] / levels[i].c;
    args.push_back({students[i].const_data_ptr(), teachers[i].const_data_ptr(), nullptr, nullptr, scale});
  }
  const Plan plan(std::move(args), levels, students[0].element_size());
  const int64_t columns = total_channels(levels);
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  const cudaStream_t stream = current_stream(students[0]);
  const Results results(students[0], levels);
  Tensor cells = torch::stable::new_empty(students[0], {plan.cells * kMoments}, ScalarType::Double);
  Tensor shares = torch::stable::new_empty(students[0], {columns + 2}, ScalarType::Double);  // their sum, the ticket
  Moments* cell_data = static_cast<Moments*>(cells.mutable_data_ptr());
  double* share_data = shares.mutable_data_ptr<double>();
  Totals totals{
      share_data,
      share_data + columns,
      reinterpret_cast<unsigned*>(share_data + columns + 1),
      results.losses.mutable_data_ptr<float>(),
      results.loss.mutable_data_ptr<float>(),
      true};
  for (const Launch& launch : plan.launches) {
    dispatch(students[0].scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto kernel = launch.channels_last ? pearson_row_stats_kernel<T> : pearson_plane_stats_kernel<T>;
      launch_kernel("pearson_stats", kernel, launch.blocks, kThreads, stream, launch.levels, cell_data, totals.ticket);
    });
    launch_kernel(
        "pearson_finish", pearson_finish_kernel, ceil_div(launch.channels, kThreads / 32), kThreads, stream,
        launch.levels, cell_data, results.table.mutable_data_ptr<float>(), results.moments.mutable_data_ptr<double>(),
        totals, columns, eps, skip_constant);
    totals.is_first = false;
  }
  return results.tuple();
}

std::vector<Tensor> pearson_bwd(
    Tensor dloss, std::vector<Tensor> x, std::vector<Tensor> y, Tensor coefficients, std::vector<Tensor> dout) {
  const std::vector<Level> levels = describe_levels("pearson_bwd", x, y);
  check_one_dtype("pearson_bwd", x, y);
  check_backward(dloss, coefficients, x, dout, levels);
  const torch::stable::accelerator::DeviceGuard guard(x[0].get_device_index());
  std::vector<Tensor> gradients;
  std::vector<LevelArgs> args;
  for (size_t i = 0; i < levels.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(x[i]));
    const void* added = dout.empty() ? nullptr : dout[i].const_data_ptr();
    args.push_back({x[i].const_data_ptr(), y[i].const_data_ptr(), added, gradients[i].mutable_data_ptr()});
  }
  const Plan plan(std::move(args), levels, x[0].element_size());
  const cudaStream_t stream = current_stream(x[0]);
  for (const Launch& launch : plan.launches) {
    dispatch(x[0].scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto kernel = launch.channels_last ? pearson_row_grad_kernel<T> : pearson_plane_grad_kernel<T>;
      launch_kernel(
          "pearson_grad", kernel, launch.blocks, kThreads, stream, launch.levels, dloss.const_data_ptr<float>(),
          coefficients.const_data_ptr<float>(), total_channels(levels));
    });
  }
  return gradients;
}

}  // namespace
}  // namespace jdkd::pearson

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CUDA, m) {
  m.impl("pearson_fwd", TORCH_BOX(&jdkd::pearson::pearson_fwd));
  m.impl("pearson_bwd", TORCH_BOX(&jdkd::pearson::pearson_bwd));
}
