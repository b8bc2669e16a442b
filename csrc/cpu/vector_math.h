// What the CPU loops over logits share. Everything here is inlined into functions that are compiled
// for several instruction sets, of which the loader takes the best the machine has: one binary
// serves every x86-64.
#pragma once

#include <torch/csrc/stable/ops.h>
#ifndef _WIN32
#include <unistd.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>

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
#ifdef _MSC_VER
#define RMIPO_INLINE __forceinline
#else
#define RMIPO_INLINE __attribute__((always_inline)) inline
#endif
// Over a loop that is to be vectorised, adds up `sum`, or takes a maximum. MSVC knows them under
// /openmp:experimental, but for the maximum: it has the reductions of OpenMP 2.0.
#if defined(_MSC_VER) && !defined(__clang__)
#ifdef _OPENMP
#define RMIPO_SIMD __pragma(omp simd)
#define RMIPO_SIMD_SUM(sum) __pragma(omp simd reduction(+ : sum))
#else
#define RMIPO_SIMD
#define RMIPO_SIMD_SUM(sum)
#endif
#define RMIPO_SIMD_MAX(most)
#else
#define RMIPO_PRAGMA(text) _Pragma(#text)
#define RMIPO_SIMD RMIPO_PRAGMA(omp simd)
#define RMIPO_SIMD_SUM(sum) RMIPO_PRAGMA(omp simd reduction(+ : sum))
#define RMIPO_SIMD_MAX(most) RMIPO_PRAGMA(omp simd reduction(max : most))
#endif

namespace rmipo {

// x <= 0 as n * ln2 + r with |r| <= ln2 / 2, and 2^n. One comparison alone: a second one becomes a
// branch, and the vectoriser leaves the loop alone.
struct Reduced {
  float r, power;
};
RMIPO_INLINE Reduced reduce(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147182f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -88.0f ? -88.0f : x;
  const float shifted = clamped * kLog2E + kRound;
  const float n = shifted - kRound;
  // The low bits of `shifted` hold n; shifting them into the exponent makes 2^n, and 0 of n = -127.
  const uint32_t bits = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  return {clamped - n * kLn2, std::bit_cast<float>(bits)};  // one fused operation if there is
}

// exp for x <= 0: 2^n * p(r), the polynomial of degree 5 that is best in relative error (7.5e-8).
// Against double: 2.1e-7 for x > -10, 4.3e-7 at most; 0 below -87.7; NaN stays NaN.
RMIPO_INLINE float exp_negative(float x) {
  const Reduced y = reduce(x);
  float p = 0.00829764828f;
  p = p * y.r + 0.0419154316f;
  p = p * y.r + 0.166675746f;
  p = p * y.r + 0.499988943f;
  p = p * y.r + 0.999999702f;
  p = p * y.r + 1.00000012f;
  return p * y.power;
}
RMIPO_INLINE double exp_negative(double x) { return std::exp(x); }

// exp(x) - 1 for x <= 0, to 1.2e-7 of its own size however near to 0 it is: 2^n * r * q(r) and
// 2^n - 1, where exp(r) = 1 + r * q(r) and q is best in relative error (1.1e-8).
RMIPO_INLINE float expm1_negative(float x) {
  const Reduced y = reduce(x);
  float q = 0.00138888729f;
  q = q * y.r + 0.00836910401f;
  q = q * y.r + 0.0416671373f;
  q = q * y.r + 0.166665062f;
  q = q * y.r + 0.499999970f;
  q = q * y.r + 1.0f;
  return y.power * (y.r * q) + (y.power - 1.0f);
}
RMIPO_INLINE double expm1_negative(double x) { return std::expm1(x); }

// softcap * tanh(x / softcap). Not from exp(x): 1 - exp(x) would lose the digits of a small x, and
// a softcap of 30 would lift that loss to 3e-6 nats.
template <typename A>
RMIPO_INLINE A soft(A x, A softcap) {
  const A e = expm1_negative(A(-2) * std::fabs(x) / softcap);
  return std::copysign(softcap * e / (A(2) + e), x);
}

#ifdef _WIN32
inline bool forked() { return false; }  // there is no fork
#else
inline const pid_t loading_process = getpid();
inline bool forked() { return getpid() != loading_process; }
#endif

// at::parallel_for, but in the calling thread alone in a forked child, whose thread pool does not
// exist any more: waiting for it would hang for ever.
template <typename F>
void for_rows(int64_t rows, const F& f) {
  if (forked()) {
    f(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, 1, f);
  }
}

}  // namespace rmipo
