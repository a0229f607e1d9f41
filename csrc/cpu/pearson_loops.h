// The inner loops of pearson_sweeps.h, written once and compiled for each instruction set: see lanes.h, which comes
// before it in the same namespace. Elements are widened as they are read and rounded as they are written.

// Calls body with a pointer to the elements at a position.
template <class Body>
JDKD_INLINE auto with_elements(const Cursor& from, const Body& body) {
  switch (from.type) {
    case ScalarType::Float:
      return body(reinterpret_cast<const float*>(from.at));
    case ScalarType::BFloat16:
      return body(reinterpret_cast<const BFloat16*>(from.at));
    default:
      return body(reinterpret_cast<const Half*>(from.at));
  }
}

// Asks the second cache for what lies some bytes ahead, or for nothing where that is 0.
template <class T>
JDKD_INLINE void fetch(const T* from, int64_t bytes_ahead) {
  if (bytes_ahead) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + bytes_ahead, 0, 2);
  }
}

struct PairParts {
  Vec ds, dt, ss, tt, e;
};

JDKD_INLINE PairParts no_pairs() { return {splat(0), splat(0), splat(0), splat(0), splat(0)}; }

JDKD_INLINE void add_pair(PairParts& part, const Vec& ds, const Vec& dt, const Vec& beta) {
  const Vec rest = ds - beta * dt;
  part.ds += ds;
  part.dt += dt;
  part.ss += ds * ds;
  part.tt += dt * dt;
  part.e += rest * rest;
}

template <class S, class T>
JDKD_INLINE PairSums pair_sums_of(const S* s, const T* t, int64_t n, const Guess& guess) {
  const Vec ms = splat(guess.mean_s), mt = splat(guess.mean_t), beta = splat(guess.beta);
  const All all;
  const int64_t ahead = bytes_ahead();
  PairParts part[2] = {no_pairs(), no_pairs()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      fetch(s + i + u * kLanes, ahead);
      fetch(t + i + u * kLanes, ahead);
      add_pair(part[u], all.load(s + i + u * kLanes) - ms, all.load(t + i + u * kLanes) - mt, beta);
    }
  }
  for (; i < n; i += kLanes) {
    if (i + kLanes <= n) {
      add_pair(part[0], all.load(s + i) - ms, all.load(t + i) - mt, beta);
    } else {
      const Some some(n - i);
      add_pair(part[1], some.only(some.load(s + i) - ms), some.only(some.load(t + i) - mt), beta);
    }
  }
  return {
      sum_lanes(part[0].ds + part[1].ds), sum_lanes(part[0].dt + part[1].dt), sum_lanes(part[0].ss + part[1].ss),
      sum_lanes(part[0].tt + part[1].tt), sum_lanes(part[0].e + part[1].e)};
}

PairSums pair_sums(Cursor s, Cursor t, int64_t n, const Guess& guess) {
  return with_elements(s, [&](auto from_s) JDKD_INLINE_LAMBDA {
    return with_elements(
        t, [&](auto from_t) JDKD_INLINE_LAMBDA { return pair_sums_of(from_s, from_t, n, guess); });
  });
}

// Calls body(j, lanes) for every vector of columns, the last of which may be short.
template <class Body>
JDKD_INLINE void for_columns(int64_t c, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= c; j += kLanes) {
    body(j, All{});
  }
  if (j < c) {
    body(j, Some(c - j));
  }
}

// Calls body(x, y, dout, dx) with pointers to elements.
template <class Body>
JDKD_INLINE void with_gradient(const GradientOf& of, const Body& body) {
  with_elements(of.x, [&](auto x) JDKD_INLINE_LAMBDA {
    with_elements(of.y, [&](auto y) JDKD_INLINE_LAMBDA {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
      body(x, y, reinterpret_cast<const Element*>(of.dout), reinterpret_cast<Element*>(of.dx));
    });
  });
}

