// The Pearson loss on the CPU: one sweep over memory for the statistics, one for the gradient.
//
// The statistics pass over a tile once, around a guess: the means of all tiles of the chunk before it, which it is no
// longer than, and a beta near the ratio of their deviations. What a tile adds to the squares around such means is at
// most about twice what it adds to the variance, so float32 keeps its digits whatever the mean. The first tile is
// passed over twice, for it has no guess, and any tile once more whose beta turns out to be far off. Tiles join their
// chunk's moments in float64 and chunks are joined in order, so the result depends neither on the number of threads nor
// on who runs first.
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

constexpr int64_t kBlock = 1024;              // positions of one channel; float32 sums of more lose digits
constexpr int64_t kTile = 4 * kBlock;         // positions of one channel that share a guess
constexpr int64_t kPlaneChunk = 32 * kBlock;  // positions that one task reduces
constexpr int64_t kFirstRows = 64;            // rows whose guess is their own
constexpr int64_t kMaxRows = 512;             // rows that share a guess
constexpr int64_t kRowChunk = 2048;           // most rows that one task reduces
constexpr int64_t kLeastRows = 256;           // and least, where there are fewer than kLeastTasks tasks
constexpr int64_t kLeastTasks = 8;
constexpr int64_t kPiece = 512;               // elements of a gradient at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Cursor cursor(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type()}; }

// Joins the moments of a channel's chunks, [c, chunks].
void join_chunks(const std::vector<Moments>& parts, int64_t chunks, int64_t c, Moments* channels) {
  for (int64_t channel = 0; channel < c; ++channel) {
    channels[channel] = parts[channel * chunks];
    for (int64_t i = 1; i < chunks; ++i) {
      channels[channel] = merge(channels[channel], parts[channel * chunks + i]);
    }
  }
}

// ---- channels as planes, NCHW ----
// A channel's positions are numbered 0..N*HW through all images; a tile may cross from one image to the next.

struct Planes {
  Cursor base;
  int64_t c, hw;

  Cursor at(int64_t channel, int64_t position) const {
    return base + ((position / hw) * c + channel) * hw + position % hw;
  }
};

// Sums of n positions from `first` on.
PairSums summed(const Planes& s, const Planes& t, int64_t channel, int64_t first, int64_t n, const Guess& guess) {
  PairSums total;
  for (int64_t i = first, run; i < first + n; i += run) {
    run = std::min({first + n - i, s.hw - i % s.hw, kBlock});
    total += sweeps().pair_sums(s.at(channel, i), t.at(channel, i), run, guess);
  }
  return total;
}

Moments joined(const Moments& before, double n, const Guess& guess, const PairSums& q) {
  return merge(
      before, pearson::tile_moments(n, guess.mean_s, guess.mean_t, q.ds, q.dt, q.ss, q.tt, guess.beta, q.e));
}

float beta_of(double ss, double tt) { return pearson::residual_beta(static_cast<float>(ss / tt), 1.0f); }

void move_to(const Moments& q, Guess& guess) {
  guess.mean_s = static_cast<float>(q.mean_s);
  guess.mean_t = static_cast<float>(q.mean_t);
}

Moments plane_moments(const Planes& s, const Planes& t, int64_t channel, int64_t first, int64_t last) {
  Guess guess{0, 0, 1};
  copy_floats(s.at(channel, first), 1, &guess.mean_s);
  copy_floats(t.at(channel, first), 1, &guess.mean_t);
  Moments total;
  for (int64_t i = first, n; i < last; i += n) {
    n = std::min(last - i, std::clamp(i - first, kBlock, kTile));
    if (i == first) {
      const Moments rough = joined({}, n, guess, summed(s, t, channel, i, n, guess));
      move_to(rough, guess);
      guess.beta = beta_of(rough.ss, rough.tt);
    }
    Moments all = joined(total, n, guess, summed(s, t, channel, i, n, guess));
    if (!is_near(guess.beta, all)) {
      guess.beta = beta_of(all.ss, all.tt);
      all = joined(total, n, guess, summed(s, t, channel, i, n, guess));
    }
    total = all;
    move_to(total, guess);
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
  join_chunks(parts, chunks, level.c, channels);
}

// The gradient of one level: what it is of, and the level's columns of the table [kRows, stride].
struct Backward {
  GradientOf of;
  const float* table;
  int64_t stride;
  float dloss;
};

void backward_planes(const Level& level, const Backward& to_do) {
  const int64_t pieces = ceil_div(level.hw, kPiece), planes = level.n * level.c, stride = to_do.stride;
  const int64_t grain = std::max<int64_t>(1, kPlaneChunk / std::min(level.hw, kPiece));
  torch::stable::parallel_for(0, planes * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* at = to_do.table + i / pieces % level.c;
      const Gradient g{at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride]};
      const int64_t in_plane = i % pieces * kPiece, n = std::min(kPiece, level.hw - in_plane);
      sweeps().gradient(to_do.of + (i / pieces * level.hw + in_plane), n, g, to_do.dloss);
    }
  });
}

// ---- rows of channels, channels-last ----

