// The single pass of the Pearson loss on the host: one fiber a thread, one cluster after the other.
//
// It compiles the kernel's own source, with what sm_90 adds replaced. Threads take turns in a random order, blocks
// stand still now and then, bulk copies land late and in another order, and shared memory is poisoned before and after
// a block's life. A copy that is unaligned, reads past its tensor or writes past the shared memory aborts, and so does
// a thread that waits for ever.
#include <cuda_bf16.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace emulation {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Block {
  std::vector<unsigned char> shared;  // gone when all its threads are
  int alive = 0;
  Barrier all, named[16];
  Barrier warps[32];
  double slots[32][32];  // of a warp, for shuffles
};

// Entered once through its context, and then left and continued by jumps, which need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<unsigned char[]> stack;
  int block, thread;
  int cluster_generation;  // in which it arrived at the cluster's barrier
  bool begun, done;
};

constexpr size_t kStack = 64 << 10;
struct Index {
  unsigned x;
};
Index thread_index, block_index, block_dim;
std::vector<Block> blocks;
std::vector<Fiber> fibers;
Fiber* current = nullptr;
jmp_buf scheduler;
Barrier cluster;
bool progress = false;
std::function<void()> kernel;
std::vector<std::function<void()>> copies;  // issued, but not landed
std::vector<std::pair<const char*, const char*>> readable;
std::mt19937 draw;

void pause() {
  if (_setjmp(current->place) == 0) {
    _longjmp(scheduler, 1);
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  thread_index.x = static_cast<unsigned>(fiber.thread);
  if (_setjmp(scheduler) == 0) {
    if (fiber.begun) {
      _longjmp(fiber.place, 1);
    }
    fiber.begun = true;
    setcontext(&fiber.context);
  }
}

int arrive(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  }
  return generation;
}

void wait(Barrier& barrier, int generation) {
  while (barrier.generation == generation) {
    pause();
  }
}

void wait(Barrier& barrier) { wait(barrier, arrive(barrier)); }

Block& here() { return blocks[current->block]; }
int warp() { return current->thread / 32; }
int lane() { return current->thread % 32; }

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= sizeof(double));
  double* slots = here().slots[warp()];
  std::memcpy(slots + lane(), &value, sizeof(T));
  wait(here().warps[warp()]);
  std::memcpy(&value, slots + from, sizeof(T));
  wait(here().warps[warp()]);
  return value;
}

float as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void body() {
  kernel();
  current->done = true;
  progress = true;
  if (--here().alive == 0) {
    std::fill(here().shared.begin(), here().shared.end(), 0xff);
  }
  pause();
}

void land_a_copy() {
  const size_t which = draw() % copies.size();
  copies[which]();
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(which));
  progress = true;
}

void start(Fiber& fiber) {
  fiber.begun = fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
}

