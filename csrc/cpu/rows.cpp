// Row work of linear_logps on the CPU: log-probability of each row's target and, on demand, the
// derivative with respect to the matrix product that gave the logits.
//
// Three passes over a row that stays in cache: transform and maximum, sum of exponentials,
// derivative. The float loops are written for the vectoriser and compiled for several instruction
// sets, of which the loader takes the best the machine has: one binary serves every x86-64.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "../checks.h"
#include "vector_math.h"

namespace {

using rmipo::Target;
using rmipo::Tensor;
using rmipo::Transform;

using rmipo::exp_negative;
using rmipo::soft;

template <typename A>
RMIPO_INLINE A transform_and_max(A* x, const A* bias, int64_t n, Transform<A> t) {
  if (bias != nullptr) {
    RMIPO_SIMD
    for (int64_t v = 0; v < n; ++v) x[v] += bias[v];
  }
  if (t.scale != A(1)) {
    RMIPO_SIMD
    for (int64_t v = 0; v < n; ++v) x[v] *= t.scale;
  }
  if (t.softcap > A(0)) {
    RMIPO_SIMD
    for (int64_t v = 0; v < n; ++v) x[v] = soft(x[v], t.softcap);
  }
  A largest = -std::numeric_limits<A>::infinity();
  RMIPO_SIMD_MAX(largest)
  for (int64_t v = 0; v < n; ++v) largest = x[v] > largest ? x[v] : largest;
  return largest;  // NaN is skipped here; the sum below catches it
}

// Sums blocks in A and the blocks in double: a float sum over 128k terms would lose digits.
template <typename A>
RMIPO_INLINE double sum_exp(const A* x, int64_t n, A largest) {
  constexpr int64_t kBlock = 2048;
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    A sum = 0;
    RMIPO_SIMD_SUM(sum)
    for (int64_t v = start; v < end; ++v) sum += exp_negative(x[v] - largest);
    total += static_cast<double>(sum);
  }
  return total;
}

template <typename A>
RMIPO_INLINE void write_grads(A* x, int64_t n, A largest, A factor, Transform<A> t) {
  if (t.softcap > A(0)) {
    RMIPO_SIMD
    for (int64_t v = 0; v < n; ++v) x[v] = exp_negative(x[v] - largest) * factor * t.slope(x[v]);
  } else {
    const A scaled = factor * t.scale;
    RMIPO_SIMD
    for (int64_t v = 0; v < n; ++v) x[v] = exp_negative(x[v] - largest) * scaled;
  }
}

// One scored row; returns its log-probability. With grads, x becomes the derivative.
template <typename A>
RMIPO_INLINE A row(A* x, const A* bias, int64_t n, int64_t target, Transform<A> t, bool grads,
                   A row_scale) {
  const A largest = transform_and_max(x, bias, n, t);
  const double sum = sum_exp(x, n, largest);
  const A at_target = x[target];
  const A logp = static_cast<A>(static_cast<double>(at_target - largest) - std::log(sum));
  if (grads) {
    write_grads(x, n, largest, static_cast<A>(-static_cast<double>(row_scale) / sum), t);
    x[target] += row_scale * t.slope(at_target);
  }
  return logp;
}

// target_clones needs plain functions, one per type.
RMIPO_CLONES float row_work(float* x, const float* bias, int64_t n, int64_t target,
                            Transform<float> t, bool grads, float row_scale) {
  return row(x, bias, n, target, t, grads, row_scale);
}
RMIPO_CLONES double row_work(double* x, const double* bias, int64_t n, int64_t target,
                             Transform<double> t, bool grads, double row_scale) {
  return row(x, bias, n, target, t, grads, row_scale);
}

template <typename A>
void rows(Tensor& logits, const Tensor& target_ids, const std::optional<Tensor>& bias,
          double logit_softcap, double logit_scale, const std::optional<Tensor>& row_scale,
          Tensor& logps, bool grads, Tensor& flag) {
  const int64_t vocab_size = logits.size(1), stride = logits.stride(0);
  A* x = static_cast<A*>(logits.mutable_data_ptr());
  const auto* ids = static_cast<const int64_t*>(target_ids.const_data_ptr());
  const A* b = rmipo::const_or_null<A>(bias);
  const A* scales = rmipo::const_or_null<A>(row_scale);
  A* out = static_cast<A*>(logps.mutable_data_ptr());
  std::atomic<bool> invalid{false};
  const Transform<A> t{static_cast<A>(logit_softcap), static_cast<A>(logit_scale)};
  rmipo::for_rows(logits.size(0), [=, &invalid](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      A* row_x = x + rmipo::row_offset(r, stride, 0);
      const Target kind = rmipo::classify(ids[r], vocab_size);
      if (kind == Target::kScored) {
        out[r] = row_work(row_x, b, vocab_size, ids[r], t, grads, scales ? scales[r] : A(1));
        continue;
      }
      // Not read: neither NaN nor garbage in an unscored row can reach the result.
      const A value = kind == Target::kIgnored ? A(0) : std::numeric_limits<A>::quiet_NaN();
      out[r] = value;
      if (grads) std::fill(row_x, row_x + vocab_size, value);
      if (kind == Target::kInvalid) invalid = true;
    }
  });
  if (invalid) *static_cast<int32_t*>(flag.mutable_data_ptr()) = 1;
}

void row_logps(Tensor logits, Tensor target_ids, std::optional<Tensor> bias, double logit_softcap,
               double logit_scale, std::optional<Tensor> row_scale, Tensor logps,
               std::optional<Tensor> grads, Tensor flag) {
  constexpr const char* kOp = "row_logps";
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == rmipo::ScalarType::Float || dtype == rmipo::ScalarType::Double, kOp,
                  ": logits must be float32 or float64 on the CPU, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits must have shape (rows, vocab_size), got ",
                  logits.dim(), " dimensions");
  const int64_t n = logits.size(0), vocab_size = logits.size(1);
  rmipo::check_matrix(kOp, "logits", logits, n, vocab_size, logits);
  rmipo::check_vector(kOp, "target_ids", target_ids, n, rmipo::ScalarType::Long, logits);
  rmipo::check_vector(kOp, "logps", logps, n, dtype, logits);
  rmipo::check_vector(kOp, "flag", flag, 1, rmipo::ScalarType::Int, logits);
  if (bias) rmipo::check_vector(kOp, "bias", *bias, vocab_size, dtype, logits);
  if (row_scale) rmipo::check_vector(kOp, "row_scale", *row_scale, n, dtype, logits);
  if (grads) {
    STD_TORCH_CHECK(grads->data_ptr() == logits.data_ptr() && grads->scalar_type() == dtype, kOp,
                    ": grads must be the logits' own memory on the CPU");
  }
  if (dtype == rmipo::ScalarType::Float) {
    rows<float>(logits, target_ids, bias, logit_softcap, logit_scale, row_scale, logps,
                grads.has_value(), flag);
  } else {
    rows<double>(logits, target_ids, bias, logit_softcap, logit_scale, row_scale, logps,
                 grads.has_value(), flag);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmipo_lite, CPU, m) { m.impl("row_logps", TORCH_BOX(&row_logps)); }
