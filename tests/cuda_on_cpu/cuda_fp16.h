// float16 by the compiler's own type.
#pragma once

struct __half {
  _Float16 value;
};

inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
