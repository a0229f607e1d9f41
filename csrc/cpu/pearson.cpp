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

constexpr int64_t kTile = 2048;       // positions of one channel: two tensors in half a first cache
constexpr int64_t kRowTile = 32768;   // elements of a tile of rows: two tensors in a small second cache
constexpr int64_t kMaxRows = 256;     // of a tile
constexpr int64_t kPlaneChunk = 16 * kTile;  // positions that one task reduces
constexpr int64_t kTilesPerChunk = 8;        // likewise for rows
constexpr int64_t kRowPiece = 4096;          // elements that the gradient writes at a time

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

void gradient_run(Cursor x, Cursor y, int64_t n, Gradient g, float dloss, char* dx) {
  alignas(64) float x_buffer[kTile], y_buffer[kTile];
  const bool is_float = x.type == ScalarType::Float;
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i);
    char* to = dx + i * x.itemsize();
    float* result = is_float ? reinterpret_cast<float*>(to) : x_buffer;
    gradient(as_floats(x + i, count, x_buffer), as_floats(y + i, count, y_buffer), count, g, dloss, result);
    if (!is_float) {
      round_floats(x_buffer, count, to, x.type);
    }
  }
}

// ---- rows of channels, channels-last ----

// Moments of c channels side by side; n is theirs in common.
struct RowMoments {
  double n = 0;
  std::vector<double> sums;  // [5, c]: mean_s, mean_t, ss, tt, st

  explicit RowMoments(int64_t c) : sums(5 * c) {}
  Moments channel(int64_t j) const {
    const int64_t c = sums.size() / 5;
    const double* at = sums.data() + j;
    return {n, at[0], at[c], at[2 * c], at[3 * c], at[4 * c]};
  }
  void set(int64_t j, const Moments& q) {
    const int64_t c = sums.size() / 5;
    double* at = sums.data() + j;
    at[0] = q.mean_s, at[c] = q.mean_t, at[2 * c] = q.ss, at[3 * c] = q.tt, at[4 * c] = q.st;
  }
};

// What one thread needs for a tile of rows.
class RowTile {
 public:
  // Buffers for `widened` elements of each tensor, and the sums of c channels.
  RowTile(int64_t widened, int64_t c) : c_(c), s_(widened), t_(widened), sums_(8 * c) {}

  void add(Cursor s, Cursor t, int64_t rows, RowMoments& total) {
    const float* s_tile = as_floats(s, rows * c_, s_.data());
    const float* t_tile = as_floats(t, rows * c_, t_.data());
    float *mean_s = row(0), *mean_t = row(1), *beta = row(2), *residual = row(3);
    const RowSums q{row(4), row(5), row(6), row(7)};
    row_sums(s_tile, rows, c_, mean_s);
    row_sums(t_tile, rows, c_, mean_t);
    for (int64_t j = 0; j < c_; ++j) {
      mean_s[j] /= rows;
      mean_t[j] /= rows;
    }
    row_centred_sums(s_tile, t_tile, rows, c_, mean_s, mean_t, q);
    for (int64_t j = 0; j < c_; ++j) {
      beta[j] = pearson::residual_beta(q.ss[j], q.tt[j]);
    }
    row_residual_sums(s_tile, t_tile, rows, c_, mean_s, mean_t, beta, residual);
    for (int64_t j = 0; j < c_; ++j) {
      const Moments tile = pearson::tile_moments(
          rows, mean_s[j], mean_t[j], q.ds[j], q.dt[j], q.ss[j], q.tt[j], beta[j], residual[j]);
      total.set(j, merge(total.channel(j), tile));
    }
    total.n += rows;
  }

 private:
  float* row(int64_t i) { return sums_.data() + i * c_; }

  int64_t c_;
  std::vector<float> s_, t_, sums_;
};

// At most kMaxRows: each channel's sums grow by one float32 a row.
int64_t rows_per_tile(int64_t c) { return std::clamp<int64_t>(kRowTile / c, 8, kMaxRows); }

