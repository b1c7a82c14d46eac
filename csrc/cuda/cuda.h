// The operations on a GPU: what csrc/cpu/cpu.h is for the CPU. Nothing synchronises with the device, reads its memory
// from the host or allocates: every call is a launch or two on the caller's stream, and may be captured in a CUDA
// graph.
#pragma once

#include <string>

#include "../core/calls.h"

namespace qk {
namespace cuda {

// Where a call runs, and how rows are split over blocks.
struct Launch {
  int device = 0;
  void* stream = nullptr;   // a cudaStream_t
  int splits = 1;           // blocks per row
  void* scratch = nullptr;  // row_stats with splits > 1: rows * splits * partial_bytes(), 16-byte aligned
};

constexpr int kMaxSplits = 64;
int partial_bytes();

// Errors of the CUDA runtime are thrown as std::runtime_error with the operation and CUDA's own words.
void row_stats(const StatsCall& call, const Launch& launch);
void row_grad(const GradCall& call, const Launch& launch);
void pair_loss(const PairCall& call, const Launch& launch);

// Why nothing of this can run on a device; empty if it can.
std::string unavailable(int device);

}  // namespace cuda
}  // namespace qk
