// See pearson_levels.h: channels as planes, NCHW.
#include "cpu/convert.h"
#include "cpu/pearson_levels.h"

#include <algorithm>
#include <vector>

namespace jdkd::cpu {
namespace {

constexpr int64_t kBlock = 1024;              // positions of one channel; float32 sums of more lose digits
constexpr int64_t kTile = 4 * kBlock;         // positions of one channel that share a guess
constexpr int64_t kPlaneChunk = 32 * kBlock;  // positions that one task reduces

// A channel's positions are numbered 0..N*HW through all images; a tile may cross from one image to the next.

struct Planes {
  Cursor base;
  int64_t c, hw;

  Cursor at(int64_t channel, int64_t position) const {
    return base + ((position / hw) * c + channel) * hw + position % hw;
  }
};

// Sums of n positions from `first` on.
PairSums summed(const Planes& s, const Planes& t, int64_t channel, int64_t first, int64_t n, const Guess& guess) {
  PairSums total;
  for (int64_t i = first, run; i < first + n; i += run) {
    run = std::min({first + n - i, s.hw - i % s.hw, kBlock});
    total += sweeps().pair_sums(s.at(channel, i), t.at(channel, i), run, guess);
  }
  return total;
}

Moments joined(const Moments& before, double n, const Guess& guess, const PairSums& q) {
  return merge(
      before, pearson::tile_moments(n, guess.mean_s, guess.mean_t, q.ds, q.dt, q.ss, q.tt, guess.beta, q.e));
}

void move_to(const Moments& q, Guess& guess) {
  guess.mean_s = static_cast<float>(q.mean_s);
  guess.mean_t = static_cast<float>(q.mean_t);
}

Moments plane_moments(const Planes& s, const Planes& t, int64_t channel, int64_t first, int64_t last) {
  Guess guess{0, 0, 1};
  copy_floats(s.at(channel, first), 1, &guess.mean_s);
  copy_floats(t.at(channel, first), 1, &guess.mean_t);
  Moments total;
  for (int64_t i = first, n; i < last; i += n) {
    n = std::min(last - i, std::clamp(i - first, kBlock, kTile));
    if (i == first) {
      const Moments rough = joined({}, n, guess, summed(s, t, channel, i, n, guess));
      move_to(rough, guess);
      guess.beta = beta_of(rough.ss, rough.tt);
    }
    Moments all = joined(total, n, guess, summed(s, t, channel, i, n, guess));
    if (!is_near(guess.beta, all)) {
      guess.beta = beta_of(all.ss, all.tt);
      all = joined(total, n, guess, summed(s, t, channel, i, n, guess));
    }
    total = all;
    move_to(total, guess);
  }
  return total;
}

int64_t chunks_of(const Level& level) { return ceil_div(level.positions(), kPlaneChunk); }

Moments chunk_moments(const Level& level, const Tensor& s, const Tensor& t, int64_t channel, int64_t chunk) {
  const Planes s_planes{cursor(s), level.c, level.hw}, t_planes{cursor(t), level.c, level.hw};
  const int64_t first = chunk * kPlaneChunk, last = std::min(level.positions(), first + kPlaneChunk);
  return plane_moments(s_planes, t_planes, channel, first, last);
}

Gradient gradient_of(const Backward& to_do, int64_t channel) {
  const float* at = to_do.table + channel;
  const int64_t stride = to_do.stride;
  return {at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride]};
}

}  // namespace

void forward_planes(const Level& level, const Tensor& s, const Tensor& t, Moments* channels) {
  const int64_t chunks = chunks_of(level);
  std::vector<Moments> parts(level.c * chunks);
  const int64_t grain = std::max<int64_t>(1, kPlaneChunk / std::min(level.positions(), kPlaneChunk));
  torch::stable::parallel_for(0, level.c * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = chunk_moments(level, s, t, i / chunks, i % chunks);
    }
  });
  join_chunks(parts, level.c, channels);
}

void backward_planes(const Level& level, const Backward& to_do) {
  const int64_t pieces = ceil_div(level.hw, kPiece), planes = level.n * level.c;
  const int64_t grain = std::max<int64_t>(1, kPlaneChunk / std::min(level.hw, kPiece));
  torch::stable::parallel_for(0, planes * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Gradient g = gradient_of(to_do, i / pieces % level.c);
      const int64_t in_plane = i % pieces * kPiece, n = std::min(kPiece, level.hw - in_plane);
      sweeps().gradient(to_do.of + (i / pieces * level.hw + in_plane), n, g, to_do.dloss);
    }
  });
}

Moments channel_moments(const Level& level, const Tensor& s, const Tensor& t, int64_t channel) {
  Moments total = chunk_moments(level, s, t, channel, 0);
  for (int64_t chunk = 1; chunk < chunks_of(level); ++chunk) {
    total = merge(total, chunk_moments(level, s, t, channel, chunk));
  }
  return total;
}

void channel_gradient(const Level& level, const Backward& to_do, int64_t channel) {
  const Gradient g = gradient_of(to_do, channel);
  for (int64_t image = 0; image < level.n; ++image) {
    sweeps().gradient(to_do.of + (image * level.c + channel) * level.hw, level.hw, g, to_do.dloss);
  }
}

}  // namespace jdkd::cpu
