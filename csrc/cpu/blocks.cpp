// Row work of linear_logps on the CPU, a block of the vocabulary at a time: each row's running
// maximum and sum of exponentials, and in place of the logits the exponentials that the second
// matrix product takes.
//
// A block of a row fits the first cache level, so its two passes (maximum; exponentials) read the
// memory once. The probabilities are never normalised here: 1 / sum is a factor of the whole row
// and is applied to the product. The target's own term is left out of sum and exponentials, so that
// 1 - p[target] is a sum of positive numbers and not a difference of nearly equal ones.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../checks.h"
#include "vector_math.h"

namespace {

using rmipo::exp_negative;
using rmipo::Tensor;
using rmipo::Transform;

struct BFloat16 {
  uint16_t bits;
};

RMIPO_INLINE float load(float x) { return x; }
RMIPO_INLINE double load(double x) { return x; }
RMIPO_INLINE float load(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
RMIPO_INLINE void store(float* to, float x) { *to = x; }
RMIPO_INLINE void store(double* to, double x) { *to = x; }
RMIPO_INLINE void store(BFloat16* to, float x) {  // to nearest; x >= 0 or NaN, ties up
  to->bits = static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + 0x8000u) >> 16);
}

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// The logit of a product. kPlain drops bias, scale and softcap from the loops that have none.
template <bool kPlain, typename T, typename A>
RMIPO_INLINE A logit(const T* x, const T* bias, int64_t v, Transform<A> t) {
  A z = load(x[v]);
  if constexpr (kPlain) return z;
  if (bias != nullptr) z += load(bias[v]);
  z *= t.scale;
  return t.softcap > A(0) ? rmipo::soft(z, t.softcap) : z;
}

// Terms that are summed in A before they join a sum in double, and that are widened at a time.
constexpr int64_t kTerms = 2048;

// Logits [start, start + count) of a row in A: the row itself, or widened into `wide`. A loop that
// mixes 16-bit and 32-bit elements is vectorised at half the width of one that doesn't.
template <bool kPlain, typename T, typename A>
RMIPO_INLINE const A* widened(const T* x, const T* bias, int64_t start, int64_t count,
                              Transform<A> t, A* wide) {
  if constexpr (kPlain && std::is_same_v<T, A>) {
    return x + start;
  } else {
    // A pass for each part: a choice inside one loop would keep the vectoriser out.
    RMIPO_SIMD
    for (int64_t i = 0; i < count; ++i) wide[i] = load(x[start + i]);
    if constexpr (!kPlain) {
      if (bias != nullptr) {
        RMIPO_SIMD
        for (int64_t i = 0; i < count; ++i) wide[i] += load(bias[start + i]);
      }
      RMIPO_SIMD
      for (int64_t i = 0; i < count; ++i) wide[i] *= t.scale;
      if (t.softcap > A(0)) {
        RMIPO_SIMD
        for (int64_t i = 0; i < count; ++i) wide[i] = rmipo::soft(wide[i], t.softcap);
      }
    }
    return wide;
  }
}

template <bool kPlain, typename T, typename A>
RMIPO_INLINE A largest(const T* x, const T* bias, int64_t n, Transform<A> t, A most) {
  A wide[kTerms];
  for (int64_t start = 0; start < n; start += kTerms) {
    const int64_t count = std::min(kTerms, n - start);
    const A* z = widened<kPlain>(x, bias, start, count, t, wide);
    RMIPO_SIMD_MAX(most)
    for (int64_t i = 0; i < count; ++i) most = z[i] > most ? z[i] : most;
  }
  return most;  // NaN is skipped here; the sum catches it
}

