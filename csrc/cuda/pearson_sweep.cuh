// The statistics of a chunk, of a plane or of rows: how a thread sweeps over its packs of both tensors, what it sums.
#pragma once

#include "cuda/pearson_levels.cuh"

namespace jdkd::pearson {

// What a chunk sums of a channel: d_s, d_t, d_s^2, d_t^2, (d_s - beta d_t)^2 and d_s d_t, around the means it is given.
struct ChunkSums {
  static constexpr int kCount = 6;
  float mean_s, mean_t, beta;
  float of[kCount] = {};

  __device__ __forceinline__ void add(float s, float t) {
    const float ds = s - mean_s, dt = t - mean_t, rest = ds - beta * dt;
    of[0] += ds;
    of[1] += dt;
    of[2] += ds * ds;
    of[3] += dt * dt;
    of[4] += rest * rest;
    of[5] += ds * dt;
  }
};

// Some packs of both tensors, a thread's next ones, kApart packs or rows apart. Past the last one it is the last once
// more, so that all loads are asked for in one go: a branch between two of them would wait for the first.
template <typename T, int kWidth, int kNumber, int kApart, bool kWide>
struct PairPacks {
  static constexpr int kHeld = kNumber, kStep = kApart * kHeld;
  Pack<T, kWidth> s[kHeld], t[kHeld];

  // Packs `first`, `first` + kApart and so on, which lie `pitch` elements apart.
  template <typename Pitch>
  __device__ __forceinline__ void load(const T* s_at, const T* t_at, Pitch pitch, int first, int last) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const Pitch at = min(first + i * kApart, last) * pitch;
      s[i].load(s_at + at, true);
      t[i].load(t_at + at, kWide);
    }
  }

  // Calls body(e, s, t) for element e of the first `kVisited` packs, unless `all` are there those up to the last.
  template <int kVisited, class Body>
  __device__ __forceinline__ void visit(bool all, int first, int last, const Body& body) const {
    static_assert(kVisited <= kHeld);
#pragma unroll
    for (int i = 0; i < kVisited; ++i) {
      if (all || first + i * kApart <= last) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          body(e, s[i][e], t[i][e]);
        }
      }
    }
  }
};

// Calls body(e, s, t) for all packs of a thread, from `first` to `last`; its warp's are those from `begin` on. The
// first ones are in `held` and `next`; load(packs, first) asks for more, so that one lot comes as the other is summed.
template <class Packs, class Load, class Body>
__device__ __forceinline__ void sweep(
    Packs& held, Packs& next, int begin, int first, int last, const Load& load, const Body& body) {
  constexpr int kHeld = Packs::kHeld, kStep = Packs::kStep;
  for (int rounds = (last + 1 - begin) / (2 * kStep); rounds > 0; --rounds) {
    held.template visit<kHeld>(true, first, last, body);
    load(held, first + 2 * kStep);
    next.template visit<kHeld>(true, first + kStep, last, body);
    load(next, first + 3 * kStep);
    first += 2 * kStep;
  }
  held.template visit<kHeld>(false, first, last, body);
  next.template visit<kHeld>(false, first + kStep, last, body);
}

}  // namespace jdkd::pearson
