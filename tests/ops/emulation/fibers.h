// The threads of CUDA on the host, one fiber each.
//
// The blocks of a grid run one after the other, those of a cluster together. Threads take turns in a random order: one
// goes on until it waits for others. A warp is preferred for a while, and a block of a cluster stands still for a while,
// so that some run far ahead. Shared memory is poison before a block begins.
#pragma once

#include "guarded_memory.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

extern "C" inline __attribute__((used)) uint64_t order = 1;  // of the threads: the state of what draws it, never 0

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10, kPoisonedStack = 8 << 10;

// Where the caller is in the code: of a function that is inlined twice, two places, as an instruction of the GPU is.
inline __attribute__((noinline)) const void* code_address() {
  asm volatile("");  // else calls might be merged
  return __builtin_return_address(0);
}

// Where a thread waits, in the source and in the code.
struct Site {
  const char* file;
  int line;
  const void* code;
};
inline std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }
#define JDKD_SITE (emulation::Site{__FILE__, __LINE__, emulation::code_address()})

// Entered once through its context, and then left and continued by jumps, which need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  unsigned char* stack = nullptr;
  int block = 0, thread = 0, shuffles = 0;
  Site waits_at{};
  unsigned in_cluster = 0;  // generation of the cluster's barrier in which it arrived
  bool begun = false;
};

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  std::vector<Fiber*> waiting;
};

// All lanes that are alive must meet a barrier at one place.
struct Warp {
  Barrier barrier;
  double slots[2][kWarp];  // for shuffles, which take turns
  Site site{};
  int lanes = 0, alive = 0;
  std::vector<Fiber*> ready;
};

struct Block {
  unsigned char* shared = nullptr;  // gone when all threads are
  size_t shared_bytes = 0;
  int alive = 0;
  Barrier all, named[16];
  Warp warps[32];
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Block> blocks;
inline Barrier cluster;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline std::vector<Fiber*> sleeping;
struct Copy {
  int block;  // that it goes to
  std::function<void()> land;
};
inline std::vector<Copy> copies;  // issued, but not landed
inline std::string failure;
inline unsigned first_block = 0, warps_of_block = 0;
inline int running = 0;        // threads
inline unsigned favourite = 0;  // the warp that goes on as long as it can, counted over the blocks of a cluster
inline int asleep = -1;         // a block that stands still
inline unsigned patience = 1;   // turns until a copy lands, about
inline unsigned turns = 0, nap = 0;  // until another warp is the favourite, another block asleep

inline unsigned draw() {
  order ^= order << 13;
  order ^= order >> 7;
  order ^= order << 17;
  return static_cast<unsigned>(order >> 16);
}

[[noreturn]] inline void fail(const std::string& what) {
  failure = what;
  _longjmp(scheduler, 1);
}

inline void land_a_copy() {
  const size_t which = draw() % copies.size();
  const Copy copy = copies[which];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(which));
  copy.land();
}

// From 0 to 2^bits, small numbers as often as large ones.
inline unsigned draw_length(unsigned bits) { return draw() % (1u << draw() % (bits + 1)); }

inline void make_ready(Fiber* fiber) { blocks[fiber->block].warps[fiber->thread / kWarp].ready.push_back(fiber); }

// Some lane of the favourite, or of another warp, which becomes it; null if every one waits.
inline Fiber* choose() {
  const auto count = static_cast<unsigned>(blocks.size()) * warps_of_block;
  if (turns-- == 0) {
    favourite = draw() % count;
    turns = draw_length(12);
  }
  if (blocks.size() > 1 && nap-- == 0) {
    asleep = static_cast<int>(draw() % blocks.size());
    nap = draw_length(18);
  }
  const unsigned from = draw() % count;
  for (unsigned i = 0; i <= count; ++i) {
    const unsigned which = i == 0 ? favourite : (from + i) % count;
    std::vector<Fiber*>& ready = blocks[which / warps_of_block].warps[which % warps_of_block].ready;
    if (static_cast<int>(which / warps_of_block) != asleep && !ready.empty()) {
      favourite = which;
      std::swap(ready[draw() % ready.size()], ready.back());
      Fiber* chosen = ready.back();
      ready.pop_back();
      return chosen;
    }
  }
  return nullptr;
}

// Where some thread waits.
inline std::string last_site() {
  for (const Block& block : blocks) {
    for (const Warp& warp : block.warps) {
      for (const Fiber* fiber : warp.barrier.waiting) {
        return " at " + text(fiber->waits_at);
      }
    }
    for (const Fiber* fiber : block.all.waiting) {
      return " at " + text(fiber->waits_at);
    }
  }
  return "";
}

// The thread whose turn it is.
inline Fiber* next() {
  for (;;) {
    if (!copies.empty() && draw() % patience == 0) {
      land_a_copy();
    }
    if (Fiber* chosen = choose()) {
      return chosen;
    }
    if (asleep >= 0) {
      asleep = -1;
    } else if (!copies.empty()) {
      land_a_copy();
    } else if (running > 0) {
      fail("a thread waits for ever" + last_site());
    } else {
      _longjmp(scheduler, 1);
    }
  }
}

inline void go_on(Fiber* fiber) {
  current = fiber;
  threadIdx.x = static_cast<unsigned>(fiber->thread);
  blockIdx.x = first_block + static_cast<unsigned>(fiber->block);
  if (fiber->begun) {
    _longjmp(fiber->place, 1);
  }
  fiber->begun = true;
  setcontext(&fiber->context);
}