// Sum of exp(logit - most), and with kWrite exp(logit - most) * d logit / d product over x, less
// the constant factor t.scale.
template <bool kPlain, bool kWrite, typename T, typename A>
RMIPO_INLINE double exponentials(T* x, const T* bias, int64_t n, Transform<A> t, A most) {
  A wide[kTerms], terms[kTerms];
  double total = 0;
  for (int64_t start = 0; start < n; start += kTerms) {
    const int64_t count = std::min(kTerms, n - start);
    const A* z = widened<kPlain>(x, bias, start, count, t, wide);
    // In place where the row is of type A already.
    A* e = terms;
    if constexpr (kWrite && std::is_same_v<T, A>) e = x + start;
    A sum = 0;
    RMIPO_SIMD_SUM(sum)
    for (int64_t i = 0; i < count; ++i) {
      const A term = exp_negative(z[i] - most);
      sum += term;
      if constexpr (kWrite) e[i] = term;
    }
    if constexpr (kWrite && !kPlain) {
      if (t.softcap > A(0)) {
        RMIPO_SIMD
        for (int64_t i = 0; i < count; ++i) {
          const A bent = z[i] / t.softcap;
          e[i] *= A(1) - bent * bent;
        }
      }
    }
    if constexpr (kWrite && !std::is_same_v<T, A>) {
      RMIPO_SIMD
      for (int64_t i = 0; i < count; ++i) store(x + start + i, e[i]);
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// What is known of a block's rows from the columns before it. `sum` is over every token but the
// target.
template <typename A>
struct Running {
  A* max;
  double* sum;
  A* target_logit;
};

// One row's share of a block; returns the factor by which what was summed before is to be scaled.
template <bool kPlain, bool kWrite, typename T, typename A>
RMIPO_INLINE A fold(T* x, const T* bias, int64_t n, int64_t target, Transform<A> t, int64_t r,
                    Running<A> seen) {
  const A before = seen.max[r];
  const A most = largest<kPlain>(x, bias, n, t, before);
  const A origin = most == -std::numeric_limits<A>::infinity() ? A(0) : most;
  A factor = A(1);
  if (most != before) factor = static_cast<A>(std::exp(static_cast<double>(before - most)));
  double sum;
  if (target >= 0 && target < n) {
    seen.target_logit[r] = logit<kPlain>(x, bias, target, t);
    sum = exponentials<kPlain, kWrite>(x, bias, target, t, origin);
    sum += exponentials<kPlain, kWrite>(x + target + 1, bias ? bias + target + 1 : nullptr,
                                        n - target - 1, t, origin);
    if (kWrite) store(x + target, A(0));
  } else {
    sum = exponentials<kPlain, kWrite>(x, bias, n, t, origin);
  }
  seen.max[r] = most;
  seen.sum[r] = seen.sum[r] * static_cast<double>(factor) + sum;
  return factor;
}

template <typename T, typename A>
RMIPO_INLINE A any_fold(T* x, const T* bias, int64_t n, int64_t target, Transform<A> t, bool write,
                        int64_t r, Running<A> seen) {
  if (bias == nullptr && t.scale == A(1) && !(t.softcap > A(0))) {
    return write ? fold<true, true>(x, bias, n, target, t, r, seen)
                 : fold<true, false>(x, bias, n, target, t, r, seen);
  }
  return write ? fold<false, true>(x, bias, n, target, t, r, seen)
               : fold<false, false>(x, bias, n, target, t, r, seen);
}

// target_clones needs plain functions, one per type.
RMIPO_CLONES float fold_row(float* x, const float* bias, int64_t n, int64_t target,
                            Transform<float> t, bool write, int64_t r, Running<float> seen) {
  return any_fold(x, bias, n, target, t, write, r, seen);
}
RMIPO_CLONES double fold_row(double* x, const double* bias, int64_t n, int64_t target,
                             Transform<double> t, bool write, int64_t r, Running<double> seen) {
  return any_fold(x, bias, n, target, t, write, r, seen);
}
RMIPO_CLONES float fold_row(BFloat16* x, const BFloat16* bias, int64_t n, int64_t target,
                            Transform<float> t, bool write, int64_t r, Running<float> seen) {
  return any_fold(x, bias, n, target, t, write, r, seen);
}

template <typename T>
void fold_rows(Tensor& logits, const Tensor& target_ids, int64_t first_id,
               const std::optional<Tensor>& bias, double logit_softcap, double logit_scale,
               Tensor& row_max, Tensor& row_sum, Tensor& target_logits,
               std::optional<Tensor>& directions) {
  using A = typename Accumulate<T>::type;
  const int64_t n = logits.size(1), stride = logits.stride(0);
  T* x = static_cast<T*>(logits.mutable_data_ptr());
  const T* b = rmipo::const_or_null<T>(bias);
  const auto* ids = static_cast<const int64_t*>(target_ids.const_data_ptr());
  const Running<A> seen{static_cast<A*>(row_max.mutable_data_ptr()),
                        static_cast<double*>(row_sum.mutable_data_ptr()),
                        static_cast<A*>(target_logits.mutable_data_ptr())};
  A* u = directions ? static_cast<A*>(directions->mutable_data_ptr()) : nullptr;
  const int64_t width = directions ? directions->size(1) : 0;
  const int64_t u_stride = directions ? directions->stride(0) : 0;
  const Transform<A> t{static_cast<A>(logit_softcap), static_cast<A>(logit_scale)};
  rmipo::for_rows(logits.size(0), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* row = x + rmipo::row_offset(r, stride, 0);
      if (ids[r] == rmipo::kIgnored) {
        // Not read: neither NaN nor garbage in an unscored row can reach the result.
        if (u != nullptr) std::memset(row, 0, static_cast<size_t>(n) * sizeof(T));
        continue;
      }
      const int64_t target = ids[r] < first_id ? -1 : ids[r] - first_id;
      const A factor = fold_row(row, b, n, target, t, u != nullptr, r, seen);
      if (u == nullptr || factor == A(1)) continue;
      A* row_u = u + rmipo::row_offset(r, u_stride, 0);
      for (int64_t h = 0; h < width; ++h) row_u[h] *= factor;
    }
  });
}

void fold_logits(Tensor logits, Tensor target_ids, int64_t first_id, std::optional<Tensor> bias,
                 double logit_softcap, double logit_scale, Tensor row_max, Tensor row_sum,
                 Tensor target_logits, std::optional<Tensor> directions) {
  using rmipo::ScalarType;
  constexpr const char* kOp = "fold_logits";
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
      kOp, ": logits must be float32, float64 or bfloat16, got ",
      torch::headeronly::toString(dtype));
  const auto exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits must have shape (rows, columns), got ",
                  logits.dim(), " dimensions");
  STD_TORCH_CHECK(first_id >= 0, kOp, ": first_id must be at least 0, got ", first_id);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  rmipo::check_matrix(kOp, "logits", logits, rows, columns, logits);
  rmipo::check_vector(kOp, "target_ids", target_ids, rows, ScalarType::Long, logits);
  rmipo::check_vector(kOp, "row_max", row_max, rows, exact, logits);
  rmipo::check_vector(kOp, "row_sum", row_sum, rows, ScalarType::Double, logits);
  rmipo::check_vector(kOp, "target_logits", target_logits, rows, exact, logits);
  if (bias) rmipo::check_vector(kOp, "bias", *bias, columns, dtype, logits);
  if (directions) {
    rmipo::check_matrix(kOp, "directions", *directions, rows, directions->size(1), logits);
    STD_TORCH_CHECK(directions->scalar_type() == exact, kOp, ": directions must have dtype ",
                    torch::headeronly::toString(exact), ", got ",
                    torch::headeronly::toString(directions->scalar_type()));
  }
  const auto run = [&](auto storage) {
    fold_rows<decltype(storage)>(logits, target_ids, first_id, bias, logit_softcap, logit_scale,
                                 row_max, row_sum, target_logits, directions);
  };
  if (dtype == ScalarType::Float) {
    run(float{});
  } else if (dtype == ScalarType::Double) {
    run(double{});
  } else {
    run(BFloat16{});
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmipo_lite, CPU, m) { m.impl("fold_logits", TORCH_BOX(&fold_logits)); }
