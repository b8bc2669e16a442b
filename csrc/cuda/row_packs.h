// How a block goes over a row of logits and writes 16 bits or whole numbers: 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace rmipo {

constexpr int kThreads = 512;
// Elements that a thread takes at a time: 16 bytes of a 16-bit derivative, twice that of float.
constexpr int kPack = 8;
constexpr int kAccess = 16;  // bytes of the widest access

template <typename A>
struct Two {
  A x, y;
};

// Two values in the derivative's type, told by a pointer: one instruction rounds two to 16 bits.
template <typename A>
__device__ Two<A> round_two(A x, A y, const A*) {
  return {x, y};
}
inline __device__ __nv_bfloat162 round_two(float x, float y, const __nv_bfloat16*) {
  return __floats2bfloat162_rn(x, y);
}
inline __device__ __half2 round_two(float x, float y, const __half*) {
  return __floats2half2_rn(x, y);
}

template <typename T>
__device__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kAccess == 0;
}

// Elements before the first place where both rows are aligned; all of them where there is none.
template <typename A, typename G>
__device__ int64_t unaligned_head(const A* x, const G* grads, int64_t count) {
  for (int head = 0; head < kPack && head < count; ++head) {
    if (is_aligned(x + head) && (grads == nullptr || is_aligned(grads + head))) return head;
  }
  return count;
}

template <typename A>
__device__ void load(const A* p, A (&x)[kPack]) {
  int4 words[sizeof(x) / kAccess];
#pragma unroll
  for (unsigned i = 0; i < sizeof(x) / kAccess; ++i) words[i] = reinterpret_cast<const int4*>(p)[i];
  memcpy(x, words, sizeof(x));
}

template <typename A, typename G>
__device__ void store(A x, G* p) {
  *p = round_two(x, x, p).x;
}
template <typename A, typename G>
__device__ void store(const A (&x)[kPack], G* p) {
  int4 words[sizeof(G) * kPack / kAccess];
#pragma unroll
  for (int i = 0; i < kPack; i += 2) {
    const auto two = round_two(x[i], x[i + 1], p);
    memcpy(reinterpret_cast<char*>(words) + i * sizeof(G), &two, sizeof(two));
  }
#pragma unroll
  for (unsigned i = 0; i < sizeof(words) / kAccess; ++i) reinterpret_cast<int4*>(p)[i] = words[i];
}

// Calls `pack` for the aligned packs of a row and `single` for the elements before and after them,
// each once and always by the same thread.
template <typename Packed, typename Single>
__device__ void for_row(int64_t head, int64_t count, Packed pack, Single single) {
  const int64_t tail = head + (count - head) / kPack * kPack;
  for (int64_t v = threadIdx.x; v < head; v += kThreads) single(v);
  for (int64_t v = head + threadIdx.x * kPack; v < tail; v += kThreads * kPack) pack(v);
  for (int64_t v = tail + threadIdx.x; v < count; v += kThreads) single(v);
}

}  // namespace rmipo
