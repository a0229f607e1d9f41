#include "cpu/pearson_sweeps.h"

#include "common/vec.h"
#include "ops/pearson.h"

#include <initializer_list>

namespace jdkd::cpu {

JDKD_CLONES double sum(const float* x, int64_t n) {
  Vec part[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      part[u] += load(x + i + u * kLanes);
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    part[0] += load(x + i);
  }
  if (i < n) {
    part[1] += load_tail(x + i, n - i, Vec{});
  }
  return sum_lanes((part[0] + part[1]) + (part[2] + part[3]));
}

namespace {

struct CentredParts {
  Vec ds = {}, dt = {}, ss = {}, tt = {};
};

JDKD_INLINE void add_centred(CentredParts& part, const Vec& ds, const Vec& dt) {
  part.ds += ds;
  part.dt += dt;
  part.ss += ds * ds;
  part.tt += dt * dt;
}

}  // namespace

JDKD_CLONES CentredSums centred_sums(const float* s, const float* t, int64_t n, float mean_s, float mean_t) {
  const Vec ms = splat(mean_s), mt = splat(mean_t);
  CentredParts part[2];
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      add_centred(part[u], load(s + i + u * kLanes) - ms, load(t + i + u * kLanes) - mt);
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    add_centred(part[0], load(s + i) - ms, load(t + i) - mt);
  }
  if (i < n) {
    add_centred(part[1], load_tail(s + i, n - i, ms) - ms, load_tail(t + i, n - i, mt) - mt);
  }
  return {
      sum_lanes(part[0].ds + part[1].ds), sum_lanes(part[0].dt + part[1].dt),
      sum_lanes(part[0].ss + part[1].ss), sum_lanes(part[0].tt + part[1].tt)};
}

JDKD_CLONES double residual_sum(
    const float* s, const float* t, int64_t n, float mean_s, float mean_t, float beta) {
  const Vec ms = splat(mean_s), mt = splat(mean_t), factor = splat(beta);
  Vec part[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const Vec rest = (load(s + i + u * kLanes) - ms) - factor * (load(t + i + u * kLanes) - mt);
      part[u] += rest * rest;
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    const Vec ds = (left < kLanes ? load_tail(s + i, left, ms) : load(s + i)) - ms;
    const Vec dt = (left < kLanes ? load_tail(t + i, left, mt) : load(t + i)) - mt;
    const Vec rest = ds - factor * dt;
    part[0] += rest * rest;
  }
  return sum_lanes((part[0] + part[1]) + (part[2] + part[3]));
}

template <class Columns>
JDKD_INLINE void add_to(float* sums, const Vec& more, Columns columns) {
  columns.store(sums, columns.load(sums) + more);
}

// Calls body(j, columns) for every vector of columns, the last of which may be short.
template <class Body>
JDKD_INLINE void for_columns(int64_t c, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= c; j += kLanes) {
    body(j, Full{});
  }
  if (j < c) {
    body(j, Tail{c - j});
  }
}

JDKD_CLONES void gradient(
    const float* x, const float* y, const float* dout, int64_t n, Gradient g, float dloss, float* dx) {
  const Vec a = splat(g.a), b = splat(g.b), k = splat(g.k), mx = splat(g.mean_x), my = splat(g.mean_y);
  const auto of_loss = [=](int64_t i, auto columns) JDKD_INLINE_LAMBDA {
    return dloss * (a * (columns.load(x + i) - mx) + (b * (columns.load(y + i) - my) + k));
  };
  if (dout) {
    for_columns(n, [=](int64_t i, auto columns) JDKD_INLINE_LAMBDA {
      columns.store(dx + i, columns.load(dout + i) + of_loss(i, columns));
    });
  } else {
    for_columns(n, [=](int64_t i, auto columns) JDKD_INLINE_LAMBDA { columns.store(dx + i, of_loss(i, columns)); });
  }
}

// What comes from memory is walked in the order it lies in; the tile is in the second cache after that, and a few rows
// at once share the loads and stores of the columns' sums.
JDKD_CLONES void add_rows(const float* x, int64_t rows, int64_t c, float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
      add_to(sums + j, columns.load(x + r * c + j), columns);
    });
  }
}

