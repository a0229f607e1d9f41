#include "cpu/pearson_sweeps.h"

#include "common/vec.h"
#include "ops/pearson.h"

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

namespace {

constexpr int64_t kVecs = kSlab / kLanes;

// Adds up kSums values a channel over the rows of a slab: add(r, u, part) adds those of row r and the vector u of
// channels. A few rows at a time have sums of their own: longer float32 sums lose digits.
template <int kSums, class Add>
JDKD_INLINE void sum_rows(int64_t rows, Vec (&total)[kVecs][kSums], const Add& add) {
  constexpr int64_t kAtOnce = 16;
  for (int64_t first = 0; first < rows; first += kAtOnce) {
    const int64_t last = first + kAtOnce < rows ? first + kAtOnce : rows;
    Vec part[kVecs][kSums] = {};
    for (int64_t r = first; r < last; ++r) {
      for (int u = 0; u < kVecs; ++u) {
        add(r, u, part[u]);
      }
    }
    for (int u = 0; u < kVecs; ++u) {
      for (int k = 0; k < kSums; ++k) {
        total[u][k] += part[u][k];
      }
    }
  }
}

JDKD_INLINE Vec load_row(const Slab& x, int64_t r, int u) { return load(x.at + r * x.stride + u * kLanes); }

JDKD_INLINE void fetch_next(const Slab& x, int64_t r) { __builtin_prefetch(x.next + r * x.next_stride, 0, 2); }

}  // namespace

JDKD_CLONES void slab_sums(Slab s, Slab t, int64_t rows, const RowSums& q, int64_t first) {
  Vec mean[kVecs][2] = {}, centred[kVecs][4] = {}, beta[kVecs], residual[kVecs][1] = {};
  sum_rows(rows, mean, [=](int64_t r, int u, Vec(&part)[2]) JDKD_INLINE_LAMBDA {
    part[0] += load_row(s, r, u);
    part[1] += load_row(t, r, u);
  });
  for (int u = 0; u < kVecs; ++u) {
    mean[u][0] /= static_cast<float>(rows);
    mean[u][1] /= static_cast<float>(rows);
  }
  sum_rows(rows, centred, [=](int64_t r, int u, Vec(&part)[4]) JDKD_INLINE_LAMBDA {
    if (u == 0) {
      fetch_next(s, r);
      fetch_next(t, r);
    }
    const Vec ds = load_row(s, r, u) - mean[u][0], dt = load_row(t, r, u) - mean[u][1];
    part[0] += ds;
    part[1] += dt;
    part[2] += ds * ds;
    part[3] += dt * dt;
  });
  for (int u = 0; u < kVecs; ++u) {
    for (int i = 0; i < kLanes; ++i) {
      beta[u][i] = pearson::residual_beta(centred[u][2][i], centred[u][3][i]);
    }
  }
  sum_rows(rows, residual, [=](int64_t r, int u, Vec(&part)[1]) JDKD_INLINE_LAMBDA {
    const Vec rest = (load_row(s, r, u) - mean[u][0]) - beta[u] * (load_row(t, r, u) - mean[u][1]);
    part[0] += rest * rest;
  });
  for (int u = 0; u < kVecs; ++u) {
    const int64_t j = first + u * kLanes;
    store(q.mean_s + j, mean[u][0]);
    store(q.mean_t + j, mean[u][1]);
    store(q.ds + j, centred[u][0]);
    store(q.dt + j, centred[u][1]);
    store(q.ss + j, centred[u][2]);
    store(q.tt + j, centred[u][3]);
    store(q.beta + j, beta[u]);
    store(q.residual + j, residual[u][0]);
  }
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
