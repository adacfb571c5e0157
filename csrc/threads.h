// Threads are those of the host, torch or ONNX Runtime, whose entry points are handed over at run time: no second pool to
// oversubscribe the machine. Without them everything runs on the calling thread.
#pragma once

#include <cstdint>
#include <new>

namespace openwork {

typedef void (*RangeBody)(int64_t first, int64_t last, void* context);
typedef int32_t (*ParallelFor)(int64_t first, int64_t last, int64_t grain, RangeBody body, void* context);

extern ParallelFor parallel_for_of_host;

// body(first, last) on ranges of [0, count) of at least `grain`, in parallel where that pays. Throws what `body` may throw: of
// another thread the host catches it, and returns that there was something.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (!parallel_for_of_host || count <= grain) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  const int32_t failed = parallel_for_of_host(
      0, count, grain, [](int64_t first, int64_t last, void* context) { (*(const Body*)context)(first, last); },
      (void*)&body);
  if (failed) throw std::bad_alloc();
}

}  // namespace openwork
