// Loops over rows on several threads. Callers may be several at once; each takes part in its own loop.
//
// Two sources of threads. Where the process has loaded an OpenMP runtime for everybody to see, as torch does, the loop
// borrows that runtime's team: torch's threads spin for a while after each of its operations, and a worker of ours
// would have to share their cores (measured: a forward pass right after a torch operation took 15.7 ms with threads of
// our own against 10.9 ms when torch's do not spin, 1024 x 128256 bf16 on two cores). Nothing is linked: the entry
// point is looked up at run time.
//
// Otherwise, and in a forked child (libgomp hangs there once its parent has used it, and data-loader workers are such
// children), a pool of our own: its workers sleep between loops and belong to the process that made them.
#pragma once

#include <cstdint>
#include <functional>

namespace qk {

// Call body(i) for every i in [0, count), on up to `threads` threads, in no fixed order. Returns when all are done.
// `body` must not throw.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

// Never borrow an OpenMP team in this process; for a process that knows itself to be a forked child.
void use_own_threads();

// "OpenMP" or "own": where the threads of the next loop come from.
const char* thread_source();

}  // namespace qk
