// See pearson_levels.h: rows of channels, channels-last.
#include "cpu/convert.h"
#include "cpu/pearson_levels.h"

#include <algorithm>
#include <vector>

namespace jdkd::cpu {
namespace {

constexpr int64_t kFirstRows = 64;   // rows whose guess is their own
constexpr int64_t kMaxRows = 512;    // rows that share a guess
constexpr int64_t kRowChunk = 2048;  // most rows that one task reduces
constexpr int64_t kLeastRows = 256;  // and least, where there are fewer than kLeastTasks tasks
constexpr int64_t kLeastTasks = 8;

// The moments of c channels side by side, of the rows that were added so far, and the guess for those to come.
class RowMoments {
 public:
  explicit RowMoments(int64_t channels)
      : c_(channels), total_(5 * c_), next_(5 * c_), sums_(5 * c_), guess_(3 * c_) {}

  // Takes up some rows, [rows, c], and forgets what was before.
  void reduce(Cursor s, Cursor t, int64_t rows) {
    n_ = 0;
    std::fill(total_.begin(), total_.end(), 0.0);
    copy_floats(s, c_, guess_.data());
    copy_floats(t, c_, guess_.data() + c_);
    std::fill(guess_.begin() + 2 * c_, guess_.end(), 1.0f);
    for (int64_t i = 0, n; i < rows; i += n) {
      n = std::min(rows - i, std::clamp(i, kFirstRows, kMaxRows));
      const Cursor s_tile = s + i * c_, t_tile = t + i * c_;
      bool near = add(s_tile, t_tile, n);
      if (i == 0) {
        guess_means();
        guess_betas();
        near = add(s_tile, t_tile, n);
      }
      if (!near) {
        guess_betas();
        add(s_tile, t_tile, n);
      }
      n_ += n;
      total_.swap(next_);
      std::copy(total_.begin(), total_.begin() + 2 * c_, guess_.begin());
    }
  }

  Moments channel(int64_t j) const {
    const double* at = total_.data() + j;
    return {static_cast<double>(n_), at[0], at[c_], at[2 * c_], at[3 * c_], at[4 * c_]};
  }

 private:
  // The moments with those of a tile are next_. Whether every beta was near.
  bool add(Cursor s, Cursor t, int64_t rows) {
    const RowGuess guess{guess_.data(), guess_.data() + c_, guess_.data() + 2 * c_};
    double* at = sums_.data();
    const RowSums q{at, at + c_, at + 2 * c_, at + 3 * c_, at + 4 * c_};
    std::fill(sums_.begin(), sums_.end(), 0.0);
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      sweeps().row_sums(s + r * c_, t + r * c_, std::min(kRowsAtOnce, rows - r), c_, guess, q);
    }
    return sweeps().merge_rows(rows, c_, guess, q, n_, total_.data(), next_.data());
  }

  void guess_means() { std::copy(next_.begin(), next_.begin() + 2 * c_, guess_.begin()); }

  void guess_betas() {
    for (int64_t j = 0; j < c_; ++j) {
      guess_[2 * c_ + j] = beta_of(next_[2 * c_ + j], next_[3 * c_ + j]);
    }
  }

  int64_t c_, n_ = 0;
  std::vector<double> total_, next_, sums_;  // [5, c] each
  std::vector<float> guess_;                 // [3, c]: mean_s, mean_t, beta
};

// Rows that one task reduces of m: about as many as any other, and enough tasks for several threads.
int64_t rows_per_chunk(int64_t m) {
  return ceil_div(m, std::max(ceil_div(m, kRowChunk), std::clamp<int64_t>(m / kLeastRows, 1, kLeastTasks)));
}

}  // namespace

void forward_rows(const Level& level, const Tensor& s, const Tensor& t, Moments* channels) {
  const int64_t m = level.positions(), c = level.c, chunk = rows_per_chunk(m), chunks = ceil_div(m, chunk);
  std::vector<Moments> parts(chunks * c);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    RowMoments moments(c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk;
      moments.reduce(cursor(s) + first * c, cursor(t) + first * c, std::min(chunk, m - first));
      for (int64_t j = 0; j < c; ++j) {
        parts[j * chunks + i] = moments.channel(j);
      }
    }
  });
  join_chunks(parts, level.c, channels);
}

void backward_rows(const Level& level, const Backward& to_do) {
  const int64_t stride = to_do.stride, m = level.positions(), tile = std::max<int64_t>(1, kPiece / level.c);
  const float* at = to_do.table;
  const RowGradient g{at, at + stride, at + 2 * stride, at + 3 * stride, at + 4 * stride};
  torch::stable::parallel_for(0, ceil_div(m, tile), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * tile, rows = std::min(end * tile, m) - first;
    sweeps().row_gradient(to_do.of + first * level.c, rows, level.c, g, to_do.dloss);
  });
}

}  // namespace jdkd::cpu
