// The pair losses, shared by the CPU and the CUDA kernel; formulas in rmipo_lite/ops/losses.py.
// Everything is double: P numbers cost nothing, and float would add its rounding to the margin.
#pragma once

#include <cmath>

#include "row_math.h"

namespace rmipo {

// `kernel` of the table in rmipo_lite/ops/losses.py.
enum class LossType : int64_t { kRmipo = 0, kSimpo = 1, kHinge = 2, kSimper = 3 };
constexpr int64_t kNumLossTypes = 4;

struct PairOptions {
  LossType loss_type;
  double beta, gamma_min, gamma_max;
  bool gamma_scaled_by_beta;
  double label_smoothing, simpo_gamma;
};

struct LossAndGrads {
  double loss, grad_chosen, grad_rejected;
};

RMIPO_HD double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
RMIPO_HD double sigmoid(double x) {
  const double e = exp(x > 0 ? -x : x);  // never overflows
  return (x > 0 ? 1.0 : e) / (1.0 + e);
}

// gamma_min + (gamma_max - gamma_min) * exp(-max(0, gap)). Comparisons are written so that NaN
// falls through every one of them and stays NaN.
RMIPO_HD double adaptive_gamma(double gap, double gamma_min, double gamma_max) {
  const double clamped = gap < 0 ? 0.0 : gap;
  const double gamma = gamma_min + (gamma_max - gamma_min) * exp(-clamped);
  return gamma < gamma_min ? gamma_min : gamma > gamma_max ? gamma_max : gamma;
}

RMIPO_HD LossAndGrads logistic(double z, const PairOptions& o) {
  const double e = o.label_smoothing;
  double loss = (1 - e) * softplus(-z);
  double slope = -(1 - e) * sigmoid(-z);
  if (e > 0) {  // not added where it is off: 0 * inf would be NaN
    loss += e * softplus(z);
    slope += e * sigmoid(z);
  }
  return {loss, o.beta * slope, -o.beta * slope};
}

// The margin of a loss: the detached number per pair.
RMIPO_HD double margin(double gap, const PairOptions& o) {
  switch (o.loss_type) {
    case LossType::kRmipo:
      return adaptive_gamma(gap, o.gamma_min, o.gamma_max);
    case LossType::kSimpo:
    case LossType::kHinge:
      return o.simpo_gamma;
    case LossType::kSimper:
      return 0.0;
  }
  return nan("");  // no such loss; refused before
}

RMIPO_HD LossAndGrads pair_loss(double chosen, double rejected, double gamma,
                                const PairOptions& o) {
  const double difference = chosen - rejected;
  switch (o.loss_type) {
    case LossType::kRmipo:
      return logistic(
          o.gamma_scaled_by_beta ? o.beta * (difference - gamma) : o.beta * difference - gamma, o);
    case LossType::kSimpo:
      return logistic(o.beta * difference - gamma, o);
    case LossType::kHinge: {
      const double shortfall = 1 - (o.beta * difference - gamma);
      if (shortfall != shortfall) return {shortfall, shortfall, shortfall};
      const double slope = shortfall > 0 ? -o.beta : 0.0;
      return {shortfall > 0 ? shortfall : 0.0, slope, -slope};
    }
    case LossType::kSimper: {
      const double w = exp(chosen), l = exp(rejected);
      return {l - w, -w, l};
    }
  }
  return {nan(""), nan(""), nan("")};  // no such loss; refused before
}

// Raw pointers of one call. prior_borders is null where there is no prior pass.
template <typename T>
struct PairPointers {
  const T* token_logps;
  const int32_t* borders;  // (2P + 1,)
  int64_t num_tokens;
  const T* prior_token_logps;
  const int32_t* prior_borders;  // (2P + 1,)
  int64_t num_prior_tokens;
  T *loss, *gamma, *gap, *logps, *prior_logps, *mean_grads;
  int32_t* flag;  // (1,), set where borders lie outside the tokens
};

// One pair, from four means: writes loss, gamma, gap and the derivatives of the two means.
template <typename T>
RMIPO_HD void write_pair(int64_t p, const double* mean, const double* prior, bool prior_defined,
                         const PairOptions& o, T* loss, T* gamma, T* gap, T* grads) {
  const double g = prior_defined ? (mean[0] - prior[0]) - (mean[1] - prior[1]) : 0.0;
  const double m = margin(g, o);
  const LossAndGrads out = pair_loss(mean[0], mean[1], m, o);
  loss[p] = static_cast<T>(out.loss);
  gamma[p] = static_cast<T>(m);
  gap[p] = static_cast<T>(g);
  grads[2 * p] = static_cast<T>(out.grad_chosen);
  grads[2 * p + 1] = static_cast<T>(out.grad_rejected);
}

// Whether a sequence's borders lie within the tokens; tested before any of them is read.
RMIPO_HD bool valid_borders(int64_t start, int64_t end, int64_t num_tokens) {
  return start >= 0 && start <= end && end <= num_tokens;
}

}  // namespace rmipo
