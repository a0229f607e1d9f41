// The inner loops of the Pearson loss on the CPU: float32 in, one tile at a time, see pearson_sweeps.cpp.
#pragma once

#include "cpu/convert.h"

#include <cstdint>

namespace jdkd::cpu {

// ---- positions of one channel, [n] ----

struct CentredSums {
  double ds, dt, ss, tt;
};

double sum(const float* x, int64_t n);
CentredSums centred_sums(const float* s, const float* t, int64_t n, float mean_s, float mean_t);
// sum ((s - mean_s) - beta (t - mean_t))^2
double residual_sum(const float* s, const float* t, int64_t n, float mean_s, float mean_t, float beta);

struct Gradient {
  float a, b, k, mean_x, mean_y;
};

// dx = dout + dloss (a (x - mean_x) + b (y - mean_y) + k), where dout may be null: 0
void gradient(const float* x, const float* y, const float* dout, int64_t n, Gradient g, float dloss, float* dx);

// ---- rows of channels; every array without a shape is [c] ----

// The sums of a tile, around its rounded means; beta and the residual as in ops/pearson.h.
struct RowSums {
  float *mean_s, *mean_t, *ds, *dt, *ss, *tt, *beta, *residual;
};

// kSlab channels of a tile: its rows lie `stride` floats apart. What each row asks the second cache for meanwhile, its
// part of the next tile, lies `next_stride` bytes apart.
struct Slab {
  const float* at;
  int64_t stride;
  const char* next;
  int64_t next_stride;
};

// All sums of a slab; they go to the channels from `first` on.
void slab_sums(Slab s, Slab t, int64_t rows, const RowSums& q, int64_t first);
// Joins a tile's moments to those of n rows, [5, c]: mean_s, mean_t, ss, tt, st.
void merge_rows(double rows, int64_t c, const RowSums& q, double n, double* totals);

struct RowGradient {
  const float *a, *b, *k, *mean_x, *mean_y;
};

// x, y, dout and dx are [rows, c], dense.
void row_gradient(
    const float* x, const float* y, const float* dout, int64_t rows, int64_t c, RowGradient g, float dloss, float* dx);

}  // namespace jdkd::cpu