void forward_rows(const Level& level, const Tensor& s, const Tensor& t, Moments* channels) {
  const int64_t tile = rows_per_tile(level.c), chunk = tile * kTilesPerChunk, m = level.positions();
  const bool is_widened = s.scalar_type() != ScalarType::Float || t.scalar_type() != ScalarType::Float;
  std::vector<RowMoments> parts(ceil_div(m, chunk), RowMoments(level.c));
  torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
    RowTile scratch(is_widened ? std::min(tile, m) * level.c : 0, level.c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = std::min(m, (i + 1) * chunk);
      for (int64_t r = i * chunk; r < last; r += tile) {
        scratch.add(cursor(s) + r * level.c, cursor(t) + r * level.c, std::min(tile, last - r), parts[i]);
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

void gradient_rows(
    Cursor x, Cursor y, int64_t rows, int64_t c, const RowGradient& g, float dloss, char* dx, float* buffers) {
  const bool is_float = x.type == ScalarType::Float;
  float* result = is_float ? reinterpret_cast<float*>(dx) : buffers;
  const float* x_rows = as_floats(x, rows * c, buffers);
  row_gradient(x_rows, as_floats(y, rows * c, buffers + rows * c), rows, c, g, dloss, result);
  if (!is_float) {
    round_floats(result, rows * c, dx, x.type);
  }
}

// ---- operators ----

std::tuple<Tensor, Tensor> pearson_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers, double loss_weight) {
  const std::vector<Level> levels = pearson::describe_levels("pearson_fwd", students, teachers);
  const int64_t channels = levels.back().first_channel + levels.back().c;
  Tensor loss = torch::stable::new_empty(students[0], {}, ScalarType::Float);
  Tensor table = torch::stable::new_empty(students[0], {2, pearson::kRows, channels}, ScalarType::Float);
  std::vector<Moments> moments(channels);
  double total = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    const Level& level = levels[i];
    Moments* of_level = moments.data() + level.first_channel;
    (level.channels_last ? forward_rows : forward_planes)(level, students[i], teachers[i], of_level);
    float* columns = table.mutable_data_ptr<float>() + level.first_channel;
    for (int64_t j = 0; j < level.c; ++j) {
      total += pearson::finish_channel(of_level[j], loss_weight / level.c, columns + j, channels);
    }
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  return {loss, table};
}

void backward_planes(
    const Level& level, Cursor x, Cursor y, const float* table, int64_t stride, float dloss, char* dx) {
  const int64_t pieces = ceil_div(level.hw, kTile), planes = level.n * level.c;
  const int64_t grain = std::max<int64_t>(1, kPlaneChunk / std::min(level.hw, kTile));
  torch::stable::parallel_for(0, planes * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* at = table + level.first_channel + i / pieces % level.c;
      const Gradient g{at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride]};
      const int64_t in_plane = i % pieces * kTile, first = i / pieces * level.hw + in_plane;
      gradient_run(x + first, y + first, std::min(kTile, level.hw - in_plane), g, dloss, dx + first * x.itemsize());
    }
  });
}

void backward_rows(const Level& level, Cursor x, Cursor y, const float* table, int64_t stride, float dloss, char* dx) {
  const float* at = table + level.first_channel;
  const bool is_widened = x.type != ScalarType::Float || y.type != ScalarType::Float;
  const RowGradient g{at, at + stride, at + 2 * stride, at + 3 * stride, at + 4 * stride};
  const int64_t m = level.positions(), tile = std::max<int64_t>(8, kRowPiece / level.c);
  torch::stable::parallel_for(0, ceil_div(m, tile), 4, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(is_widened ? 2 * tile * level.c : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * tile * level.c;
      const int64_t rows = std::min(tile, m - i * tile);
      gradient_rows(x + first, y + first, rows, level.c, g, dloss, dx + first * x.itemsize(), buffers.data());
    }
  });
}

std::vector<Tensor> pearson_bwd(Tensor dloss, std::vector<Tensor> x, std::vector<Tensor> y, Tensor coefficients) {
  const std::vector<Level> levels = pearson::describe_levels("pearson_bwd", x, y);
  const int64_t channels = levels.back().first_channel + levels.back().c;
  pearson::check_backward(dloss, coefficients, channels);
  const float upstream = *dloss.const_data_ptr<float>();
  const float* table = coefficients.const_data_ptr<float>();
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < levels.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(x[i]));
    char* dx = static_cast<char*>(gradients.back().mutable_data_ptr());
    ask_for_huge_pages(dx, x[i].numel() * x[i].element_size());
    (levels[i].channels_last ? backward_rows : backward_planes)(
        levels[i], cursor(x[i]), cursor(y[i]), table, channels, upstream, dx);
  }
  return gradients;
}

}  // namespace
}  // namespace jdkd::cpu

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) {
  m.impl("pearson_fwd", TORCH_BOX(&jdkd::cpu::pearson_fwd));
  m.impl("pearson_bwd", TORCH_BOX(&jdkd::cpu::pearson_bwd));
}
