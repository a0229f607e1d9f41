// The Pearson loss of one level on the CPU, in either layout: a sweep for the statistics, and one for the gradient.
//
// The statistics pass over a tile once, around a guess: the means of all tiles of the chunk before it, which it is no
// longer than, and a beta near the ratio of their deviations. What a tile adds to the squares around such means is at
// most about twice what it adds to the variance, so float32 keeps its digits whatever the mean. The first tile is
// passed over twice, for it has no guess, and any tile once more whose beta turns out to be far off. Tiles join their
// chunk's moments in float64 and chunks are joined in order, so the result depends neither on the number of threads nor
// on who runs first.
#pragma once

#include "cpu/pearson_sweeps.h"
#include "ops/pearson.h"

#include <numeric>
#include <vector>

namespace jdkd::cpu {

using pearson::Level;
using pearson::Moments;
using torch::stable::Tensor;

constexpr int64_t kPiece = 512;  // elements of a gradient at a time

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Cursor cursor(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type()}; }

inline float beta_of(double ss, double tt) { return pearson::residual_beta(static_cast<float>(ss / tt), 1.0f); }

// Joins the moments of a channel's chunks, [c, chunks], in order.
inline void join_chunks(const std::vector<Moments>& parts, int64_t c, Moments* channels) {
  const int64_t chunks = static_cast<int64_t>(parts.size()) / c;
  for (int64_t channel = 0; channel < c; ++channel) {
    const Moments* own = parts.data() + channel * chunks;
    channels[channel] = std::accumulate(own + 1, own + chunks, own[0], pearson::merge);
  }
}

// The gradient of one level: what it is of, and the level's columns of the table [kRows, stride].
struct Backward {
  GradientOf of;
  const float* table;
  int64_t stride;
  float dloss;
};

// Checks that there is a gradient a level, like it.
void check_written(
    const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& dx, const std::vector<Level>& levels);

// ---- channels as planes, NCHW ----

// The moments of the level's channels, [c].
void forward_planes(const Level& level, const Tensor& s, const Tensor& t, Moments* channels);
void backward_planes(const Level& level, const Backward& to_do);

// The same of one channel, on the thread that calls.
Moments channel_moments(const Level& level, const Tensor& s, const Tensor& t, int64_t channel);
void channel_gradient(const Level& level, const Backward& to_do, int64_t channel);

// ---- rows of channels, channels-last ----

void forward_rows(const Level& level, const Tensor& s, const Tensor& t, Moments* channels);
void backward_rows(const Level& level, const Backward& to_do);

}  // namespace jdkd::cpu
