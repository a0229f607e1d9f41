// What sm_90 adds, on the host, in place of csrc/common/hopper.cuh. Bulk copies land late, in another order.
#pragma once

#include "cuda_on_host.h"

#define JDKD_HOPPER
namespace jdkd::hopper {

// The 64 bits of a barrier in shared memory. A phase ends when no arrival and no byte is missing, and with it the next
// one begins. That it is over is kept: whoever waits for it goes on, even if the next has its own bytes missing, and
// what is expected or lands too late counts for the next.
struct Phases {
  int32_t bytes;
  uint8_t missing, arrivals, count, magic;

  static constexpr uint8_t kMagic = 0x5a;
  static Phases& of(uint64_t* barrier) {
    auto& phases = *reinterpret_cast<Phases*>(barrier);
    if (phases.magic != kMagic) {
      emulation::fail("an mbarrier is used before it was initialised");
    }
    return phases;
  }
  void change(int more_bytes, int fewer_arrivals) {
    bytes += more_bytes;
    missing -= fewer_arrivals;
    if (bytes < 0 || bytes >= 1 << 20) {
      emulation::fail("an mbarrier counts " + std::to_string(bytes) + " bytes; copies land that it did not expect");
    }
    if (bytes == 0 && missing == 0) {
      missing = arrivals;
      ++count;
      emulation::wake();
    }
  }
};
static_assert(sizeof(Phases) == sizeof(uint64_t));

inline unsigned char* dynamic_shared() { return emulation::here().shared; }
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  const auto count = static_cast<uint8_t>(arrivals);
  *reinterpret_cast<Phases*>(barrier) = {0, count, count, 0, Phases::kMagic};
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  Phases::of(barrier).change(static_cast<int>(bytes), 0);
}
inline void barrier_arrive(uint64_t* barrier) {
  Phases::of(barrier).change(0, 1);
  emulation::let_others();
}
// For the end of the first phase: as the hardware, by its parity.
inline void barrier_wait(uint64_t* barrier) {
  emulation::wait_until([&] { return Phases::of(barrier).count % 2 == 1; });
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) % 16 || bytes == 0) {
    emulation::fail("a bulk copy is not aligned");
  }
  if (!emulation::regions.hold(global, bytes)) {
    emulation::fail("a bulk copy reads past its tensor");
  }
  if (!emulation::regions.hold(shared, bytes)) {
    emulation::fail("a bulk copy writes past the shared memory");
  }
  emulation::copies.push_back({emulation::current->block, [=] {
    std::memcpy(shared, global, bytes);
    Phases::of(barrier).change(-static_cast<int>(bytes), 0);
  }});
  emulation::let_others();
}

// Barriers that a warp reaches as one: by default arguments, where they are called from.
#define JDKD_CALLER                                                       \
  const char *file = __builtin_FILE(), int line = __builtin_LINE(),       \
             const void *code = emulation::code_address()

inline void named_barrier(int id, int threads, JDKD_CALLER) {
  emulation::check_site({file, line, code});
  auto& barrier = emulation::here().named[id];
  barrier.expected = threads;
  emulation::meet(barrier);
}
inline int cluster_index() { return static_cast<int>(blockIdx.x / emulation::blocks.size()); }
inline int cluster_rank() { return emulation::current->block; }
inline int cluster_size() { return static_cast<int>(emulation::blocks.size()); }
inline void cluster_arrive(JDKD_CALLER) {
  emulation::sync_warp({file, line, code});
  emulation::current->in_cluster = emulation::arrive(emulation::cluster);
}
inline void cluster_arrive_relaxed(JDKD_CALLER) {
  cluster_arrive(file, line, code);
}
inline void cluster_wait(JDKD_CALLER) {
  emulation::sync_warp({file, line, code});
  emulation::wait(emulation::cluster, emulation::current->in_cluster);
}
template <typename T>
T* in_block(T* shared, int rank) {
  auto* own = reinterpret_cast<const unsigned char*>(shared);
  return reinterpret_cast<T*>(emulation::blocks[rank].shared + (own - emulation::here().shared));
}

}  // namespace jdkd::hopper
