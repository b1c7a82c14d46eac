// Zeroing memory that is not about to be read: gradient rows of ignored labels.
#pragma once

#include <cstddef>

namespace qk {

// Like memset to 0. Where the processor has an instruction that zeroes a cache line without reading it first (AMD's
// clzero), uses it: measured at 95 GB/s against 40 GB/s of memset on a 2-core Zen 5 virtual machine.
void fill_zero(void* data, size_t bytes);

}  // namespace qk
