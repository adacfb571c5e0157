// The vectors of one instruction set. Included first by each of scalar.cpp, avx2.cpp, ..., which defines VECTOR_BYTES.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels.h"

namespace openwork {
namespace {

constexpr int kLanes = VECTOR_BYTES / 4;
typedef float Float __attribute__((vector_size(VECTOR_BYTES)));
typedef float FloatInMemory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntInMemory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int16_t Short __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t ShortInMemory __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

inline Float load(const float* from) { return *(const FloatInMemory*)from; }
inline void store(float* to, Float v) { *(FloatInMemory*)to = v; }
inline Float broadcast(float value) { return value - Float{}; }  // 0 + value would change -0.0, so compilers add

// f(0), f(1), ... f(N - 1) with constant arguments, so that arrays indexed by them become registers.
template <class F, int... I>
inline __attribute__((always_inline)) void unrolled(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
inline __attribute__((always_inline)) void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, N>());
}

}  // namespace
}  // namespace openwork
