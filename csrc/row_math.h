// What the CPU and the CUDA kernels share of a row's work: offsets, what a target asks, and the
// arithmetic of one logit (the CPU's blocks do that in vectors of their own). No torch header: nvcc
// takes 100 s to read one.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RMIPO_HD __host__ __device__ __forceinline__
#else
#define RMIPO_HD inline
#endif

namespace rmipo {

constexpr int64_t kIgnored = -100;  // target id of a row that is not scored

// Offset of element (row, column). N * V passes 2^31 at row 14,135 of a 151,936-token vocabulary,
// so the product is taken in 64 bits.
RMIPO_HD int64_t row_offset(int64_t row, int64_t row_stride, int64_t column) {
  return row * row_stride + column;
}

// What a target id asks of its row. The test is in 64 bits: 2^40 must not wrap into the vocabulary.
enum class Target { kScored, kIgnored, kInvalid };

RMIPO_HD Target classify(int64_t id, int64_t vocab_size) {
  if (id == kIgnored) return Target::kIgnored;
  return id >= 0 && id < vocab_size ? Target::kScored : Target::kInvalid;
}

// product -> logit: softcap * tanh((product + bias) * scale / softcap); softcap 0 means none.
template <typename A>
struct Transform {
  A softcap;
  A scale;

  RMIPO_HD A logit(A product, A bias) const {
    const A x = (product + bias) * scale;
    return softcap > A(0) ? softcap * std::tanh(x / softcap) : x;
  }
  // d logit / d product, from the logit itself.
  RMIPO_HD A slope(A logit) const {
    if (!(softcap > A(0))) return scale;
    const A t = logit / softcap;
    return scale * (A(1) - t * t);
  }
};

}  // namespace rmipo
