// The Pearson distillation loss: what every backend shares.
//
// Over the m = N H W positions of one channel, with centred sums ss = sum (s - mean_s)^2, tt, st, the unbiased
// deviations std = sqrt(ss / (m - 1)) and D = std + eps:
//
//   loss_c = (ss / Ds^2 + tt / Dt^2 - 2 st / (Ds Dt)) / (2 m)
//   dx_i   = a (x_i - mean_x) + b (y_i - mean_y) + k
//
// for either tensor as x and the other as y. jdkd/reference/pearson.py holds the derivation.
//
// The residual. Near r = 1 the three terms of the loss cancel, so st is never summed directly: with any beta close to
// sqrt(ss / tt) a backend sums e = sum (ds - beta dt)^2 and takes st = (ss + beta^2 tt - e) / (2 beta). Rounding in ss
// and tt then cancels too, and the loss is good to about 1e-10 instead of 1e-7.
#pragma once

#include "common/checks.h"
#include "common/layout.h"

#include <cmath>
#include <tuple>
#include <vector>

#if defined(__CUDACC__)
#define JDKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JDKD_HOST_DEVICE inline
#endif

namespace jdkd::pearson {

using torch::stable::Tensor;

constexpr double kConstant = 1.0 / (1 << 20);  // a deviation below this part of the mean is a constant's rounding

// Rows of the coefficient table [2, kRows, sum of C]: entry 0 is the gradient of the student, 1 of the teacher.
enum Row : int { kA, kB, kK, kMeanX, kMeanY, kRows };

// The statistics of a set of positions: their number, both means, and the centred sums.
struct Moments {
  double n = 0, mean_s = 0, mean_t = 0, ss = 0, tt = 0, st = 0;
};
constexpr int kMoments = 6;

// A channel's moments lie `stride` apart, as a column of a float64 [kMoments, channels].
JDKD_HOST_DEVICE void store_moments(const Moments& q, double* column, int64_t stride) {
  column[0] = q.n;
  column[stride] = q.mean_s;
  column[2 * stride] = q.mean_t;
  column[3 * stride] = q.ss;
  column[4 * stride] = q.tt;
  column[5 * stride] = q.st;
}

JDKD_HOST_DEVICE Moments load_moments(const double* column, int64_t stride) {
  return {column[0], column[stride], column[2 * stride], column[3 * stride], column[4 * stride], column[5 * stride]};
}

// Chan, Golub, LeVeque (1983): the statistics of two disjoint sets joined. Callers keep the order fixed.
JDKD_HOST_DEVICE Moments merge(const Moments& p, const Moments& q) {
  const double n = p.n + q.n, share = q.n / (n > 0 ? n : 1), weight = p.n * share;
  const double gap_s = q.mean_s - p.mean_s, gap_t = q.mean_t - p.mean_t;
  return {
      n,
      p.mean_s + share * gap_s,
      p.mean_t + share * gap_t,
      p.ss + q.ss + weight * gap_s * gap_s,
      p.tt + q.tt + weight * gap_t * gap_t,
      p.st + q.st + weight * gap_s * gap_t};
}

// The factor of the residual. Any positive value is exact in exact arithmetic, so extremes are simply clamped.
JDKD_HOST_DEVICE float residual_beta(float ss, float tt) {
  const float ratio = (ss > 0.0f && tt > 0.0f) ? sqrtf(ss / tt) : 1.0f;
  return ratio > 1e15f ? 1e15f : (ratio < 1e-15f ? 1e-15f : ratio);
}

// A tile's moments from what was summed around the rounded means: sum ds, sum dt, sum ds^2, sum dt^2 and the residual.
// The first two are zero but for the rounding of the means, which they correct.
JDKD_HOST_DEVICE Moments tile_moments(
    double n, float mean_s, float mean_t, double ds, double dt, double ss, double tt, double beta, double e) {
  const double rest = ds - beta * dt;
  ss -= ds * ds / n;
  tt -= dt * dt / n;
  e -= rest * rest / n;
  ss = ss < 0 ? 0 : ss;
  tt = tt < 0 ? 0 : tt;
  const double varies = (ss == 0) | (tt == 0) ? 0.0 : 1.0;
  return {n, mean_s + ds / n, mean_t + dt / n, ss, tt, varies * (ss + beta * beta * tt - e) / (2 * beta)};
}

constexpr double kFar = 8;  // times the ratio of the deviations: such a beta is not near it

// The same where beta is a guess that is not made again: of positions whose deviations turn out to be in another ratio,
// as where an object stands on a background that is still in one of the two, the plain sum of ds dt is nearer to st.
JDKD_HOST_DEVICE Moments tile_moments(
    double n, float mean_s, float mean_t, double ds, double dt, double ss, double tt, double beta, double e,
    double plain) {
  Moments q = tile_moments(n, mean_s, mean_t, ds, dt, ss, tt, beta, e);
  const double rest = ds - beta * dt, most = sqrt(q.ss * q.tt);
  if (!(e - rest * rest / n <= kFar * beta * most)) {
    plain -= ds * dt / n;
    q.st = plain > most ? most : (plain < -most ? -most : plain);
  }
  return q;
}

// The unbiased standard deviation; one element has none.
JDKD_HOST_DEVICE double deviation(double m, double squares) { return m < 2 ? 0 : sqrt(squares / (m - 1)); }

// One table entry: the gradient with respect to x, times `scale`: weight / C, or 0 for a channel that does not count.
// a and b are rounded first and k is formed from the rounded values, so that the gradient keeps its zero mean.
JDKD_HOST_DEVICE void gradient_row(
    double m, double mean_x, double mean_y, double xx, double yy, double xy, double scale, double eps, float* row,
    int64_t stride) {
  const bool counts = m >= 2 && scale != 0;
  const double std_x = deviation(m, xx), std_y = deviation(m, yy), dx = std_x + eps, dy = std_y + eps;
  const bool moves = counts && std_x > 0;
  const double a_wide = moves ? eps / (dx * dx * dx) + xy / ((m - 1) * std_x * dx * dx * dy) : 0;
  const float a = static_cast<float>(scale * a_wide / m);
  const float b = counts ? static_cast<float>(-scale / (m * dx * dy)) : 0.0f;
  const float shift_x = static_cast<float>(mean_x), shift_y = static_cast<float>(mean_y);
  row[kA * stride] = a;
  row[kB * stride] = b;
  row[kK * stride] = static_cast<float>(-a * (mean_x - shift_x) - b * (mean_y - shift_y));
  row[kMeanX * stride] = shift_x;
  row[kMeanY * stride] = shift_y;
}

// Whether student or teacher never changes in a channel of these deviations. Never where one of them is NaN.
JDKD_HOST_DEVICE bool is_constant(const Moments& q, double std_s, double std_t) {
  const bool defined = std_s == std_s && std_t == std_t;
  return defined && (std_s <= kConstant * fabs(q.mean_s) || std_t <= kConstant * fabs(q.mean_t));
}

// Writes both table entries of one channel (of a table with `channels` columns) and returns its share of the loss.
// `scale` is weight / C. With skip_constant a constant channel has neither loss nor gradient.
JDKD_HOST_DEVICE double finish_channel(
    const Moments& q, double scale, double eps, bool skip_constant, float* column, int64_t channels) {
  const double std_s = deviation(q.n, q.ss), std_t = deviation(q.n, q.tt);
  if (skip_constant && is_constant(q, std_s, std_t)) {
    scale = 0;
  }
  gradient_row(q.n, q.mean_s, q.mean_t, q.ss, q.tt, q.st, scale, eps, column, channels);
  gradient_row(q.n, q.mean_t, q.mean_s, q.tt, q.ss, q.st, scale, eps, column + kRows * channels, channels);
  if (q.n < 2 || scale == 0) {
    return (q.mean_s + q.mean_t) * 0;  // 0, or NaN for a NaN
  }
  const double ds = std_s + eps, dt = std_t + eps;
  const double loss = q.ss / (ds * ds) + q.tt / (dt * dt) - 2 * q.st / (ds * dt);
  return scale * (loss < 0 ? 0 : loss) / (2 * q.n);
}

// One feature level. Both tensors are dense in the same layout.
struct Level {
  int64_t n, c, hw;
  int64_t first_channel;  // its first column in the coefficient table
  bool channels_last;

  int64_t positions() const { return n * hw; }
};

// The columns of all levels together, the sum of C.
inline int64_t total_channels(const std::vector<Level>& levels) {
  return levels.back().first_channel + levels.back().c;
}

// Checks the contract of both operators and describes the levels. Shapes are [N, C, H, W].
std::vector<Level> describe_levels(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& y);

// Checks that there is one weight a level.
void check_weights(const char* op, const std::vector<double>& weights, const std::vector<Level>& levels);

// Checks what a backward gets besides the levels of x: the table, fp32 [kRows, sum of C], contiguous; the incoming
// gradient, one fp32 value; and dout, empty or a tensor a level of x's shape, dtype and layout.
void check_backward(
    const Tensor& dloss, const Tensor& coefficients, const std::vector<Tensor>& x, const std::vector<Tensor>& dout,
    const std::vector<Level>& levels);

// What a forward returns, uninitialised.
struct Results {
  Tensor loss;     // [], float32
  Tensor losses;   // [L], float32
  Tensor table;    // [2, kRows, sum of C], float32
  Tensor moments;  // [kMoments, sum of C], float64

  Results(const Tensor& like, const std::vector<Level>& levels);
  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const { return {loss, losses, table, moments}; }
};

}  // namespace jdkd::pearson
