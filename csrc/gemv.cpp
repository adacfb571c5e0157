// Matmuls of one row or a few with a compressed weight: blocks of outputs, shared among threads.
#include "api.h"
#include "threads.h"

using namespace openwork;

// `batch` rows of x, which is padded to whole windows.
OPENWORK_API int32_t openwork_gemv(const Kernels* kernels, const Gemv* gemv, int32_t dtype) {
  return status_of([&] {
    const int64_t work = gemv->windows * gemv->slots * kernels->lanes * gemv->batch;
    parallel_for(gemv->blocks, 1 + 16384 / work, [&](int64_t first, int64_t last) { kernels->gemv(*gemv, dtype, first, last); });
    return kDone;
  });
}
