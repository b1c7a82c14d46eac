#include "emulation.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if QK_EMULATION_THREADS
#include <chrono>
#include <condition_variable>
#include <thread>
#elif !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace qk {
namespace emulation {
namespace {

std::atomic<int64_t> only_block{-1};

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "emulated CUDA, block %u, thread %u: %s\n", block_index.x, thread_index.x, what);
  std::abort();
}

// What the threads of a warp exchange. Two sets of values: a thread is at most one shuffle ahead of the others of its
// warp, because it cannot leave the next one before they have arrived there.
struct Exchange {
  unsigned char values[2][16];
  int turn = 0;
};

#if QK_EMULATION_THREADS

// A barrier that can be used again. It does not wait for ever: a thread that never comes is a mistake of the kernel.
class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t round = round_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++round_;
      all_.notify_all();
    } else if (!all_.wait_for(lock, std::chrono::seconds(60), [&] { return round_ != round; })) {
      stop("other threads do not reach the barrier or shuffle at which this one waits");
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned count_, arrived_ = 0;
  uint64_t round_ = 0;
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), exchanges(threads) {
    for (unsigned w = 0; w < (threads + kWarp - 1) / kWarp; ++w)
      warps.push_back(std::make_unique<Barrier>(threads - w * kWarp < kWarp ? threads - w * kWarp : kWarp));
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<Exchange> exchanges;
};

Block* current = nullptr;

#else

enum class State { kReady, kAtBarrier, kAtShuffle, kEnded };

constexpr size_t kStackBytes = 256 << 10;  // sanitizers make frames large

#if defined(__x86_64__)

// Saves the registers that a call preserves and the stack pointer, and goes on where another fiber did so.
extern "C" void qk_emulation_switch(void** save, void* load);
asm(R"(
  .text
  .globl qk_emulation_switch
  .hidden qk_emulation_switch
  .type qk_emulation_switch, @function
qk_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size qk_emulation_switch, .-qk_emulation_switch
)");

using Context = void*;
void make_context(Context& context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where `entry` would return to; with it the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
void switch_context(Context& from, Context& to) { qk_emulation_switch(&from, to); }

#else

using Context = ucontext_t;
void make_context(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

struct Fiber {
  Context context{};
  std::unique_ptr<unsigned char[]> stack;
  State state = State::kEnded;
  void* fake_stack = nullptr;  // the address sanitizer's
};

// The fibers of one thread of the operating system. They are kept: after the end of a kernel each waits for the next.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Exchange> exchanges;
  Fiber host;
  bool from_host = false;  // the switch in progress
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  unsigned threads = 0, step = 1, ended = 0, at_barrier = 0;
  std::vector<unsigned> at_shuffle;  // of each warp
};

thread_local Block block;

unsigned warp_size(unsigned warp) {
  return block.threads - warp * kWarp < kWarp ? block.threads - warp * kWarp : kWarp;
}

// What a fiber does first when its turn comes: tells the address sanitizer, and learns where the host's stack is.
void arrive(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
  if (block.from_host) block.host_stack = stack, block.host_stack_bytes = bytes;
#else
  (void)fake_stack;
#endif
  block.from_host = false;
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  const bool to_host = &to == &block.host;
  __sanitizer_start_switch_fiber(&from.fake_stack, to_host ? block.host_stack : to.stack.get(),
                                 to_host ? block.host_stack_bytes : kStackBytes);
#endif
  switch_context(from.context, to.context);
  arrive(from.fake_stack);
}

// Goes on with the next thread that can; with the host when all have ended. Returns when the caller's turn comes.
void give_way(unsigned thread) {
  Fiber& mine = *block.fibers[thread];
  if (block.ended == block.threads) return switch_fiber(mine, block.host);
  for (unsigned i = 1; i <= block.threads; ++i) {
    const unsigned next = (thread + i * block.step) % block.threads;
    if (block.fibers[next]->state != State::kReady) continue;
    if (next != thread) {
      thread_index.x = next;
      switch_fiber(mine, *block.fibers[next]);
    }
    return;
  }
  stop("this thread waits at a barrier or shuffle that others of its block or warp do not reach");
}

void fiber_main() {
  arrive(nullptr);
  for (;;) {
    const unsigned thread = thread_index.x;
    (*block.kernel)();
    block.fibers[thread]->state = State::kEnded;
    ++block.ended;
    give_way(thread);
    thread_index.x = thread;
  }
}

#endif

}  // namespace

