// row_stats of two models whose rows are read jointly. See row_stats.cuh.
#include "row_stats.cuh"

namespace qk {
namespace cuda {

void launch_stats_both(const StatsCall& call, const Launch& where, const Split& split, Gather gather) {
  with_type(call.policy.dtype, [&](auto t) {
    using T = Pointee<decltype(t)>;
    if (gather == Gather::kAll) return launch_stats<T, Gather::kAll, Reads::kBothJointly>(call, where, split, 1, false);
    launch_stats<T, Gather::kEntropy, Reads::kBothJointly>(call, where, split, 1, false);
  });
}

void launch_stats_any(const StatsCall& call, const Launch& where, const Split& split) {
  launch_stats<void, Gather::kAll, Reads::kAnyJointly>(call, where, split, 1, false);
}

}  // namespace cuda
}  // namespace qk