inline __attribute__((noinline)) void pause() {
  if (_setjmp(current->place) == 0) {
    go_on(next());
  }
}

// Ends a turn without need.
inline void let_others() {
  make_ready(current);
  pause();
}

inline Block& here() { return blocks[current->block]; }
inline Warp& warp() { return here().warps[current->thread / kWarp]; }
inline int lane() { return current->thread % kWarp; }

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  for (Fiber* fiber : barrier.waiting) {
    make_ready(fiber);
  }
  barrier.waiting.clear();
}

inline unsigned arrive(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    release(barrier);
  }
  return generation;
}

inline void wait(Barrier& barrier, unsigned generation) {
  if (barrier.generation == generation) {
    barrier.waiting.push_back(current);
    pause();
  }
}

inline void meet(Barrier& barrier) { wait(barrier, arrive(barrier)); }

// For something that wake() tells of.
template <class Condition>
void wait_until(const Condition& holds) {
  while (!holds()) {
    sleeping.push_back(current);
    pause();
  }
}

inline void wake() {
  for (Fiber* fiber : sleeping) {
    make_ready(fiber);
  }
  sleeping.clear();
}

// Of a barrier that takes whole warps, or of a shuffle.
inline void check_site(Site site) {
  current->waits_at = site;
  Warp& own = warp();
  if (own.lanes == 0) {
    own.site = site;
  } else if (own.site.code != site.code) {
    fail("lanes of a warp wait at " + text(own.site) + " and at " + text(site));
  }
  own.lanes = (own.lanes + 1) % own.alive;
}

inline void sync_warp(Site site) {
  check_site(site);
  meet(warp().barrier);
}

inline void sync_block(Site site) {
  check_site(site);
  meet(here().all);
}

template <typename T>
T exchange(T value, int from, Site site) {
  static_assert(sizeof(T) <= sizeof(double));
  double* slots = warp().slots[current->shuffles++ % 2];
  std::memcpy(slots + lane(), &value, sizeof(T));
  sync_warp(site);
  std::memcpy(&value, slots + from, sizeof(T));
  return value;
}

// Where the variables marked __shared__ lie; only blocks that run alone may have some.
inline std::pair<unsigned char*, size_t> static_shared() {
  static std::pair<unsigned char*, size_t> found{};
  static thread_local volatile int first_use;  // before which they have no place
  if (found.first == nullptr) {
    first_use = 1;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          const auto address = reinterpret_cast<ElfW(Addr)>(&found);
          bool own = false;
          const ElfW(Phdr)* variables = nullptr;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const ElfW(Phdr)& part = info->dlpi_phdr[i];
            const ElfW(Addr) begin = info->dlpi_addr + part.p_vaddr;
            own = own || (part.p_type == PT_LOAD && address >= begin && address < begin + part.p_memsz);
            variables = part.p_type == PT_TLS ? &part : variables;
          }
          if (own && variables != nullptr && info->dlpi_tls_data != nullptr) {
            found = {static_cast<unsigned char*>(info->dlpi_tls_data), variables->p_memsz};
          }
          return own ? 1 : 0;
        },
        nullptr);
  }
  return found;
}

inline void poison(Block& block) {
  if (block.shared != nullptr) {
    std::memset(block.shared, kPoison, block.shared_bytes);
  }
}

// A fiber runs one thread of every block that comes.
inline void body() {
  for (;;) {
    kernel();
    Warp& own = warp();
    --running;
    if (--own.alive == 0) {
      own.lanes = 0;
    }
    if (--here().alive == 0) {
      for (const Copy& copy : copies) {
        if (copy.block == current->block) {
          fail("a block leaves while a bulk copy to it is under way");
        }
      }
      poison(here());
    }
    Barrier& all = here().all;
    if (--all.expected == all.arrived && all.arrived > 0) {
      release(all);  // __syncthreads waits for those that have not left
    }
    pause();
  }
}

inline Fiber& fiber_of(size_t i) {
  if (fibers.size() <= i) {
    fibers.emplace_back(new Fiber);
    fibers.back()->stack = regions.add(kStack, 1, false);
  }
  Fiber& fiber = *fibers[i];
  if (!fiber.begun) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
    std::memset(fiber.stack + kStack - kPoisonedStack, kPoison, kPoisonedStack);
  }
  return fiber;
}

// Runs neighbouring blocks together.
inline void run_cluster(unsigned first, int size, int threads) {
  first_block = first;
  running = size * threads;
  warps_of_block = static_cast<unsigned>(threads) / kWarp;
  cluster.expected = running;
  copies.clear();
  sleeping.clear();
  asleep = -1;
  turns = nap = 0;
  patience = 1u << draw() % 10;
  if (static_shared().first != nullptr) {
    std::memset(static_shared().first, kPoison, static_shared().second);
  }
  for (int b = 0; b < size; ++b) {
    Block& block = blocks[b];
    poison(block);
    block.all.expected = block.alive = threads;
    for (Warp& own : block.warps) {
      own.ready.clear();
    }
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fiber_of(static_cast<size_t>(b) * threads + i);
      fiber.block = b;
      fiber.thread = i;
      fiber.shuffles = 0;
      make_ready(&fiber);
      Warp& own = block.warps[i / kWarp];
      own.barrier.expected = own.alive = kWarp;
    }
  }
  if (_setjmp(scheduler) == 0) {
    go_on(next());
  }
}

}  // namespace emulation
