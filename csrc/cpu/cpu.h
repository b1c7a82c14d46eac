// The operations on the CPU: whole calls, any thread count, the best instruction set at hand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/calls.h"

namespace qk {

// The flat index of the first label outside [0, vocab) that is not ignored; -1 if there is none.
int64_t find_bad_label(const Labels& labels, const Shape& shape);

void row_stats(const StatsCall& call, int threads);
void row_grad(const GradCall& call, int threads);
void pair_loss(const PairCall& call);

// "GenuineIntel", "AuthenticAMD" and so on; empty where that is not known.
std::string cpu_vendor();

// Names of the instruction sets compiled in, best last; and the one in use.
std::vector<std::string> instruction_sets();
std::string instruction_set();
// Use another one (for tests and measurements). False if this machine or build lacks it. "amx_emulated" is not among
// `instruction_sets()` and always there: the best row kernels, and the AMX GEMMs in plain code.
bool use_instruction_set(const std::string& name);

}  // namespace qk
