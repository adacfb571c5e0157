// Matmuls with inputs as short as the weights, bfloat16 or int8: groups of rows and blocks of outputs, shared among threads.
#include "api.h"
#include "memory.h"
#include "quantize.h"
#include "threads.h"

using namespace openwork;

// Some groups of rows at a time, so that they stay in the second-level cache while all outputs pass over them. Where there
// are enough for all threads each packs its own, into memory of its own; else all pack first, into `packed`.
constexpr int64_t kTogether = 8;

static bool each_packs(const DotProduct& d, int64_t threads) { return dot_product_groups(d) >= 2 * kTogether * threads; }

OPENWORK_API int64_t openwork_dot_product_scratch(const Kernels* kernels, const DotProduct* d, int64_t threads) {
  return each_packs(*d, threads) ? 0 : d->batch * d->windows * kernels->lanes * 4;
}

static void dot_product(const Kernels* kernels, const DotProduct& d, int32_t dtype, int64_t threads) {
  const int64_t groups = dot_product_groups(d), together = parts(groups, parts(groups, kTogether));  // of nearly the same size
  const int64_t parts_of_all = parts(groups, together), rows = lesser(d.batch, together * kDotProductBatch);
  if (each_packs(d, threads))
    return parallel_for(parts_of_all, 1, [&](int64_t first, int64_t last) {
      DotProduct mine = d;
      mine.packed = (char*)memory<0>((kTogether * kDotProductBatch) * d.windows * kernels->lanes);
      for (int64_t from = first * together; from < lesser(last * together, groups); from += together) {
        const int64_t to = lesser(from + together, groups);
        mine.packed_from = from * d.batch / groups;
        kernels->pack(mine, dtype, from, to);
        kernels->dot_product(mine, dtype, 0, d.blocks, from, to);
      }
    });
  parallel_for(groups, 1 + 16384 / (d.K * kDotProductBatch),
               [&](int64_t first, int64_t last) { kernels->pack(d, dtype, first, last); });
  const int64_t work = d.windows * d.steps * kernels->lanes * rows;
  parallel_for(parts_of_all * d.blocks, 1 + 16384 / work, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t part = first / d.blocks, end = lesser(last, (part + 1) * d.blocks), from = part * together;
      const int64_t block = first - part * d.blocks;
      kernels->dot_product(d, dtype, block, block + end - first, from, lesser(from + together, groups));
      first = end;
    }
  });
}

OPENWORK_API int32_t openwork_dot_product(const Kernels* kernels, const DotProduct* d, int32_t dtype, int64_t threads) {
  return status_of([&] {
    dot_product(kernels, *d, dtype, threads);
    return kDone;
  });
}

// (N, count) numbers as whole ones plus 128, one scale for each of N. bits: N * quantize_pieces(count) of memory.
OPENWORK_API int32_t openwork_quantize(const Kernels* kernels, const float* x, int64_t N, int64_t count, uint8_t* to, float* scales,
                                       int32_t* bits) {
  return status_of([&] {
    quantize_images(*kernels, x, N, count, scales, bits,
                    [=](int64_t at, int64_t some, float scale) { kernels->quantize(x + at, some, scale, to + at); });
    return kDone;
  });
}

// Bytes that stand for floats, and floats of bytes.
OPENWORK_API int32_t openwork_to_bytes(const Kernels* kernels, const float* x, int64_t count, float inverse, int32_t zero, uint8_t* to) {
  return status_of([&] {
    parallel_for(count, 1 << 15, [&](int64_t first, int64_t last) { kernels->to_bytes(x + first, last - first, inverse, zero, to + first); });
    return kDone;
  });
}

OPENWORK_API int32_t openwork_from_bytes(const Kernels* kernels, const uint8_t* x, int64_t count, float scale, int32_t zero, float* to) {
  return status_of([&] {
    parallel_for(count, 1 << 15, [&](int64_t first, int64_t last) { kernels->from_bytes(x + first, last - first, scale, zero, to + first); });
    return kDone;
  });
}
