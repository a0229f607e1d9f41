// The inner loops of the Pearson loss on the CPU: float32 in, one tile at a time, see pearson_sweeps.cpp.
#pragma once

#include "ops/pearson.h"

#include <cstdint>

namespace jdkd::cpu {

// What positions are summed around: near their means, and beta near the ratio of the deviations. Any values are right
// in exact arithmetic.
struct Guess {
  float mean_s, mean_t, beta;
};

// The sums of a tile around a guess, with ds = s - mean_s and dt = t - mean_t.
struct PairSums {
  double ds = 0, dt = 0, ss = 0, tt = 0;
  double e = 0;  // sum (ds - beta dt)^2

  void operator+=(const PairSums& more) {
    ds += more.ds, dt += more.dt, ss += more.ss, tt += more.tt, e += more.e;
  }
};

// Whether beta was near enough to the ratio of all positions' deviations for their sums to keep float32's digits: the
// nearer the more student and teacher agree, of whose loss the rounding of ss and tt must cancel.
inline bool is_near(double beta, const pearson::Moments& all) {
  const double own = beta * beta * all.tt, gap = own > all.ss ? own - all.ss : all.ss - own;
  const double e = all.ss + own - 2 * beta * all.st;
  const bool near = (own <= 8 * all.ss) & (all.ss <= 8 * own) & ((gap <= 2 * e) | (gap * 512 <= all.ss));
  return near | (all.ss == 0) | (all.tt == 0);
}

// ---- positions of one channel, [n] ----

PairSums pair_sums(const float* s, const float* t, int64_t n, Guess guess);

struct Gradient {
  float a, b, k, mean_x, mean_y;
};

// dx = dout + dloss (a (x - mean_x) + b (y - mean_y) + k), where dout may be null: 0
void gradient(const float* x, const float* y, const float* dout, int64_t n, Gradient g, float dloss, float* dx);

// ---- rows of channels; every array without a shape is [c] ----

struct RowGuess {
  const float *mean_s, *mean_t, *beta;

  RowGuess operator+(int64_t j) const { return {mean_s + j, mean_t + j, beta + j}; }
};

struct RowSums {
  double *ds, *dt, *ss, *tt, *e;

  RowSums operator+(int64_t j) const { return {ds + j, dt + j, ss + j, tt + j, e + j}; }
};

constexpr int64_t kRowsAtOnce = 16;  // float32 sums of more lose digits

// Dense rows, and those that follow where the tensor lies, which are asked for meanwhile: walking columns hides the
// order of memory from the hardware's prefetch.
struct Rows {
  const float* at;
  const char* next;
  int64_t itemsize;
};

// Adds up at most kRowsAtOnce rows of c channels around a guess.
void row_sums(Rows s, Rows t, int64_t rows, int64_t c, RowGuess guess, RowSums q);
// Joins a tile's moments to `before`, those of n rows, [5, c]: mean_s, mean_t, ss, tt, st. Whether every beta was near.
bool merge_rows(double rows, int64_t c, RowGuess guess, RowSums q, double n, const double* before, double* after);

struct RowGradient {
  const float *a, *b, *k, *mean_x, *mean_y;
};

// x, y, dout and dx are [rows, c], dense.
void row_gradient(
    const float* x, const float* y, const float* dout, int64_t rows, int64_t c, RowGradient g, float dloss, float* dx);

}  // namespace jdkd::cpu
