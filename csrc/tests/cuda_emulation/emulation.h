// Runs a CUDA kernel on the host: the blocks of a launch one after the other, the threads of a block as fibers of the
// calling thread, which change places at barriers and shuffles only. In a build with ThreadSanitizer they are threads
// of the operating system instead, so that it sees what is not ordered by a barrier.
//
// A race that needs another schedule than the fibers' stays unseen; so that fewer do, each block begins with another
// thread and takes the threads in another order. Nothing here knows a device's memory model, caches or limits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#if defined(__SANITIZE_THREAD__)
#define QK_EMULATION_THREADS 1
#else
#define QK_EMULATION_THREADS 0
#endif

namespace qk {
namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index thread_index, block_index;

constexpr unsigned kWarp = 32;

// Runs `kernel` for each thread of each block. Aborts with a message if threads of a block or warp wait at different
// barriers, or if some of them have ended.
void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

// Only the blocks with this index are run from now on; -1: all. For tests of what one block writes.
void run_only(int64_t block);

// A barrier of the block.
void sync_block();

// A shuffle: every thread of a warp leaves `size` bytes and takes those of the thread that `source` is the lane of.
void exchange(const void* mine, void* theirs, size_t size, unsigned source);

}  // namespace emulation
}  // namespace qk