void gradient(const GradientOf& of, int64_t n, const Gradient& g, float dloss) {
  const Vec a = splat(g.a), b = splat(g.b), k = splat(g.k), mx = splat(g.mean_x), my = splat(g.mean_y);
  const Vec scale = splat(dloss);
  const int64_t ahead = bytes_ahead();
  with_gradient(of, [&](auto x, auto y, auto dout, auto dx) JDKD_INLINE_LAMBDA {
    const auto of_loss = [=](int64_t i, auto lanes) JDKD_INLINE_LAMBDA {
      fetch(x + i, ahead);
      fetch(y + i, ahead);
      fetch(dx + i, ahead);
      return scale * (a * (lanes.load(x + i) - mx) + (b * (lanes.load(y + i) - my) + k));
    };
    if (dout) {
      for_columns(n, [=](int64_t i, auto lanes) JDKD_INLINE_LAMBDA {
        fetch(dout + i, ahead);
        lanes.store(dx + i, lanes.load(dout + i) + of_loss(i, lanes));
      });
    } else {
      for_columns(n, [=](int64_t i, auto lanes) JDKD_INLINE_LAMBDA { lanes.store(dx + i, of_loss(i, lanes)); });
    }
  });
}

void row_sums(Cursor s, Cursor t, int64_t rows, int64_t c, const RowGuess& guess, const RowSums& q) {
  with_elements(s, [&](auto from_s) JDKD_INLINE_LAMBDA {
    with_elements(t, [&](auto from_t) JDKD_INLINE_LAMBDA {
      for_columns(c, [&](int64_t j, auto lanes) JDKD_INLINE_LAMBDA {
        const Vec ms = lanes.load(guess.mean_s + j), mt = lanes.load(guess.mean_t + j);
        const Vec beta = lanes.load(guess.beta + j);
        PairParts part = no_pairs();
        for (int64_t r = 0; r < rows; ++r) {
          fetch(from_s + j * rows + r * kLanes, rows * c * sizeof(*from_s));
          fetch(from_t + j * rows + r * kLanes, rows * c * sizeof(*from_t));
          add_pair(part, lanes.load(from_s + r * c + j) - ms, lanes.load(from_t + r * c + j) - mt, beta);
        }
        add_to(q.ds + j, part.ds, lanes);
        add_to(q.dt + j, part.dt, lanes);
        add_to(q.ss + j, part.ss, lanes);
        add_to(q.tt + j, part.tt, lanes);
        add_to(q.e + j, part.e, lanes);
      });
    });
  });
}

// Plain arithmetic over arrays, for the compiler to vectorise.
bool merge_rows(
    double rows, int64_t c, const RowGuess& guess, const RowSums& q, double n, const double* before, double* after) {
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

void row_gradient(const GradientOf& of, int64_t rows, int64_t c, const RowGradient& g, float dloss) {
  const Vec scale = splat(dloss);
  with_gradient(of, [&](auto x, auto y, auto dout, auto dx) JDKD_INLINE_LAMBDA {
    const int64_t ahead = sizeof(*x) < sizeof(float) ? bytes_ahead() : 0;
    for (int64_t at = 0; at < rows * c; at += c) {
      const auto of_loss = [=](int64_t j, auto lanes) JDKD_INLINE_LAMBDA {
        fetch(x + at + j, ahead);
        fetch(y + at + j, ahead);
        fetch(dx + at + j, ahead);
        const Vec ax = lanes.load(g.a + j) * (lanes.load(x + at + j) - lanes.load(g.mean_x + j));
        const Vec by = lanes.load(g.b + j) * (lanes.load(y + at + j) - lanes.load(g.mean_y + j));
        return scale * (ax + (by + lanes.load(g.k + j)));
      };
      if (dout) {
        for_columns(c, [=](int64_t j, auto lanes) JDKD_INLINE_LAMBDA {
          fetch(dout + at + j, ahead);
          lanes.store(dx + at + j, lanes.load(dout + at + j) + of_loss(j, lanes));
        });
      } else {
        for_columns(c, [=](int64_t j, auto lanes) JDKD_INLINE_LAMBDA { lanes.store(dx + at + j, of_loss(j, lanes)); });
      }
    }
  });
}

constexpr Sweeps kSweeps{pair_sums, gradient, row_sums, merge_rows, row_gradient};
