// The inner loops of the Pearson loss on the CPU: float32 in, one tile at a time, see pearson_sweeps.cpp.
#pragma once

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

// ---- rows of channels, [rows, c] dense; every other array is [c] ----

void row_sums(const float* x, int64_t rows, int64_t c, float* sums);

struct RowSums {
  float *ds, *dt, *ss, *tt;
};

void row_centred_sums(
    const float* s, const float* t, int64_t rows, int64_t c, const float* mean_s, const float* mean_t, RowSums sums);
void row_residual_sums(
    const float* s, const float* t, int64_t rows, int64_t c, const float* mean_s, const float* mean_t,
    const float* beta, float* residuals);

struct RowGradient {
  const float *a, *b, *k, *mean_x, *mean_y;
};

void row_gradient(
    const float* x, const float* y, const float* dout, int64_t rows, int64_t c, RowGradient g, float dloss, float* dx);

}  // namespace jdkd::cpu