void run_only(int64_t index) { only_block = index; }

#if QK_EMULATION_THREADS

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;  // shared variables are static
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  for (unsigned b = 0; b < blocks; ++b) {
    if (only_block >= 0 && only_block != b) continue;
    Block block(threads);
    current = &block;
    std::vector<std::thread> all;
    for (unsigned t = 0; t < threads; ++t)
      all.emplace_back([&kernel, b, t] {
        block_index.x = b;
        thread_index.x = t;
        kernel();
      });
    for (std::thread& thread : all) thread.join();
  }
}

void sync_block() { current->barrier.wait(); }

void exchange(const void* mine, void* theirs, size_t size, unsigned source) {
  const unsigned thread = thread_index.x, warp = thread / kWarp;
  Exchange& own = current->exchanges[thread];
  const int turn = own.turn;
  own.turn = 1 - turn;
  std::memcpy(own.values[turn], mine, size);
  current->warps[warp]->wait();
  std::memcpy(theirs, current->exchanges[warp * kWarp + source].values[turn], size);
}

#else

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  block.kernel = &kernel;
  block.threads = threads;
  block.at_shuffle.assign((threads + kWarp - 1) / kWarp, 0);
  block.exchanges.resize(threads);
  while (block.fibers.size() < threads) {
    block.fibers.push_back(std::make_unique<Fiber>());
    block.fibers.back()->stack.reset(new unsigned char[kStackBytes]);
    make_context(block.fibers.back()->context, block.fibers.back()->stack.get(), fiber_main);
  }
  for (unsigned b = 0; b < blocks; ++b) {
    if (only_block >= 0 && only_block != b) continue;
    block.ended = block.at_barrier = 0;
    // Numbers of threads are powers of two: with an odd step the order visits all of them.
    const unsigned steps[] = {1, threads - 1, 13, threads - 29};
    block.step = steps[b % 4];
    block_index.x = b;
    for (unsigned t = 0; t < threads; ++t) {
      block.fibers[t]->state = State::kReady;
      block.exchanges[t].turn = 0;
    }
    thread_index.x = b * 37 % threads;
    block.from_host = true;
    switch_fiber(block.host, *block.fibers[thread_index.x]);
  }
}

void sync_block() {
  const unsigned thread = thread_index.x;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    for (unsigned t = 0; t < block.threads; ++t) block.fibers[t]->state = State::kReady;
  } else {
    block.fibers[thread]->state = State::kAtBarrier;
  }
  give_way(thread);
  thread_index.x = thread;
}

void exchange(const void* mine, void* theirs, size_t size, unsigned source) {
  const unsigned thread = thread_index.x, warp = thread / kWarp;
  Exchange& own = block.exchanges[thread];
  const int turn = own.turn;
  own.turn = 1 - turn;
  std::memcpy(own.values[turn], mine, size);
  if (++block.at_shuffle[warp] == warp_size(warp)) {
    block.at_shuffle[warp] = 0;
    for (unsigned l = 0; l < warp_size(warp); ++l) block.fibers[warp * kWarp + l]->state = State::kReady;
  } else {
    block.fibers[thread]->state = State::kAtShuffle;
  }
  give_way(thread);
  thread_index.x = thread;
  std::memcpy(theirs, block.exchanges[warp * kWarp + source].values[turn], size);
}

#endif

}  // namespace emulation
}  // namespace qk
