// row_stats of rows of one model at a time. See row_stats.cuh.
#include "row_stats.cuh"

namespace qk {
namespace cuda {

void launch_stats_one(const StatsCall& call, const Launch& where, const Split& split, Gather gather, int models,
                      bool of_reference) {
  with_type(of_reference ? call.reference.dtype : call.policy.dtype, [&](auto t) {
    using T = Pointee<decltype(t)>;
    switch (gather) {
      case Gather::kExp: return launch_stats<T, Gather::kExp, Reads::kOne>(call, where, split, models, of_reference);
      case Gather::kEntropy:
        return launch_stats<T, Gather::kEntropy, Reads::kOne>(call, where, split, models, of_reference);
      case Gather::kAll: return launch_stats<T, Gather::kAll, Reads::kOne>(call, where, split, models, of_reference);
    }
  });
}

}  // namespace cuda
}  // namespace qk
