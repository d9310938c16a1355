// Counts what kernels move through memory. The compiler calls a function before each access to memory (the hooks of
// AddressSanitizer for kernels, below), and accesses to stacks and to shared memory are left out.
//
// Accesses of a warp by one instruction are coalesced as on a GPU: into sectors of 32 bytes. Lanes that pass the same
// instruction equally often are taken to pass it together.
#pragma once

#include <cstdint>

namespace emulated {

// Of the loads or of the stores of a launch.
struct Moved {
  uint64_t bytes;         // that threads ask for
  uint64_t instructions;  // of warps
  uint64_t sectors;       // that these instructions ask for
  uint64_t lines;         // of 128 bytes, likewise: the transactions
  uint64_t by_blocks;     // sectors, each counted once for a block: an L1 cache serves the rest
  uint64_t distinct;      // sectors, each counted once for the launch: a cache serves the rest
  uint64_t missed;        // sectors that are not in the modelled L2 cache
};

struct Launch {
  uint64_t kernel;  // address in the library
  uint64_t blocks, threads;
  Moved load, store;
  uint64_t atomics, most_atomics;  // additions and such, and how many of them go to one address
};

// What the emulator and the hooks share.
struct Counting {
  bool enabled = false;                      // between `traffic_start` and `traffic_stop`
  bool in_kernel = false;                    // whether a thread of a kernel is running, and not the emulator
  int thread = 0;                            // that thread of its block
  uintptr_t stack_begin = 0, stack_end = 0;  // its stack
};
inline Counting counting;

void begin_launch(const void* kernel, uint64_t blocks, uint64_t threads);
void record_atomic(const void* address);
void end_block();
void end_launch();

// The emulator itself is not counted.
struct Paused {
  bool before = counting.in_kernel;
  Paused() { counting.in_kernel = false; }
  ~Paused() { counting.in_kernel = before; }
};

}  // namespace emulated
