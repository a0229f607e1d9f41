// The Pearson loss on the CPU: one sweep over memory for the statistics, one for the gradient.
//
// A sweep walks tiles that fit the cache. The statistics pass over a tile three times (means, centred squares,
// residual) and merge it into a chunk's moments in float64; chunks are joined in order, so the result depends neither
// on the number of threads nor on who runs first.
#include "common/memory.h"
#include "common/vec.h"
#include "cpu/convert.h"
#include "cpu/pearson_sweeps.h"
#include "ops/pearson.h"

#include <algorithm>
#include <memory>

namespace jdkd::cpu {
namespace {

using pearson::Level;
using pearson::Moments;
using torch::stable::Tensor;

constexpr int64_t kTile = 1024;              // positions of one channel; float32 sums of more lose digits
constexpr int64_t kRowTile = 65536;          // elements of a tile of rows
constexpr int64_t kMaxRows = 128;            // of a tile: two slabs of float32 in half of the first cache
constexpr int64_t kPlaneChunk = 32 * kTile;  // positions that one task reduces
constexpr int64_t kTilesPerChunk = 8;        // likewise for rows
constexpr int64_t kPiece = 512;              // elements widened or written at a time; long runs starve the prefetch

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Cursor cursor(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type()}; }

// ---- channels as planes, NCHW ----
// A channel's positions are numbered 0..N*HW through all images; a tile may cross from one image to the next.

struct Planes {
  Cursor base;
  int64_t c, hw;

  Cursor at(int64_t channel, int64_t position) const {
    return base + ((position / hw) * c + channel) * hw + position % hw;
  }
};

// n positions from `first` on as floats: where they lie if they are float32 of one image, else in buffer.
const float* gather(const Planes& planes, int64_t channel, int64_t first, int64_t n, float* buffer) {
  if (first % planes.hw + n <= planes.hw) {
    return as_floats(planes.at(channel, first), n, buffer);
  }
  for (int64_t done = 0; done < n;) {
    const int64_t run = std::min(n - done, planes.hw - (first + done) % planes.hw);
    copy_floats(planes.at(channel, first + done), run, buffer + done);
    done += run;
  }
  return buffer;
}

Moments plane_moments(const Planes& s, const Planes& t, int64_t channel, int64_t first, int64_t last) {
  alignas(64) float s_buffer[kTile], t_buffer[kTile];
  Moments total;
  for (int64_t i = first; i < last; i += kTile) {
    const int64_t n = std::min(kTile, last - i);
    const float* s_tile = gather(s, channel, i, n, s_buffer);
    const float* t_tile = gather(t, channel, i, n, t_buffer);
    const float mean_s = static_cast<float>(sum(s_tile, n) / n), mean_t = static_cast<float>(sum(t_tile, n) / n);
    const CentredSums q = centred_sums(s_tile, t_tile, n, mean_s, mean_t);
    const float beta = pearson::residual_beta(static_cast<float>(q.ss), static_cast<float>(q.tt));
    const double e = residual_sum(s_tile, t_tile, n, mean_s, mean_t, beta);
    total = merge(total, pearson::tile_moments(n, mean_s, mean_t, q.ds, q.dt, q.ss, q.tt, beta, e));
  }
  return total;
}

void forward_planes(const Level& level, const Tensor& s, const Tensor& t, Moments* channels) {
  const Planes s_planes{cursor(s), level.c, level.hw}, t_planes{cursor(t), level.c, level.hw};
  const int64_t m = level.positions(), chunk = kPlaneChunk, chunks = ceil_div(m, chunk);
  std::vector<Moments> parts(level.c * chunks);
  const int64_t grain = std::max<int64_t>(1, chunk / std::min(m, chunk));
  torch::stable::parallel_for(0, level.c * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * chunk;
      parts[i] = plane_moments(s_planes, t_planes, i / chunks, first, std::min(m, first + chunk));
    }
  });
  for (int64_t channel = 0; channel < level.c; ++channel) {
    channels[channel] = parts[channel * chunks];
    for (int64_t i = 1; i < chunks; ++i) {
      channels[channel] = merge(channels[channel], parts[channel * chunks + i]);
    }
  }
}