void run_cluster(int first_block, int size, int threads, size_t shared_bytes) {
  blocks = std::vector<Block>(size);
  for (Block& block : blocks) {
    block.shared.assign(shared_bytes, 0xff);
    block.all.expected = block.alive = threads;
    for (Barrier& barrier : block.warps) {
      barrier.expected = 32;
    }
  }
  cluster = {size * threads};
  fibers.resize(static_cast<size_t>(size) * threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    if (!fibers[i].stack) {
      fibers[i].stack.reset(new unsigned char[kStack]);
    }
    fibers[i].block = static_cast<int>(i) / threads;
    fibers[i].thread = static_cast<int>(i) % threads;
    start(fibers[i]);
  }
  block_dim.x = static_cast<unsigned>(threads);
  std::vector<size_t> order(fibers.size());
  std::iota(order.begin(), order.end(), size_t{0});
  int asleep = 0;  // a block that stands still for some rounds
  unsigned rounds = 0;
  for (bool running = true; running;) {
    running = progress = false;
    std::shuffle(order.begin(), order.end(), draw);
    if (rounds-- == 0) {
      asleep = static_cast<int>(draw() % size);
      rounds = draw() % 256;
    }
    for (size_t i : order) {
      Fiber& fiber = fibers[i];
      running = running || !fiber.done;
      if (!fiber.done && fiber.block != asleep) {
        block_index.x = static_cast<unsigned>(first_block + fiber.block);
        resume(fiber);
      }
    }
    if (!copies.empty() && (!progress || draw() % 4 == 0)) {
      land_a_copy();
    }
    if (running && !progress) {
      if (asleep < 0) {
        fail("every thread waits");
      }
      asleep = -1;
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_dim
#define __launch_bounds__(...)
#define __syncthreads() emulation::wait(emulation::here().all)
#define __syncwarp() emulation::wait(emulation::here().warps[emulation::warp()])
#define __shfl_xor_sync(mask, value, other) emulation::exchange(value, emulation::lane() ^ (other))
#define __shfl_sync(mask, value, from) emulation::exchange(value, from)
#define __uint_as_float(bits) emulation::as_float(bits)
#define __stcs(to, from) (*(to) = (from))

#define JDKD_HOPPER
namespace jdkd::hopper {

// Of the 64 bits of a barrier, the upper half counts arrivals still missing and the lower half bytes still missing.
inline int32_t* halves(uint64_t* barrier) { return reinterpret_cast<int32_t*>(barrier); }

inline unsigned char* dynamic_shared() { return emulation::here().shared.data(); }
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  halves(barrier)[0] = 0;
  halves(barrier)[1] = static_cast<int32_t>(arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) { halves(barrier)[0] += static_cast<int32_t>(bytes); }
inline void barrier_arrive(uint64_t* barrier) {
  --halves(barrier)[1];
  emulation::progress = true;
}
inline void barrier_wait(uint64_t* barrier) {
  while (halves(barrier)[0] != 0 || halves(barrier)[1] != 0) {
    emulation::pause();
  }
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  const auto* from = static_cast<const char*>(global);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) % 16 || bytes == 0) {
    emulation::fail("a bulk copy is not aligned");
  }
  const bool inside = std::any_of(emulation::readable.begin(), emulation::readable.end(), [&](const auto& range) {
    return from >= range.first && from + bytes <= range.second;
  });
  if (!inside) {
    emulation::fail("a bulk copy reads past its tensor");
  }
  auto& memory = emulation::here().shared;
  auto* to = static_cast<unsigned char*>(shared);
  if (to < memory.data() || to + bytes > memory.data() + memory.size()) {
    emulation::fail("a bulk copy writes past the shared memory");
  }
  emulation::copies.push_back([=] {
    std::memcpy(shared, global, bytes);
    halves(barrier)[0] -= static_cast<int32_t>(bytes);
  });
}
inline void named_barrier(int id, int threads) {
  auto& barrier = emulation::here().named[id];
  barrier.expected = threads;
  emulation::wait(barrier);
}
inline int cluster_rank() { return emulation::current->block; }
inline int cluster_size() { return static_cast<int>(emulation::blocks.size()); }
inline void cluster_arrive() { emulation::current->cluster_generation = emulation::arrive(emulation::cluster); }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { emulation::wait(emulation::cluster, emulation::current->cluster_generation); }
template <typename T>
T* in_block(T* shared, int rank) {
  auto* own = reinterpret_cast<const unsigned char*>(shared);
  return reinterpret_cast<T*>(emulation::blocks[rank].shared.data() + (own - emulation::here().shared.data()));
}

}  // namespace jdkd::hopper

#include "cuda/pearson_single.cuh"

using jdkd::pearson::single::Args;

// A level as ctypes passes it: pointers, N C HW, ranks teams chunk room, first cluster, column and part, scale.
struct EmulatedLevel {
  const void* s;
  const void* t;
  void* ds;
  int64_t n, c, hw, ranks, teams, chunk, room, first_cluster, first_column, first_part;
  double scale;
};

extern "C" void emulate(
    const EmulatedLevel* levels, int count, int itemsize, int vector, float* table, double* parts, int64_t columns,
    double eps, int skip_constant, int64_t clusters, int cluster, int warps, int64_t shared_bytes) {
  Args args{};
  emulation::readable.clear();
  for (int i = 0; i < count; ++i) {
    const EmulatedLevel& from = levels[i];
    args.at[i] = {
        from.s, from.t, from.ds,
        {from.c, static_cast<int>(from.n), static_cast<int>(from.hw), static_cast<int>(from.ranks),
         static_cast<int>(from.teams), static_cast<int>(from.chunk), static_cast<int>(from.room)},
        from.first_cluster, from.first_column, from.first_part, from.scale};
    for (const void* data : {from.s, from.t}) {
      const auto* begin = static_cast<const char*>(data);
      emulation::readable.emplace_back(begin, begin + from.n * from.c * from.hw * itemsize);
    }
  }
  args.count = count;
  args.table = table;
  args.parts = parts;
  args.columns = columns;
  args.eps = eps;
  args.skip_constant = skip_constant != 0;
  emulation::kernel = [&] {
    using namespace jdkd::pearson::single;
    if (itemsize == 4) {
      vector == 4 ? pearson_single_kernel<float, 4>(args) : pearson_single_kernel<float, 1>(args);
    } else {
      vector == 8 ? pearson_single_kernel<__nv_bfloat16, 8>(args) : pearson_single_kernel<__nv_bfloat16, 1>(args);
    }
  };
  for (int64_t i = 0; i < clusters; ++i) {
    emulation::run_cluster(static_cast<int>(i) * cluster, cluster, 32 * warps, static_cast<size_t>(shared_bytes));
  }
}
