// See traffic.h. Compiled without the hooks.
#include "traffic.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <list>
#include <unordered_map>
#include <vector>

namespace emulated {
namespace {

constexpr uintptr_t kSector = 32, kLine = 128;  // bytes

struct Access {
  uintptr_t address;
  unsigned bytes;
  const void* site;  // the instruction
  bool store;
};

// Least recently used sectors leave first.
class Cache {
 public:
  void resize(uint64_t bytes) {
    capacity_ = bytes / kSector;
    order_.clear();
    at_.clear();
  }
  bool enabled() const { return capacity_ > 0; }
  bool touch(uintptr_t sector) {  // whether it was there
    const auto found = at_.find(sector);
    if (found != at_.end()) {
      order_.splice(order_.begin(), order_, found->second);
      return true;
    }
    order_.push_front(sector);
    at_[sector] = order_.begin();
    if (order_.size() > capacity_) {
      at_.erase(order_.back());
      order_.pop_back();
    }
    return false;
  }

 private:
  uint64_t capacity_ = 0;
  std::list<uintptr_t> order_;
  std::unordered_map<uintptr_t, std::list<uintptr_t>::iterator> at_;
};

class Traffic {
 public:
  std::vector<Launch> launches;

  void start(uint64_t cache_bytes) {
    launches.clear();
    cache_.resize(cache_bytes);
    counting.enabled = true;
    find_ranges();
  }

  void begin_launch(const void* kernel, uint64_t blocks, uint64_t threads) {
    launches.push_back({reinterpret_cast<uintptr_t>(kernel) - base_, blocks, threads, {}, {}, 0, 0});
    by_thread_.assign(threads, {});
    atomics_.clear();
    for (auto& list : distinct_) list.clear();
  }

  void record(uintptr_t address, unsigned bytes, bool store, const void* site) {
    if (address >= counting.stack_begin && address < counting.stack_end) return;
    if (address >= host_begin_ && address < host_end_) return;
    if (address >= library_begin_ && address < library_end_) return;
    by_thread_[counting.thread].push_back({address, bytes, site, store});
  }

  void record_atomic(const void* address) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (at >= library_begin_ && at < library_end_) return;
    ++launches.back().atomics;
    launches.back().most_atomics = std::max(launches.back().most_atomics, ++atomics_[at]);
  }

  void end_block() {
    std::array<std::vector<uintptr_t>, 2> block;
    for (size_t warp = 0; warp < by_thread_.size(); warp += 32) {
      std::vector<Group> groups;
      std::unordered_map<const void*, std::vector<size_t>> at;  // groups of an instruction, by how often it was passed
      for (size_t thread = warp; thread < std::min(warp + 32, by_thread_.size()); ++thread) {
        std::unordered_map<const void*, size_t> passed;
        for (const Access& access : by_thread_[thread]) {
          std::vector<size_t>& turns = at[access.site];
          const size_t turn = passed[access.site]++;
          if (turn == turns.size()) {
            turns.push_back(groups.size());
            groups.push_back({access.store, 0, {}});
          }
          groups[turns[turn]].add(access);
        }
        by_thread_[thread].clear();
      }
      for (Group& group : groups) count(group, block[group.store]);
    }
    for (int store = 0; store < 2; ++store) {
      make_unique(block[store]);
      moved(store).by_blocks += block[store].size();
      distinct_[store].insert(distinct_[store].end(), block[store].begin(), block[store].end());
    }
  }

  void end_launch() {
    for (int store = 0; store < 2; ++store) {
      make_unique(distinct_[store]);
      moved(store).distinct = distinct_[store].size();
    }
  }

 private:
  struct Group {
    bool store;
    uint64_t bytes;
    std::vector<uintptr_t> sectors;
    void add(const Access& access) {
      bytes += access.bytes;
      for (uintptr_t s = access.address / kSector; s <= (access.address + access.bytes - 1) / kSector; ++s)
        if (sectors.empty() || sectors.back() != s) sectors.push_back(s);
    }
  };

  static void make_unique(std::vector<uintptr_t>& values) {
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
  }

