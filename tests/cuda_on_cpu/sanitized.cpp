// Launches the kernels at shapes that touch every path, for a build with a sanitizer: the rows lie
// in allocations of their exact size, so that a read outside of one is seen.
#include <cmath>
#include <memory>

#include "../../csrc/cuda/launch.h"

namespace {

using Rows = cudaError_t(const rmipo::RowArguments<float>&, cudaStream_t);

// Rows of `vocab_size` columns, `offset` elements after an aligned place; plain ones have neither
// bias nor softcap;
// in one read where `one_pass` says so.
void rows(int64_t count, int64_t vocab_size, int64_t offset, rmipo::GradType type, bool plain,
          bool one_pass = false) {
  const int64_t size = offset + count * vocab_size;
  const auto logits = std::make_unique<float[]>(size);
  const auto grads = std::make_unique<float[]>(size);
  const auto logps = std::make_unique<float[]>(count);
  const auto ids = std::make_unique<int64_t[]>(count);
  const auto bias = std::make_unique<float[]>(vocab_size);
  const auto factors = std::make_unique<float[]>(count);
  for (int64_t i = 0; i < size; ++i) logits[i] = std::sin(static_cast<float>(i));
  if (one_pass) logits[size - 1] = 1e9f;  // the last row has to be read again
  for (int64_t i = 0; i < count; ++i) ids[i] = i == 1 ? -100 : i == 2 ? vocab_size : i % vocab_size;
  int32_t flag = 0;
  const bool half = type == rmipo::GradType::kBFloat16 || type == rmipo::GradType::kHalf;
  void* to = half ? static_cast<void*>(reinterpret_cast<uint16_t*>(grads.get()) + offset)
                  : static_cast<void*>(grads.get() + offset);
  const rmipo::RowArguments<float> arguments{logits.get() + offset,
                                             count,
                                             vocab_size,
                                             vocab_size,
                                             ids.get(),
                                             plain ? nullptr : bias.get(),
                                             {plain ? 0.0f : 1.0f, 5.0f},
                                             nullptr,
                                             logps.get(),
                                             type == rmipo::GradType::kNone ? nullptr : to,
                                             vocab_size,
                                             type,
                                             &flag,
                                             one_pass ? factors.get() : nullptr};
  (one_pass ? rmipo::launch_exponentials : static_cast<Rows*>(rmipo::launch_rows))(arguments,
                                                                                   nullptr);
}

void pairs(int64_t count, int64_t length) {
  const int64_t sequences = 2 * count;
  const auto tokens = std::make_unique<float[]>(sequences * length);
  const auto borders = std::make_unique<int32_t[]>(sequences + 1);
  for (int64_t i = 0; i <= sequences; ++i) borders[i] = static_cast<int32_t>(i * length);
  const auto out = std::make_unique<float[]>(9 * count);
  float* p = out.get();
  int32_t flag = 0;
  rmipo::launch_pairs(
      rmipo::PairPointers<float>{tokens.get(), borders.get(), sequences * length, tokens.get(),
                                 borders.get(), sequences * length, p, p + count, p + 2 * count,
                                 p + 3 * count, p + 5 * count, p + 7 * count, &flag},
      count, rmipo::PairOptions{rmipo::LossType::kRmipo, 2, 0.3, 1.6, false, 0.1, 0.5}, nullptr);
}

}  // namespace

int main() {
  using rmipo::GradType;
  for (const auto type : {GradType::kNone, GradType::kSame, GradType::kBFloat16, GradType::kHalf}) {
    for (const int64_t vocab_size : {1, 7, 4101}) {
      for (const int64_t offset : {0, 3}) rows(4, vocab_size, offset, type, true);
    }
    rows(4, 4101, 3, type, false);
  }
  rows(4, 7, 3, GradType::kBFloat16, true, true);
  for (const bool plain : {true, false}) rows(4, 4101, 3, GradType::kBFloat16, plain, true);
  pairs(3, 200);
  pairs(1, 0);
  return 0;
}
