#include "cpu/pearson_sweeps.h"

#include "common/vec.h"

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

// Row by row, so that memory is read in the order it lies in; the sums stay in the first cache.
JDKD_CLONES void row_sums(const float* x, int64_t rows, int64_t c, float* sums) {
  constexpr int64_t kRows = 4;
  std::memset(sums, 0, c * sizeof(float));
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
      const float* row = x + r * c + j;
      const Vec pair = columns.load(row) + columns.load(row + c);
      const Vec other = columns.load(row + 2 * c) + columns.load(row + 3 * c);
      columns.store(sums + j, columns.load(sums + j) + (pair + other));
    });
  }
  for (; r < rows; ++r) {
    for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
      columns.store(sums + j, columns.load(sums + j) + columns.load(x + r * c + j));
    });
  }
}

// Column by column from here on: the tile is in the second cache, and the sums stay in registers.
JDKD_CLONES void row_centred_sums(
    const float* s, const float* t, int64_t rows, int64_t c, const float* mean_s, const float* mean_t, RowSums sums) {
  for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
    const Vec ms = columns.load(mean_s + j), mt = columns.load(mean_t + j);
    CentredParts part;
    for (int64_t r = 0; r < rows; ++r) {
      add_centred(part, columns.load(s + r * c + j) - ms, columns.load(t + r * c + j) - mt);
    }
    columns.store(sums.ds + j, part.ds);
    columns.store(sums.dt + j, part.dt);
    columns.store(sums.ss + j, part.ss);
    columns.store(sums.tt + j, part.tt);
  });
}

JDKD_CLONES void row_residual_sums(
    const float* s, const float* t, int64_t rows, int64_t c, const float* mean_s, const float* mean_t,
    const float* beta, float* residuals) {
  for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
    const Vec ms = columns.load(mean_s + j), mt = columns.load(mean_t + j), factor = columns.load(beta + j);
    Vec total = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec rest = (columns.load(s + r * c + j) - ms) - factor * (columns.load(t + r * c + j) - mt);
      total += rest * rest;
    }
    columns.store(residuals + j, total);
  });
}

JDKD_CLONES void row_gradient(
    const float* x, const float* y, const float* dout, int64_t rows, int64_t c, RowGradient g, float dloss, float* dx) {
  constexpr int64_t kRows = 4;  // share the loads of the five coefficients
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t last = first + kRows < rows ? first + kRows : rows;
    for_columns(c, [=](int64_t j, auto columns) JDKD_INLINE_LAMBDA {
      const Vec a = columns.load(g.a + j), b = columns.load(g.b + j), k = columns.load(g.k + j);
      const Vec mx = columns.load(g.mean_x + j), my = columns.load(g.mean_y + j);
      for (int64_t r = first; r < last; ++r) {
        const int64_t at = r * c + j;
        const Vec of_loss = dloss * (a * (columns.load(x + at) - mx) + (b * (columns.load(y + at) - my) + k));
        columns.store(dx + at, dout ? columns.load(dout + at) + of_loss : of_loss);
      }
    });
  }
}

}  // namespace jdkd::cpu
