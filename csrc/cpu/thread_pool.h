// A pool of worker threads for loops over rows. Callers may be several at once; each takes part in its own loop.
//
// Not OpenMP, for three reasons: torch brings its own copy of libgomp and two of them in a process fight for the
// cores; libgomp hangs in a child that was forked after its threads were used, which is what data-loader workers are;
// and the number of threads has to follow torch.get_num_threads() call by call. The workers sleep between loops and
// belong to the process that made them: a forked child makes its own on first use.
#pragma once

#include <cstdint>
#include <functional>

namespace qk {

// Call body(i) for every i in [0, count), on up to `threads` threads, in no fixed order. Returns when all are done.
// `body` must not throw.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

}  // namespace qk
