// Memory whose neighbouring pages cannot be touched: what reads or writes past it faults.
//
// Fresh memory is poison: all bits set, a NaN in every floating type. What lies between an allocation and the end of
// its pages stays poison, which is checked.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>

namespace emulation {

constexpr int kPoison = 0xff;

inline size_t page() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

struct Region {
  unsigned char* pages;  // those that may be touched; one before and one after may not
  size_t page_bytes;
  unsigned char* data;
  size_t bytes;

  bool is_poison(const unsigned char* from, const unsigned char* to) const {
    return std::all_of(from, to, [](unsigned char byte) { return byte == kPoison; });
  }
  bool is_clean() const { return is_poison(pages, data) && is_poison(data + bytes, pages + page_bytes); }
};

// Every live allocation by its first page.
struct Regions {
  std::mutex mutex;
  std::map<const unsigned char*, Region> known;

  // Placed at the beginning of its pages, or as near to their end as the alignment allows.
  unsigned char* add(size_t bytes, size_t alignment, bool at_end) {
    const size_t page_bytes = std::max((bytes + page() - 1) / page(), size_t{1}) * page();
    void* all = mmap(nullptr, page_bytes + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) {
      throw std::runtime_error("emulation: no memory is left");
    }
    unsigned char* pages = static_cast<unsigned char*>(all) + page();
    mprotect(pages, page_bytes, PROT_READ | PROT_WRITE);
    std::memset(pages, kPoison, page_bytes);
    unsigned char* data = pages + (at_end ? (page_bytes - bytes) / alignment * alignment : 0);
    const std::lock_guard<std::mutex> lock(mutex);
    known[pages] = {pages, page_bytes, data, bytes};
    return data;
  }

  void remove(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = std::prev(known.upper_bound(static_cast<const unsigned char*>(data)));
    munmap(found->second.pages - page(), found->second.page_bytes + 2 * page());
    known.erase(found);
  }

  // Whether `bytes` from `at` on lie in one allocation.
  bool hold(const void* at, size_t bytes) const {
    const auto* first = static_cast<const unsigned char*>(at);
    const auto next = known.upper_bound(first);
    if (next == known.begin()) {
      return false;
    }
    const Region& region = std::prev(next)->second;
    return first >= region.data && first + bytes <= region.data + region.bytes;
  }

  bool are_clean() const {
    return std::all_of(known.begin(), known.end(), [](const auto& entry) { return entry.second.is_clean(); });
  }

  // Where an address lies that must not be touched.
  std::string place(const void* at) const {
    std::ostringstream text;
    const auto* address = static_cast<const unsigned char*>(at);
    for (const auto& [pages, region] : known) {
      if (address >= pages - page() && address < pages + region.page_bytes + page()) {
        const bool before = address < region.data;
        text << (before ? region.data - address : address - (region.data + region.bytes)) << " bytes "
             << (before ? "before" : "past") << " an allocation of " << region.bytes << " bytes";
        return text.str();
      }
    }
    text << at << ", which is of no allocation";
    return text.str();
  }
};

inline Regions regions;

// Takes the place of torch's allocator of host memory, so that whatever an operator makes is guarded too.
struct GuardedAllocator final : c10::Allocator {
  bool at_end = false;

  c10::DataPtr allocate(size_t bytes) override {
    void* data = regions.add(bytes, 1, at_end);
    return {data, data, [](void* held) { regions.remove(held); }, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

inline GuardedAllocator guarded;

}  // namespace emulation

// 0: torch's own memory again; 1: at the beginning of pages, aligned to whatever there is; 2: up to the end of pages.
extern "C" inline __attribute__((used)) void guard_memory(int how) {
  emulation::guarded.at_end = how == 2;
  c10::SetCPUAllocator(how == 0 ? c10::GetDefaultCPUAllocator() : &emulation::guarded, 0);
}
