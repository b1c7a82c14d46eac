// See thread_pool.h. A loop is a counter that its caller and any idle workers draw indices from.
#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace qk {
namespace {

struct Loop {
  const std::function<void(int64_t)>* body;
  int64_t count;
  std::atomic<int64_t> next{0};
  int places = 0;  // workers that may still join; guarded by the pool's mutex
  int active = 0;  // workers inside; guarded by the pool's mutex

  void run() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*body)(i);
  }
};

class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t)>& body) {
    const int helpers = threads - 1;
    Loop loop;
    loop.body = &body;
    loop.count = count;
    loop.places = helpers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < helpers) {
        try {
          std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {
          break;  // no more threads are available: the loop runs on those there are
        }
        ++workers_;
      }
      loops_.push_back(&loop);
    }
    if (helpers == 1)
      wake_.notify_one();
    else
      wake_.notify_all();
    loop.run();
    std::unique_lock<std::mutex> lock(mutex_);
    remove(&loop);
    done_.wait(lock, [&] { return loop.active == 0; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return !loops_.empty(); });
      Loop* loop = loops_.front();
      ++loop->active;
      if (--loop->places == 0) remove(loop);
      lock.unlock();
      loop->run();
      lock.lock();
      remove(loop);  // its indices are drawn: nobody else needs to join
      if (--loop->active == 0) done_.notify_all();
    }
  }

  void remove(Loop* loop) {
    for (auto it = loops_.begin(); it != loops_.end(); ++it)
      if (*it == loop) {
        loops_.erase(it);
        return;
      }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Loop*> loops_;  // that workers may join
  int workers_ = 0;
};

// Never destroyed: the workers run until the process ends.
std::mutex pool_mutex;
Pool* pool = nullptr;

Pool& the_pool() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (!pool) pool = new Pool;
  return *pool;
}

// GOMP_parallel(body, data, threads, flags): runs body(data) on every thread of a team. GCC's runtime has it, and
// LLVM's and Intel's under the same name.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> team_allowed{true};

Team find_team() {
#if defined(_WIN32)
  return nullptr;
#else
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return team_allowed.load(std::memory_order_relaxed) ? team : nullptr;
#endif
}

#if !defined(_WIN32)
// At load time, so that no fork goes unseen.
const int fork_handlers = pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                                         [] {
                                           pool = nullptr;  // its threads did not follow into the child
                                           team_allowed = false;
                                           pool_mutex.unlock();
                                         });
#endif

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  if (count < threads) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  if (const Team team = find_team()) {
    Loop loop;
    loop.body = &body;
    loop.count = count;
    team([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, static_cast<unsigned>(threads), 0);
    return;
  }
  the_pool().run(count, threads, body);
}

void use_own_threads() { team_allowed = false; }

const char* thread_source() { return find_team() ? "OpenMP" : "own"; }

}  // namespace qk
