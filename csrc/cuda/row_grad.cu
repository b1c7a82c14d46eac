// row_grad: dL/dlogits from the logits, what the forward saved of each row, and up to five coefficients per row.
//
// Maths. core/gradient.h. One thread of a block computes the row's factors and the label's entry in fp64 and leaves
// them in shared memory; the label's entry is put into its vector before that is stored, so no order of stores matters.
//
// Memory traffic. Each logit (and each of the reference's, with five coefficients) is read once, each gradient written
// once, by 128-bit loads and stores; vectors begin at multiples of 16 bytes of the output. A vector of 16-bit gradients
// of fp32 logits comes from two vectors of these. Where logits or reference have another alignment modulo 16 bytes than
// the output, or the reference has another type, one kernel for all types and alignments (AnyRow) assembles vectors
// from aligned ones. Rows with an ignored label and rows whose coefficients are all 0 are set to 0 without being read.
// Few rows are split over blocks, whose pieces do not depend on each other.
//
// Aliasing. The output may be the logits, if it is of their type: each thread reads what it writes before it writes it,
// and what no other thread reads. Softmax statistics, coefficients, labels and the reference are not written.
//
// Numerics. Per element fp32, rounded once. -inf logits have e = 0 and gradient 0 whatever the factor is. NaN in the
// softmax statistics makes the row NaN, and so does a label outside [0, V).
#include "dispatch.h"
#include "launch.cuh"
#include "row_grad_entries.h"

namespace qk {
namespace cuda {
namespace {

// Blocks per SM for which `__launch_bounds__` leaves registers.
constexpr int blocks_of(Form form, bool any) { return (any || form == Form::kPair ? 6 : 8) * 128 / kThreads; }

__device__ __forceinline__ char* address_of(const Rows& rows, const Shape& shape, int64_t row, int start) {
  return static_cast<char*>(rows.data) +
         (offset_of(rows, shape, row) + start) * (rows.dtype == DType::kFloat32 ? 4 : 2);
}

// Gradients of type G of logits of type T; void: of any types and alignments.
template <class T, class G, Form kForm>
__global__ void __launch_bounds__(kThreads, blocks_of(kForm, std::is_same<T, void>::value))
    row_grad_kernel(const __grid_constant__ GradCall call, Split split) {
  __shared__ RowGrad shared;
  const int64_t row = blockIdx.x / static_cast<unsigned>(split.count);
  const int piece = static_cast<int>(blockIdx.x % static_cast<unsigned>(split.count));
  if (threadIdx.x == 0) shared = prepare_row_grad(call, row);
  __syncthreads();
  const RowGrad r = shared;
  const int start = split.start(piece), n = split.length(piece, call.shape.vocab);
  const int thread = static_cast<int>(threadIdx.x);
  if (!r.computed) {
    fill_row(AnyOut{address_of(call.out, call.shape, row, start), call.out.dtype}, n, r.fill, thread);
    return;
  }
  const int label = static_cast<int>(call.labels.data[row]) - start;
  const bool with_reference = kForm == Form::kPair && call.reference_softmax;
  if constexpr (std::is_same<T, void>::value) {
    const AnyRow policy = {address_of(call.policy, call.shape, row, start), call.policy.dtype};
    const AnyRow reference = {with_reference ? address_of(call.reference, call.shape, row, start) : nullptr,
                              call.reference.dtype};
    const AnyOut out = {address_of(call.out, call.shape, row, start), call.out.dtype};
    write_grad_row<kForm>(policy, reference, with_reference, out, n, label, r, thread);
  } else {
    using Row = AlignedRow<T, sizeof(T) / sizeof(G)>;
    const Row policy = {row_of<T>(call.policy, call.shape, row) + start};
    const Row reference = {kForm == Form::kPair ? row_of<T>(call.reference, call.shape, row) + start : nullptr};
    const AlignedOut<G> out = {const_cast<G*>(row_of<G>(call.out, call.shape, row)) + start};
    write_grad_row<kForm>(policy, reference, kForm == Form::kPair, out, n, label, r, thread);
  }
}

template <class T, class G, Form kForm>
void launch_grad(const GradCall& call, const Launch& where, const Split& split) {
  launch("row_grad", row_grad_kernel<T, G, kForm>, call.shape.rows() * split.count, kThreads, where, call, split);
}

template <class T, class G>
void launch_form(const GradCall& call, const Launch& where, const Split& split) {
  if (call.coefficient_count != kCoefficientCount) return launch_grad<T, G, Form::kPlain>(call, where, split);
  if (call.reference_softmax) return launch_grad<T, G, Form::kPair>(call, where, split);
  launch_grad<T, G, Form::kFull>(call, where, split);
}

}  // namespace

void row_grad(const GradCall& call, const Launch& where) {
  if (call.shape.rows() == 0) return;
  check_vocab(call.shape);
  const DeviceGuard guard(where.device);
  const Split split = split_row(call.shape.vocab, where.splits);
  const bool pair = call.coefficient_count == kCoefficientCount && call.reference_softmax;
  GradCall used = call;
  if (!pair) used.reference_softmax = nullptr;
  if (!is_vectorizable(call, pair)) return launch_grad<void, void, Form::kPair>(used, where, split);
  with_type(call.out.dtype, [&](auto out) {
    using G = Pointee<decltype(out)>;
    if (sizeof(G) == 2 && call.policy.dtype == DType::kFloat32) return launch_form<float, G>(used, where, split);
    launch_form<G, G>(used, where, split);
  });
}

}  // namespace cuda
}  // namespace qk