// The moments of c channels side by side, of the rows that were added so far, and the guess for those to come.
class RowMoments {
 public:
  explicit RowMoments(int64_t channels)
      : c_(channels), total_(5 * c_), next_(5 * c_), sums_(5 * c_), guess_(3 * c_) {}

  // Takes up some rows, [rows, c], and forgets what was before.
  void reduce(Cursor s, Cursor t, int64_t rows) {
    n_ = 0;
    std::fill(total_.begin(), total_.end(), 0.0);
    copy_floats(s, c_, guess_.data());
    copy_floats(t, c_, guess_.data() + c_);
    std::fill(guess_.begin() + 2 * c_, guess_.end(), 1.0f);
    for (int64_t i = 0, n; i < rows; i += n) {
      n = std::min(rows - i, std::clamp(i, kFirstRows, kMaxRows));
      const Cursor s_tile = s + i * c_, t_tile = t + i * c_;
      bool near = add(s_tile, t_tile, n);
      if (i == 0) {
        guess_means();
        guess_betas();
        near = add(s_tile, t_tile, n);
      }
      if (!near) {
        guess_betas();
        add(s_tile, t_tile, n);
      }
      n_ += n;
      total_.swap(next_);
      std::copy(total_.begin(), total_.begin() + 2 * c_, guess_.begin());
    }
  }

  Moments channel(int64_t j) const {
    const double* at = total_.data() + j;
    return {static_cast<double>(n_), at[0], at[c_], at[2 * c_], at[3 * c_], at[4 * c_]};
  }

 private:
  // The moments with those of a tile are next_. Whether every beta was near.
  bool add(Cursor s, Cursor t, int64_t rows) {
    const RowGuess guess{guess_.data(), guess_.data() + c_, guess_.data() + 2 * c_};
    double* at = sums_.data();
    const RowSums q{at, at + c_, at + 2 * c_, at + 3 * c_, at + 4 * c_};
    std::fill(sums_.begin(), sums_.end(), 0.0);
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      sweeps().row_sums(s + r * c_, t + r * c_, std::min(kRowsAtOnce, rows - r), c_, guess, q);
    }
    return sweeps().merge_rows(rows, c_, guess, q, n_, total_.data(), next_.data());
  }

  void guess_means() { std::copy(next_.begin(), next_.begin() + 2 * c_, guess_.begin()); }

  void guess_betas() {
    for (int64_t j = 0; j < c_; ++j) {
      guess_[2 * c_ + j] = beta_of(next_[2 * c_ + j], next_[3 * c_ + j]);
    }
  }

  int64_t c_, n_ = 0;
  std::vector<double> total_, next_, sums_;  // [5, c] each
  std::vector<float> guess_;                 // [3, c]: mean_s, mean_t, beta
};

// Rows that one task reduces of m: about as many as any other, and enough tasks for several threads.
int64_t rows_per_chunk(int64_t m) {
  return ceil_div(m, std::max(ceil_div(m, kRowChunk), std::clamp<int64_t>(m / kLeastRows, 1, kLeastTasks)));
}

void forward_rows(const Level& level, const Tensor& s, const Tensor& t, Moments* channels) {
  const int64_t m = level.positions(), c = level.c, chunk = rows_per_chunk(m), chunks = ceil_div(m, chunk);
  std::vector<Moments> parts(chunks * c);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    RowMoments moments(c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk;
      moments.reduce(cursor(s) + first * c, cursor(t) + first * c, std::min(chunk, m - first));
      for (int64_t j = 0; j < c; ++j) {
        parts[j * chunks + i] = moments.channel(j);
      }
    }
  });
  join_chunks(parts, chunks, level.c, channels);
}

void backward_rows(const Level& level, const Backward& to_do) {
  const int64_t stride = to_do.stride, m = level.positions(), tile = std::max<int64_t>(1, kPiece / level.c);
  const float* at = to_do.table;
  const RowGradient g{at, at + stride, at + 2 * stride, at + 3 * stride, at + 4 * stride};
  torch::stable::parallel_for(0, ceil_div(m, tile), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * tile, rows = std::min(end * tile, m) - first;
    sweeps().row_gradient(to_do.of + first * level.c, rows, level.c, g, to_do.dloss);
  });
}

// ---- operators ----

// Checks that there is a dx a level, like x.
void check_written(const std::vector<Tensor>& x, const std::vector<Tensor>& dx, const std::vector<Level>& levels) {
  check(
      dx.size() == x.size(), "pearson_bwd_into: ", dx.size(), " tensors dx were given for ", x.size(),
      " levels; give one a level");
  for (size_t i = 0; i < dx.size(); ++i) {
    check_same_shape("pearson_bwd_into", "a level of dx", dx[i], "its level of x", x[i]);
    check(
        dx[i].scalar_type() == x[i].scalar_type() && dx[i].is_cpu() &&
            (levels[i].channels_last ? is_dense_nhwc(dx[i]) : is_dense_nchw(dx[i])),
        "pearson_bwd_into: dx of level ", i, " differs in dtype, device or layout from x; make it with empty_like(x)");
  }
}

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
  check_written(x, dx, levels);
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