// Calls body(j, columns, first, last) for every vector of columns of every few rows [first, last).
template <class Body>
JDKD_INLINE void for_rows(int64_t rows, int64_t c, const Body& body) {
  constexpr int64_t kAtOnce = 4;
  int64_t r = 0;
  for (; r + kAtOnce <= rows; r += kAtOnce) {
    for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA { body(j, columns, r, r + kAtOnce); });
  }
  for (; r < rows; ++r) {
    for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA { body(j, columns, r, r + 1); });
  }
}

JDKD_CLONES void row_centred_sums(const float* s, const float* t, int64_t rows, int64_t c, const RowSums& q) {
  const float *mean_s = q.mean_s, *mean_t = q.mean_t;
  float *sum_ds = q.ds, *sum_dt = q.dt, *ss = q.ss, *tt = q.tt;
  for (float* sums : {sum_ds, sum_dt, ss, tt}) {
    std::memset(sums, 0, c * sizeof(float));
  }
  for_rows(rows, c, [=](int64_t j, auto columns, int64_t first, int64_t last) JDKD_INLINE_LAMBDA {
    const Vec ms = columns.load(mean_s + j), mt = columns.load(mean_t + j);
    CentredParts part;
    for (int64_t r = first; r < last; ++r) {
      add_centred(part, columns.load(s + r * c + j) - ms, columns.load(t + r * c + j) - mt);
    }
    add_to(sum_ds + j, part.ds, columns);
    add_to(sum_dt + j, part.dt, columns);
    add_to(ss + j, part.ss, columns);
    add_to(tt + j, part.tt, columns);
  });
  for (int64_t j = 0; j < c; ++j) {
    q.beta[j] = pearson::residual_beta(ss[j], tt[j]);
  }
}

JDKD_CLONES void row_residual_sums(const float* s, const float* t, int64_t rows, int64_t c, const RowSums& q) {
  const float *mean_s = q.mean_s, *mean_t = q.mean_t, *beta = q.beta;
  float* residual = q.residual;
  std::memset(residual, 0, c * sizeof(float));
  for_rows(rows, c, [=](int64_t j, auto columns, int64_t first, int64_t last) JDKD_INLINE_LAMBDA {
    const Vec ms = columns.load(mean_s + j), mt = columns.load(mean_t + j), factor = columns.load(beta + j);
    Vec total = {};
    for (int64_t r = first; r < last; ++r) {
      const Vec rest = (columns.load(s + r * c + j) - ms) - factor * (columns.load(t + r * c + j) - mt);
      total += rest * rest;
    }
    add_to(residual + j, total, columns);
  });
}

// Plain arithmetic over arrays, for the compiler to vectorise.
JDKD_CLONES void merge_rows(double rows, int64_t c, const RowSums& q, double n, double* totals) {
#pragma GCC ivdep
  for (int64_t j = 0; j < c; ++j) {
    double* at = totals + j;
    const pearson::Moments before{n, at[0], at[c], at[2 * c], at[3 * c], at[4 * c]};
    const pearson::Moments more = pearson::tile_moments(
        rows, q.mean_s[j], q.mean_t[j], q.ds[j], q.dt[j], q.ss[j], q.tt[j], q.beta[j], q.residual[j]);
    const pearson::Moments all = merge(before, more);
    at[0] = all.mean_s, at[c] = all.mean_t, at[2 * c] = all.ss, at[3 * c] = all.tt, at[4 * c] = all.st;
  }
}

JDKD_CLONES void row_gradient(
    const float* x, const float* y, const float* dout, int64_t rows, int64_t c, RowGradient g, float dloss, float* dx) {
  for (int64_t at = 0; at < rows * c; at += c) {
    const auto of_loss = [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
      const Vec ax = columns.load(g.a + j) * (columns.load(x + at + j) - columns.load(g.mean_x + j));
      const Vec by = columns.load(g.b + j) * (columns.load(y + at + j) - columns.load(g.mean_y + j));
      return dloss * (ax + (by + columns.load(g.k + j)));
    };
    if (dout) {
      for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
        columns.store(dx + at + j, columns.load(dout + at + j) + of_loss(j, columns));
      });
    } else {
      for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
        columns.store(dx + at + j, of_loss(j, columns));
      });
    }
  }
}

}  // namespace jdkd::cpu
