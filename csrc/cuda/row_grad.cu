// row_grad: dL/dlogits from the logits, what the forward kept of each row, and up to five coefficients per row.
//
// Maths. core/gradient.h. One thread of a block makes the row's numbers and the label's entry in fp64 and leaves them
// in shared memory; the label's entry is put into its vector before that is stored, so no order of stores matters.
//
// Memory traffic. Each logit (and each of the reference's, with five coefficients) is read once, each gradient written
// once, 16 bytes at a time; lines are those of the output. A line of 16-bit gradients of fp32 logits is made from two of
// these. Where logits or reference lie differently relative to lines, or the reference is of another type, one kernel
// for all types puts vectors together from neighbouring lines. Rows with an ignored label and rows whose coefficients
// are all 0 are written 0 without being read. Few rows are split over blocks, whose pieces do not depend on each other.
//
// Aliasing. The output may be the logits, if it is of their type: each thread reads what it writes before it writes it,
// and what no other thread reads. State, coefficients, labels and the reference are not written.
//
// Numerics. Per element fp32, rounded once. -inf logits have e = 0 and gradient 0 whatever the factor is. NaN in the
// state makes the row NaN, and so does a label outside [0, V).
#include "kernels.cuh"

namespace qk {
namespace cuda {
namespace {

// Blocks per processor that the registers must leave room for.
constexpr int blocks_of(Form form, bool any) { return any || form == Form::kPair ? 3 : 4; }

__device__ __forceinline__ char* byte_of(const Rows& rows, const Shape& shape, int64_t row, int start) {
  return static_cast<char*>(rows.data) +
         (offset_of(rows, shape, row) + start) * (rows.dtype == DType::kFloat32 ? 4 : 2);
}

// Of logits of type T gradients of type G, or of any types (void).
template <class T, class G, Form kForm>
__global__ void __launch_bounds__(kThreads, blocks_of(kForm, std::is_same<T, void>::value))
    row_grad_kernel(const __grid_constant__ GradCall call, Split split) {
  __shared__ RowGrad shared;
  const int64_t row = blockIdx.x / static_cast<unsigned>(split.count);
  const int piece = static_cast<int>(blockIdx.x % static_cast<unsigned>(split.count));
  if (threadIdx.x == 0) shared = row_grad_of(call, row);
  __syncthreads();
  const RowGrad r = shared;
  const int start = split.start(piece), n = split.length(piece, call.shape.vocab);
  const int thread = static_cast<int>(threadIdx.x);
  if (!r.computed) {
    walk_fill(AnyOut{byte_of(call.out, call.shape, row, start), call.out.dtype}, n, r.fill, thread);
    return;
  }
  const int label = static_cast<int>(call.labels.data[row]) - start;
  const bool with_reference = kForm == Form::kPair && call.reference_state;
  if constexpr (std::is_same<T, void>::value) {
    const AnyRow policy = {byte_of(call.policy, call.shape, row, start), call.policy.dtype};
    const AnyRow reference = {with_reference ? byte_of(call.reference, call.shape, row, start) : nullptr,
                              call.reference.dtype};
    const AnyOut out = {byte_of(call.out, call.shape, row, start), call.out.dtype};
    walk_grad<kForm>(policy, reference, with_reference, out, n, label, r, thread);
  } else {
    using Row = AlignedRow<T, sizeof(T) / sizeof(G)>;
    const Row policy = {row_of<T>(call.policy, call.shape, row) + start};
    const Row reference = {kForm == Form::kPair ? row_of<T>(call.reference, call.shape, row) + start : nullptr};
    const AlignedOut<G> out = {const_cast<G*>(row_of<G>(call.out, call.shape, row)) + start};
    walk_grad<kForm>(policy, reference, kForm == Form::kPair, out, n, label, r, thread);
  }
}

template <class T, class G, Form kForm>
void launch_grad(const GradCall& call, const Launch& where, const Split& split) {
  launch("row_grad", row_grad_kernel<T, G, kForm>, call.shape.rows() * split.count, kThreads, where, call, split);
}

template <class T, class G>
void launch_form(const GradCall& call, const Launch& where, const Split& split) {
  if (call.coefficient_count != kCoefficientCount) return launch_grad<T, G, Form::kPlain>(call, where, split);
  if (call.reference_state) return launch_grad<T, G, Form::kPair>(call, where, split);
  launch_grad<T, G, Form::kFull>(call, where, split);
}

}  // namespace

void row_grad(const GradCall& call, const Launch& where) {
  if (call.shape.rows() == 0) return;
  check_vocab(call.shape);
  const OnDevice device(where.device);
  const Split split = split_of(call.shape.vocab, where.splits);
  const bool pair = call.coefficient_count == kCoefficientCount && call.reference_state;
  GradCall used = call;
  if (!pair) used.reference_state = nullptr;
  if (!in_lines(call, pair)) return launch_grad<void, void, Form::kPair>(used, where, split);
  with_type(call.out.dtype, [&](auto out) {
    using G = Pointee<decltype(out)>;
    if (sizeof(G) == 2 && call.policy.dtype == DType::kFloat32) return launch_form<float, G>(used, where, split);
    launch_form<G, G>(used, where, split);
  });
}

}  // namespace cuda
}  // namespace qk
