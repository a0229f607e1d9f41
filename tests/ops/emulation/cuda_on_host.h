// The language of CUDA on the host: kernels run as they are.
//
// A launch ends with an exception if a thread touches memory that is not its own, waits for ever, parts with its warp
// at a barrier, or does what the undefined-behaviour sanitizer knows.
#pragma once

#include "fibers.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <signal.h>

#include <numeric>
#include <tuple>

extern "C" inline __attribute__((used)) int launches = 0;  // of kernels, so far

namespace emulation {

// A vector is read and written at once.
template <typename T>
T* whole(T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) {
    fail("a vector access is not aligned");
  }
  return at;
}

// The sanitizer's checks end in an illegal instruction.
inline void on_signal(int which, siginfo_t* fault, void*) {
  if (which == SIGILL) {
    fail("a thread overflows, leaves an array, or uses a pointer that is not aligned for its type");
  }
  fail("a thread touches memory " + regions.place(fault->si_addr));
}

// Turns faults into failures while it lives.
class Faults {
 public:
  Faults() {
    stack_t own{};
    own.ss_sp = stack_;
    own.ss_size = sizeof stack_;
    sigaltstack(&own, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) {
      sigaction(kSignals[i], &action, &before_[i]);
    }
  }
  ~Faults() {
    for (int i = 0; i < 2; ++i) {
      sigaction(kSignals[i], &before_[i], nullptr);
    }
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr int kSignals[2] = {SIGSEGV, SIGILL};
  unsigned char stack_[64 << 10];
  stack_t stack_before_;
  struct sigaction before_[2];
};

inline void run(const cudaLaunchConfig_t& config, std::function<void()> body_of_thread) {
  int size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      size = static_cast<int>(config.attrs[i].val.clusterDim.x);
    }
  }
  const unsigned threads = config.blockDim.x, count = config.gridDim.x;
  if (threads % kWarp != 0 || threads > 1024 || count == 0 || count % size != 0) {
    throw std::runtime_error("emulation: the grid, its blocks or its clusters have no size that CUDA takes");
  }
  ++launches;
  kernel = std::move(body_of_thread);
  blockDim.x = threads;
  gridDim.x = count;
  failure.clear();
  cluster = Barrier{};
  blocks = std::vector<Block>(size);
  for (Block& block : blocks) {
    if (config.dynamicSmemBytes > 0) {
      block.shared_bytes = config.dynamicSmemBytes;
      block.shared = regions.add(block.shared_bytes, 128, true);
    }
  }
  std::vector<unsigned> clusters(count / size);
  std::iota(clusters.begin(), clusters.end(), 0u);
  {
    const Faults faults;
    for (size_t i = 0; i < clusters.size() && failure.empty(); ++i) {
      std::swap(clusters[i], clusters[i + draw() % (clusters.size() - i)]);
      run_cluster(clusters[i] * size, size, static_cast<int>(threads));
    }
  }
  if (failure.empty() && !regions.are_clean()) {
    failure = "a thread wrote next to an allocation";
  }
  for (Block& block : blocks) {
    if (block.shared != nullptr) {
      regions.remove(block.shared);
    }
  }
  if (!failure.empty()) {
    for (const auto& fiber : fibers) {
      fiber->begun = false;  // abandoned where they are
    }
    throw std::runtime_error("emulation: " + failure);
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*entry)(Parameters...), Arguments&&... arguments) {
  const std::tuple<Parameters...> given(std::forward<Arguments>(arguments)...);
  run(*config, [&] { std::apply(entry, given); });
  return cudaSuccess;
}

}  // namespace emulation

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

inline float bits_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = before + value;
  return before;
}

#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __syncthreads() emulation::sync_block(JDKD_SITE)
#define __syncwarp() emulation::sync_warp(JDKD_SITE)
#define __shfl_sync(mask, value, from) emulation::exchange(value, from, JDKD_SITE)
#define __shfl_xor_sync(mask, value, other) emulation::exchange(value, emulation::lane() ^ (other), JDKD_SITE)
#define __shfl_down_sync(mask, value, by) \
  emulation::exchange(value, emulation::lane() + (emulation::lane() + (by) < 32 ? (by) : 0), JDKD_SITE)
#define __uint_as_float(bits) bits_as_float(bits)
#define __threadfence()
#define __ldcg(from) (*emulation::whole(from))
#define __ldg(from) (*emulation::whole(from))
#define __stwb(to, value) (*emulation::whole(to) = (value))
#define __stcs(to, value) (*emulation::whole(to) = (value))
#define cudaLaunchKernelEx emulation::launch
