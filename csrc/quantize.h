// Images as whole numbers, one scale each, in pieces that threads share: what the int8 convolutions have in common.
#pragma once

#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace openwork {

constexpr int64_t kQuantizePiece = 1 << 14;

inline int64_t quantize_pieces(int64_t count) { return parts(count, kQuantizePiece); }

// The scale of each of N images of `count` numbers; then put(at, some, scale) for numbers [at, at + some) of all. bits: N *
// quantize_pieces(count) of memory.
template <class Put>
void quantize_images(const Kernels& kernels, const float* x, int64_t N, int64_t count, float* scales, int32_t* bits, const Put& put) {
  const int64_t pieces = quantize_pieces(count);
  const auto each_piece = [&](const auto& body) {
    parallel_for(N * pieces, 2, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const int64_t at = i % pieces * kQuantizePiece;
        body(i, i / pieces * count + at, lesser(kQuantizePiece, count - at));
      }
    });
  };
  each_piece([&](int64_t i, int64_t at, int64_t some) { bits[i] = kernels.largest(x + at, some); });
  for (int64_t n = 0; n < N; n++) {
    int32_t most = 0;
    for (int64_t i = 0; i < pieces; i++) most = most > bits[n * pieces + i] ? most : bits[n * pieces + i];
    scales[n] = scale_for(most);
  }
  each_piece([&](int64_t i, int64_t at, int64_t some) { put(at, some, scales[i / pieces]); });
}

}  // namespace openwork
