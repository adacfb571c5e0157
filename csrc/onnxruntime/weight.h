// A compressed weight as docs/format.md has it, checked, and packed as the kernels of this machine read it.
//
//   O = outputs, T = slots of one output, L = lanes; n and m as in the pattern
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "api.h"
#include "memory.h"

namespace openwork {

// What a model holds that no kernel may see, in words for the one who loads it.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory for `size` numbers, zero, as a vector of any instruction set wants it.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(int64_t size) : size_(size), data_((T*)std::aligned_alloc(64, up(size * int64_t(sizeof(T)) + 1, 64)), std::free) {
    if (!data_) throw std::bad_alloc();
    for (int64_t i = 0; i < size; i++) data_.get()[i] = T(0);
  }
  T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  int64_t size_ = 0;
  std::unique_ptr<T, void (*)(void*)> data_{nullptr, std::free};
};

// One output has `rows` rows (the kernel positions of a convolution, else one) of `length` weights, cut into groups of m.
struct Weight {
  int32_t n, m;
  int64_t outputs, rows, length;
  Dtype dtype;          // float32 or int8
  Numbers<char> dense;  // (O, rows, groups * m) float32, or int16 for int8: what is added to fill up a row is 0

  int64_t groups() const { return (length + m - 1) / m; }  // of a row
  int32_t bytes() const { return dtype == kInt8 ? 2 : 4; }
};

// How many values and bytes of indices a file holds of such a weight. Raises Refused where its sizes do not fit one another.
struct StoredSizes {
  int64_t values, index_bytes;
};
StoredSizes stored_sizes(int64_t n, int64_t m, int64_t outputs, int64_t rows, int64_t length);

// Fills `weight.dense` from the values and indices of a file, of stored_sizes. Every rule on one weight of docs/format.md is
// checked: raises Refused.
void expand(const Kernels& kernels, Weight& weight, const void* values, const uint8_t* indices);

// As GEMM reads it: bit for bit what openwork.layouts.gemm makes.
struct PackedGemm {
  Numbers<char> values;       // (T * O) float32, or int16 for int8
  Numbers<uint16_t> offsets;  // (T * O + 1)
  int32_t tile = 0;
};
PackedGemm pack_gemm(const Kernels& kernels, const Weight& weight);

// As GEMV reads it: bit for bit what openwork.layouts.gemv makes. Of one row an output; `has_gemv` says for which m.
struct PackedGemv {
  Numbers<char> values;  // float32 or int8
  Numbers<uint32_t> indices;
  int64_t windows = 0, blocks = 0;
  int32_t window = 0, slots = 0;
};
bool has_gemv(int32_t m);
PackedGemv pack_gemv(const Kernels& kernels, const Weight& weight);

// As the dot products of int8 read it: bit for bit what openwork.layouts.dot_product makes, the rows of an output one
// after the other. `has_dot_product` says for which weights.
struct PackedDotProduct {
  Numbers<int8_t> values;
  Numbers<uint8_t> indices;
  int64_t windows = 0, blocks = 0;
  int32_t steps = 0;
};
bool has_dot_product(const Kernels& kernels, const Weight& weight);
PackedDotProduct pack_dot_product(const Kernels& kernels, const Weight& weight);

}  // namespace openwork