  Moved& moved(bool store) { return store ? launches.back().store : launches.back().load; }

  void count(Group& group, std::vector<uintptr_t>& block) {
    make_unique(group.sectors);
    Moved& to = moved(group.store);
    to.bytes += group.bytes;
    ++to.instructions;
    to.sectors += group.sectors.size();
    uintptr_t line = 0;
    for (const uintptr_t sector : group.sectors) {
      if (to.lines == 0 || sector * kSector / kLine != line || sector == group.sectors.front()) ++to.lines;
      line = sector * kSector / kLine;
      if (cache_.enabled() && !cache_.touch(sector)) ++to.missed;
    }
    block.insert(block.end(), group.sectors.begin(), group.sectors.end());
  }

  // The library, whose static variables are the shared memory, and the stack of the thread that launches.
  void find_ranges() {
    Dl_info info;
    dladdr(static_cast<const void*>(&counting), &info);
    base_ = reinterpret_cast<uintptr_t>(info.dli_fbase);
    library_begin_ = library_end_ = base_;
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* self) {
          auto& traffic = *static_cast<Traffic*>(self);
          if (object->dlpi_addr != traffic.base_) return 0;
          for (int i = 0; i < object->dlpi_phnum; ++i)
            if (object->dlpi_phdr[i].p_type == PT_LOAD)
              traffic.library_end_ = std::max(traffic.library_end_, object->dlpi_addr + object->dlpi_phdr[i].p_vaddr +
                                                                        object->dlpi_phdr[i].p_memsz);
          return 1;
        },
        this);
    const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    host_begin_ = here - (1 << 20);
    host_end_ = here + (1 << 20);
  }

  uintptr_t base_ = 0, library_begin_ = 0, library_end_ = 0, host_begin_ = 0, host_end_ = 0;
  std::vector<std::vector<Access>> by_thread_;
  std::array<std::vector<uintptr_t>, 2> distinct_;  // sectors of the launch so far
  std::unordered_map<uintptr_t, uint64_t> atomics_;
  Cache cache_;
};

Traffic traffic;

void record(uintptr_t address, unsigned bytes, bool store, const void* site) {
  if (!counting.in_kernel) return;
  const Paused paused;
  traffic.record(address, bytes, store, site);
}

}  // namespace

void begin_launch(const void* kernel, uint64_t blocks, uint64_t threads) {
  if (counting.enabled) traffic.begin_launch(kernel, blocks, threads);
}
void record_atomic(const void* address) {
  if (counting.enabled) traffic.record_atomic(address);
}
void end_block() {
  if (counting.enabled) traffic.end_block();
}
void end_launch() {
  if (counting.enabled) traffic.end_launch();
}

}  // namespace emulated

// What -fsanitize=kernel-address calls.
#define EMULATED_ACCESS(size)                                            \
  void __asan_load##size##_noabort(uintptr_t address) {                  \
    emulated::record(address, size, false, __builtin_return_address(0)); \
  }                                                                      \
  void __asan_store##size##_noabort(uintptr_t address) {                 \
    emulated::record(address, size, true, __builtin_return_address(0));  \
  }
extern "C" {
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
void __asan_loadN_noabort(uintptr_t address, size_t bytes) {
  emulated::record(address, static_cast<unsigned>(bytes), false, __builtin_return_address(0));
}
void __asan_storeN_noabort(uintptr_t address, size_t bytes) {
  emulated::record(address, static_cast<unsigned>(bytes), true, __builtin_return_address(0));
}
void __asan_handle_no_return() {}
void __asan_before_dynamic_init(uintptr_t) {}
void __asan_after_dynamic_init() {}

// Called through ctypes. cache: bytes of the modelled L2 cache; 0: none.
void traffic_start(uint64_t cache) { emulated::traffic.start(cache); }
// Returns the number of launches since the start.
int traffic_stop() {
  emulated::counting.enabled = false;
  return static_cast<int>(emulated::traffic.launches.size());
}
const emulated::Launch* traffic_launch(int i) { return &emulated::traffic.launches[i]; }
}
