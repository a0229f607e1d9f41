// The inner loops of the Pearson loss on the CPU, one tile at a time: float32 arithmetic over elements of any type.
#pragma once

#include "cpu/convert.h"
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

struct Gradient {
  float a, b, k, mean_x, mean_y;
};

// The gradient of x: dx = dout + dloss (a (x - mean_x) + b (y - mean_y) + k). dout, which may be null: 0, and dx are of
// x's type.
struct GradientOf {
  Cursor x, y;
  const char* dout;
  char* dx;

  GradientOf operator+(int64_t elements) const {
    const int64_t bytes = elements * x.itemsize();
    return {x + elements, y + elements, dout ? dout + bytes : nullptr, dx + bytes};
  }
};

// ---- rows of channels; every array without a shape is [c] ----

struct RowGuess {
  const float *mean_s, *mean_t, *beta;
};

struct RowSums {
  double *ds, *dt, *ss, *tt, *e;
};

constexpr int64_t kRowsAtOnce = 16;  // float32 sums of more lose digits

struct RowGradient {
  const float *a, *b, *k, *mean_x, *mean_y;
};

// The loops of one instruction set.
struct Sweeps {
  // The sums of n positions of one channel around a guess; float32 sums of more than 1024 lose digits.
  PairSums (*pair_sums)(Cursor s, Cursor t, int64_t n, const Guess& guess);
  // The gradient of n positions of one channel.
  void (*gradient)(const GradientOf& of, int64_t n, const Gradient& g, float dloss);
  // Adds up at most kRowsAtOnce dense rows of c channels around a guess, and asks the second cache for the rows that
  // follow: walking columns hides the order of memory from the hardware's prefetch.
  void (*row_sums)(Cursor s, Cursor t, int64_t rows, int64_t c, const RowGuess& guess, const RowSums& q);
  // Joins a tile's moments to `before`, those of n rows, [5, c]: mean_s, mean_t, ss, tt, st. Whether every beta was
  // near.
  bool (*merge_rows)(
      double rows, int64_t c, const RowGuess& guess, const RowSums& q, double n, const double* before, double* after);
  // The gradient of dense rows of c channels.
  void (*row_gradient)(const GradientOf& of, int64_t rows, int64_t c, const RowGradient& g, float dloss);
};

// Those of this processor.
const Sweeps& sweeps();

}  // namespace jdkd::cpu