// The gradient of one level: all that its kernels read, and where they write.
struct Backward {
  Cursor x, y, dout;  // dout may be null
  char* dx;
  const float* table;  // the level's columns of [kRows, stride]
  int64_t stride;
  float dloss;

  bool is_float() const { return x.type == ScalarType::Float; }
  bool is_widened() const { return !is_float() || y.type != ScalarType::Float; }

  // Calls compute(x, y, dout, dx) with n elements from `first` on as floats; needs three buffers of `size` >= n.
  template <class Compute>
  void apply(int64_t first, int64_t n, float* buffers, int64_t size, const Compute& compute) const {
    char* to = dx + first * x.itemsize();
    const float* x_floats = as_floats(x + first, n, buffers);
    const float* y_floats = as_floats(y + first, n, buffers + size);
    const float* added = dout.at ? as_floats(dout + first, n, buffers + 2 * size) : nullptr;
    compute(x_floats, y_floats, added, is_float() ? reinterpret_cast<float*>(to) : buffers);
    if (!is_float()) {
      round_floats(buffers, n, to, x.type);
    }
  }
};

void backward_planes(const Level& level, const Backward& of) {
  const int64_t pieces = ceil_div(level.hw, kPiece), planes = level.n * level.c;
  const int64_t grain = std::max<int64_t>(1, kPlaneChunk / std::min(level.hw, kPiece));
  torch::stable::parallel_for(0, planes * pieces, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float buffers[3 * kPiece];
    for (int64_t i = begin; i < end; ++i) {
      const float* at = of.table + i / pieces % level.c;
      const Gradient g{at[0], at[of.stride], at[2 * of.stride], at[3 * of.stride], at[4 * of.stride]};
      const int64_t in_plane = i % pieces * kPiece, n = std::min(kPiece, level.hw - in_plane);
      of.apply(i / pieces * level.hw + in_plane, n, buffers, kPiece, [&](auto x, auto y, auto dout, float* dx) {
        gradient(x, y, dout, n, g, of.dloss, dx);
      });
    }
  });
}

// ---- rows of channels, channels-last ----

// Moments of c channels side by side; n is theirs in common.
struct RowMoments {
  double n = 0;
  int64_t c;
  std::vector<double> sums;  // [5, c]: mean_s, mean_t, ss, tt, st

  explicit RowMoments(int64_t channels) : c(channels), sums(5 * channels) {}
  Moments channel(int64_t j) const {
    const double* at = sums.data() + j;
    return {n, at[0], at[c], at[2 * c], at[3 * c], at[4 * c]};
  }
};

// What one thread needs for a tile of rows. The tile is taken slab by slab, and the next one is fetched meanwhile.
class RowTile {
 public:
  RowTile(int64_t rows, int64_t c)
      : c_(c), padded_(std::max(c, kSlab)), s_(rows * kSlab), t_(rows * kSlab), sums_(8 * padded_) {}

  // Adds `rows` rows to the total; at least `ahead` <= rows more follow them.
  void add(Cursor s, Cursor t, int64_t rows, int64_t ahead, RowMoments& total) {
    const RowSums q{row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)};
    for (int64_t i = 0; i < c_; i += kSlab) {
      const int64_t j = std::max<int64_t>(0, std::min(i, c_ - kSlab));  // the last slab may overlap
      slab_sums(slab(s, j, rows, ahead, s_.data()), slab(t, j, rows, ahead, t_.data()), rows, q, j);
    }
    merge_rows(rows, c_, q, total.n, total.sums.data());
    total.n += rows;
  }

 private:
  float* row(int64_t i) { return sums_.data() + i * padded_; }

  // The slab from channel j on: where it lies if it is whole and float32, else in buffer.
  Slab slab(Cursor x, int64_t j, int64_t rows, int64_t ahead, float* buffer) const {
    const Cursor next = x + rows * c_ + ahead * j;
    const int64_t next_stride = ahead * std::min(kSlab, c_) / rows * x.itemsize();
    if (c_ < kSlab) {
      for (int64_t r = 0; r < rows; ++r) {
        copy_floats(x + r * c_, c_, buffer + r * kSlab);
      }
    } else if (x.type == ScalarType::Float) {
      return {reinterpret_cast<const float*>((x + j).at), c_, next.at, next_stride};
    } else {
      widen_rows(x + j, c_, rows, buffer);
    }
    return {buffer, kSlab, next.at, next_stride};
  }

  int64_t c_, padded_;
  std::vector<float> s_, t_, sums_;  // [rows, kSlab] twice and [8, padded]
};

