#include "cpu/pearson_sweeps.h"

#include "common/vec.h"
#include "ops/pearson.h"

namespace jdkd::cpu {

namespace {

struct PairParts {
  Vec ds = {}, dt = {}, ss = {}, tt = {}, e = {};
};

JDKD_INLINE void add_pair(PairParts& part, const Vec& ds, const Vec& dt, const Vec& beta) {
  const Vec rest = ds - beta * dt;
  part.ds += ds;
  part.dt += dt;
  part.ss += ds * ds;
  part.tt += dt * dt;
  part.e += rest * rest;
}

}  // namespace

JDKD_CLONES PairSums pair_sums(const float* s, const float* t, int64_t n, Guess guess) {
  const Vec ms = splat(guess.mean_s), mt = splat(guess.mean_t), beta = splat(guess.beta);
  PairParts part[2];
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      add_pair(part[u], load(s + i + u * kLanes) - ms, load(t + i + u * kLanes) - mt, beta);
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    add_pair(part[0], load(s + i) - ms, load(t + i) - mt, beta);
  }
  if (i < n) {
    add_pair(part[1], load_tail(s + i, n - i, ms) - ms, load_tail(t + i, n - i, mt) - mt, beta);
  }
  return {
      sum_lanes(part[0].ds + part[1].ds), sum_lanes(part[0].dt + part[1].dt), sum_lanes(part[0].ss + part[1].ss),
      sum_lanes(part[0].tt + part[1].tt), sum_lanes(part[0].e + part[1].e)};
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

JDKD_INLINE void fetch_next(const Rows& x, int64_t element) { __builtin_prefetch(x.next + element * x.itemsize, 0, 2); }

}  // namespace

JDKD_CLONES void row_sums(Rows s, Rows t, int64_t rows, int64_t c, RowGuess guess, RowSums q) {
  for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
    const Vec ms = columns.load(guess.mean_s + j), mt = columns.load(guess.mean_t + j);
    const Vec beta = columns.load(guess.beta + j);
    PairParts part;
    for (int64_t r = 0; r < rows; ++r) {
      fetch_next(s, j * rows + r * kLanes);
      fetch_next(t, j * rows + r * kLanes);
      add_pair(part, columns.load(s.at + r * c + j) - ms, columns.load(t.at + r * c + j) - mt, beta);
    }
    columns.add_to(q.ds + j, part.ds);
    columns.add_to(q.dt + j, part.dt);
    columns.add_to(q.ss + j, part.ss);
    columns.add_to(q.tt + j, part.tt);
    columns.add_to(q.e + j, part.e);
  });
}

// Plain arithmetic over arrays, for the compiler to vectorise.
JDKD_CLONES bool merge_rows(
    double rows, int64_t c, RowGuess guess, RowSums q, double n, const double* before, double* after) {
  int64_t far = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < c; ++j) {
    const double* from = before + j;
    double* to = after + j;
    const double beta = guess.beta[j];
    const pearson::Moments more = pearson::tile_moments(
        rows, guess.mean_s[j], guess.mean_t[j], q.ds[j], q.dt[j], q.ss[j], q.tt[j], beta, q.e[j]);
    const pearson::Moments all = merge({n, from[0], from[c], from[2 * c], from[3 * c], from[4 * c]}, more);
    to[0] = all.mean_s, to[c] = all.mean_t, to[2 * c] = all.ss, to[3 * c] = all.tt, to[4 * c] = all.st;
    far += is_near(beta, all) ? 0 : 1;
  }
  return far == 0;
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
