// Arithmetic of sizes, and memory that a thread keeps: what the matmuls of every family share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace openwork {

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t parts(int64_t value, int64_t step) { return (value + step - 1) / step; }

// Memory of one thread that grows and stays. WHICH tells two such buffers apart.
template <int WHICH>
float* memory(size_t floats) {
  struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.data = (float*)std::aligned_alloc(64, up(int64_t(floats * 4), 64));
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = floats;
  }
  return buffer.data;
}

}  // namespace openwork
