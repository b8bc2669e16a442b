// Row work of linear_logps on CUDA: one block per row, two reads and one write of the chunk (a row
// of 128k logits doesn't fit shared memory), 16 bytes at a time. Reductions run in a fixed order,
// so that two runs give the same bits; nothing synchronises with the host.
#include "launch.h"
#include "launch_kernel.h"
#include "row_packs.h"

namespace rmipo {
namespace {

// Running maximum and sum of exp(x - maximum). The maximum is never NaN; a NaN poisons the sum.
template <typename A>
struct MaxSum {
  A max, sum;

  __device__ void raise(A x) {
    if (x > max) {
      sum *= exp(max - x);
      max = x;
    }
  }
  __device__ A term(A x) const {
    // While nothing finite came, exp(-inf - -inf) would be NaN for what is merely impossible.
    return exp(x - (max == -INFINITY ? A(0) : max));
  }
  __device__ void add(A x) {
    raise(x);
    sum += term(x);
  }
  __device__ void add(const A (&x)[kPack]) {
    A largest = max;
#pragma unroll
    for (int i = 0; i < kPack; ++i) largest = fmax(largest, x[i]);  // passes over NaN
    raise(largest);
    A terms = 0;
#pragma unroll
    for (int i = 0; i < kPack; ++i) terms += term(x[i]);
    sum += terms;
  }
  __device__ void merge(MaxSum other) {
    if (other.max == -INFINITY) {  // nothing but a possible NaN in its sum
      sum += other.sum;
    } else if (other.max > max) {
      sum = sum * exp(max - other.max) + other.sum;
      max = other.max;
    } else {
      sum += other.sum * exp(other.max - max);
    }
  }
};

// Blocks that a multiprocessor shall hold: leaves 64 registers for float and 128 for double, which
// is enough that none is spilled.
template <typename A>
constexpr int kBlocks = sizeof(A) == 8 ? 1 : 2;

// kPlain: neither bias nor softcap, as most heads have it. Asking at every element costs three
// quarters more instructions.
template <typename A, typename G, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocks<A>) rows_kernel(RowArguments<A> a) {
  __shared__ MaxSum<A> shared[kThreads];
  __shared__ A shared_logp_terms[2];  // maximum, log of the sum
  const int64_t row = blockIdx.x;
  if (a.factors != nullptr && a.factors[row] != kAgain) return;  // the one pass did it
  const int64_t id = a.target_ids[row];
  G* grads = a.grad_type == GradType::kNone
                 ? nullptr
                 : static_cast<G*>(a.grads) + row_offset(row, a.grads_stride, 0);
  const Target kind = classify(id, a.vocab_size);
  if (kind != Target::kScored) {  // the row's logits are not read
    const A value = kind == Target::kIgnored ? A(0) : A(NAN);
    if (threadIdx.x == 0) {
      a.logps[row] = value;
      if (kind == Target::kInvalid) *a.flag = 1;
    }
    if (grads != nullptr) {
      for (int64_t v = threadIdx.x; v < a.vocab_size; v += kThreads) store(value, grads + v);
    }
    return;
  }
  const A* x = a.logits + row_offset(row, a.logits_stride, 0);
  const int64_t head = unaligned_head(x, grads, a.vocab_size);
  const auto transformed = [&](A product, int64_t v) {
    if (kPlain) return product * a.transform.scale;
    return a.transform.logit(product, a.bias == nullptr ? A(0) : a.bias[v]);
  };
  const auto load_logits = [&](int64_t v, A(&logits)[kPack]) {
    load(x + v, logits);
#pragma unroll
    for (int i = 0; i < kPack; ++i) logits[i] = transformed(logits[i], v + i);
  };
  // Read before any derivative is written: grads may be the same memory.
  const A at_target = transformed(x[id], id);
  MaxSum<A> mine{-INFINITY, A(0)};
  for_row(
      head, a.vocab_size,
      [&](int64_t v) {
        A logits[kPack];
        load_logits(v, logits);
        mine.add(logits);
      },
      [&](int64_t v) { mine.add(transformed(x[v], v)); });
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x].merge(shared[threadIdx.x + step]);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    // A row that holds +inf has no distribution.
    const A largest = shared[0].max == INFINITY ? A(NAN) : shared[0].max;
    shared_logp_terms[0] = largest;
    shared_logp_terms[1] = log(shared[0].sum);
    a.logps[row] = (at_target - largest) - shared_logp_terms[1];
  }
  if (grads == nullptr) return;
  // Without this the other threads would read the two terms before they are written.
  __syncthreads();
  const A largest = shared_logp_terms[0], log_sum = shared_logp_terms[1];
  const A scale = a.row_scale == nullptr ? A(1) : a.row_scale[row];
  const auto derivative = [&](A minus_probability, A logit) {
    return minus_probability * scale * (kPlain ? a.transform.scale : a.transform.slope(logit));
  };
  const auto of_others = [&](A logit) {
    return derivative(-exp((logit - largest) - log_sum), logit);
  };
  for_row(
      head, a.vocab_size,
      [&](int64_t v) {
        A logits[kPack];
        load_logits(v, logits);
#pragma unroll
        for (int i = 0; i < kPack; ++i) logits[i] = of_others(logits[i]);
        store(logits, grads + v);
      },
      [&](int64_t v) { store(of_others(transformed(x[v], v)), grads + v); });
  // Without this the target's own derivative could be overwritten by what the loop puts there.
  __syncthreads();
  if (threadIdx.x == 0) {
    // One less the probability, before rounding to 16 bits; expm1 keeps the digits of a target
    // that is nearly certain.
    const A minus_rest = -expm1((at_target - largest) - log_sum);
    store(derivative(minus_rest, at_target), grads + id);
  }
}

template <typename A, typename G>
cudaError_t launch(const RowArguments<A>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const bool plain = a.bias == nullptr && !(a.transform.softcap > 0);
  return launch_kernel(plain ? rows_kernel<A, G, true> : rows_kernel<A, G, false>, a.rows, kThreads,
                       stream, a);
}

}  // namespace

cudaError_t launch_rows(const RowArguments<float>& a, cudaStream_t stream) {
  switch (a.grad_type) {
    case GradType::kBFloat16:
      return launch<float, __nv_bfloat16>(a, stream);
    case GradType::kHalf:
      return launch<float, __half>(a, stream);
    default:
      return launch<float, float>(a, stream);
  }
}

cudaError_t launch_rows(const RowArguments<double>& a, cudaStream_t stream) {
  return launch<double, double>(a, stream);
}

}  // namespace rmipo