int64_t rows_per_tile(int64_t c) { return std::clamp<int64_t>(kRowTile / c, 8, kMaxRows); }

void forward_rows(const Level& level, const Tensor& s, const Tensor& t, Moments* channels) {
  const int64_t tile = rows_per_tile(level.c), chunk = tile * kTilesPerChunk, m = level.positions();
  std::vector<RowMoments> parts(ceil_div(m, chunk), RowMoments(level.c));
  torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
    RowTile scratch(tile, level.c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = std::min(m, (i + 1) * chunk);
      for (int64_t r = i * chunk; r < last; r += tile) {
        const int64_t rows = std::min(tile, last - r), ahead = std::min(tile, m - r - rows);
        scratch.add(cursor(s) + r * level.c, cursor(t) + r * level.c, rows, ahead, parts[i]);
      }
    }
  });
  for (int64_t j = 0; j < level.c; ++j) {
    channels[j] = parts[0].channel(j);
    for (size_t i = 1; i < parts.size(); ++i) {
      channels[j] = merge(channels[j], parts[i].channel(j));
    }
  }
}

void backward_rows(const Level& level, const Backward& of) {
  const int64_t stride = of.stride, m = level.positions(), tile = std::max<int64_t>(1, kPiece / level.c);
  const float* at = of.table;
  const RowGradient g{at, at + stride, at + 2 * stride, at + 3 * stride, at + 4 * stride};
  torch::stable::parallel_for(0, ceil_div(m, tile), 4, [&](int64_t begin, int64_t end) {
    const int64_t size = of.is_widened() ? tile * level.c : 0;
    std::vector<float> buffers(3 * size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t rows = std::min(tile, m - i * tile), n = rows * level.c;
      of.apply(i * tile * level.c, n, buffers.data(), size, [&](auto x, auto y, auto dout, float* dx) {
        row_gradient(x, y, dout, rows, level.c, g, of.dloss, dx);
      });
    }
  });
}

// ---- operators ----

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

std::vector<Tensor> pearson_bwd(
    Tensor dloss, std::vector<Tensor> x, std::vector<Tensor> y, Tensor coefficients, std::vector<Tensor> dout) {
  const std::vector<Level> levels = pearson::describe_levels("pearson_bwd", x, y);
  pearson::check_backward(dloss, coefficients, x, dout, levels);
  const int64_t channels = pearson::total_channels(levels);
  const float upstream = *dloss.const_data_ptr<float>();
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < levels.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(x[i]));
    char* dx = static_cast<char*>(gradients.back().mutable_data_ptr());
    ask_for_huge_pages(dx, x[i].numel() * x[i].element_size());
    const Cursor added = dout.empty() ? Cursor(nullptr, x[i].scalar_type()) : cursor(dout[i]);
    const float* table = coefficients.const_data_ptr<float>() + levels[i].first_channel;
    (levels[i].channels_last ? backward_rows : backward_planes)(
        levels[i], {cursor(x[i]), cursor(y[i]), added, dx, table, channels, upstream});
  }
  return gradients;
}

}  // namespace
}  // namespace jdkd::cpu

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) {
  m.impl("pearson_fwd", TORCH_BOX(&jdkd::cpu::pearson_fwd));
  m.impl("pearson_bwd", TORCH_BOX(&jdkd::cpu::pearson_bwd));
}
