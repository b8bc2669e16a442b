// Row work of linear_logps on the CPU: log-probability of each row's target and, on demand, the
// derivative with respect to the matrix product that gave the logits.
//
// Three passes over a row that stays in cache: transform and maximum, sum of exponentials,
// derivative. The float loops are written for the vectoriser and compiled for several instruction
// sets, of which the loader takes the best the machine has: one binary serves every x86-64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <limits>

#include "../checks.h"
#include "../row_math.h"

// By instruction set and not by "arch=haswell": that asks for the model, and a newer processor is
// none of the models listed.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define RMIPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RMIPO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define RMIPO_CLONES
#endif

namespace {

using rmipo::Target;
using rmipo::Tensor;
using rmipo::Transform;

// exp for x <= 0: 2^n * p(r) with |r| <= ln2 / 2 and a polynomial of degree 6. Largest relative
// error 2e-7 against double; 0 below -87.7; NaN stays NaN. One comparison alone: a second one
// becomes a branch, and the vectoriser leaves the loop alone.
__attribute__((always_inline)) inline float exp_negative(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -88.0f ? -88.0f : x;
  const float shifted = clamped * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The low bits of `shifted` hold n; shifting them into the exponent makes 2^n, and 0 of n = -127.
  const uint32_t bits = (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23;
  return p * __builtin_bit_cast(float, bits);
}
__attribute__((always_inline)) inline double exp_negative(double x) { return std::exp(x); }

template <typename A>
__attribute__((always_inline)) inline A soft(A x, A softcap) {
  const A magnitude = x < A(0) ? -x : x;
  const A e = exp_negative(A(-2) * magnitude / softcap);
  const A t = softcap * (A(1) - e) / (A(1) + e);
  return x < A(0) ? -t : t;
}

template <typename A>
__attribute__((always_inline)) inline A transform_and_max(A* x, const A* bias, int64_t n,
                                                          Transform<A> t) {
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) x[v] += bias[v];
  }
  if (t.scale != A(1)) {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) x[v] *= t.scale;
  }
  if (t.softcap > A(0)) {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) x[v] = soft(x[v], t.softcap);
  }
  A largest = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t v = 0; v < n; ++v) largest = x[v] > largest ? x[v] : largest;
  return largest;  // NaN is skipped here; the sum below catches it
}

// Sums blocks in A and the blocks in double: a float sum over 128k terms would lose digits.
template <typename A>
__attribute__((always_inline)) inline double sum_exp(const A* x, int64_t n, A largest) {
  constexpr int64_t kBlock = 2048;
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = start; v < end; ++v) sum += exp_negative(x[v] - largest);
    total += static_cast<double>(sum);
  }
  return total;
}

template <typename A>
__attribute__((always_inline)) inline void write_grads(A* x, int64_t n, A largest, A factor,
                                                       Transform<A> t) {
  if (t.softcap > A(0)) {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) x[v] = exp_negative(x[v] - largest) * factor * t.slope(x[v]);
  } else {
    const A scaled = factor * t.scale;
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) x[v] = exp_negative(x[v] - largest) * scaled;
  }
}

// One scored row; returns its log-probability. With grads, x becomes the derivative.
template <typename A>
__attribute__((always_inline)) inline A row(A* x, const A* bias, int64_t n, int64_t target,
                                            Transform<A> t, bool grads, A row_scale) {
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

const pid_t loading_process = getpid();

// at::parallel_for, but in the calling thread alone in a forked child, whose thread pool does not
// exist any more: waiting for it would hang for ever.
template <typename F>
void for_rows(int64_t rows, const F& f) {
  if (getpid() != loading_process) {
    f(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, 1, f);
  }
}

template <typename A>
void rows(Tensor& logits, const Tensor& target_ids, const std::optional<Tensor>& bias,
          double logit_scale, double logit_softcap, const std::optional<Tensor>& row_scale,
          Tensor& logps, bool grads, Tensor& flag) {
  const int64_t vocab_size = logits.size(1), stride = logits.stride(0);
  A* x = static_cast<A*>(logits.mutable_data_ptr());
  const auto* ids = static_cast<const int64_t*>(target_ids.const_data_ptr());
  const A* b = rmipo::const_or_null<A>(bias);
  const A* scales = rmipo::const_or_null<A>(row_scale);
  A* out = static_cast<A*>(logps.mutable_data_ptr());
  auto* invalid = static_cast<int32_t*>(flag.mutable_data_ptr());
  const Transform<A> t{static_cast<A>(logit_scale), static_cast<A>(logit_softcap)};
  for_rows(logits.size(0), [=](int64_t begin, int64_t end) {
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
      if (kind == Target::kInvalid) __atomic_store_n(invalid, 1, __ATOMIC_RELAXED);
    }
  });
}

void row_logps(Tensor logits, Tensor target_ids, std::optional<Tensor> bias, double logit_scale,
               double logit_softcap, std::optional<Tensor> row_scale, Tensor logps,
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
    rows<float>(logits, target_ids, bias, logit_scale, logit_softcap, row_scale, logps,
                grads.has_value(), flag);
  } else {
    rows<double>(logits, target_ids, bias, logit_scale, logit_softcap, row_scale, logps,
                 grads.has_value(), flag);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmipo_lite, CPU, m) { m.impl("row_logps", TORCH_BOX(&row_logps)); }
