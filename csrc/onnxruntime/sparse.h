// What the operators have in common: the kernels of this machine, and a weight that is read and checked when a session is made.
#pragma once

#include <cstdlib>
#include <cstring>

#include "host.h"

extern "C" {  // gemm.cpp, gemv.cpp, dispatch.cpp
const openwork::Kernels* openwork_kernels(const char* name);
int64_t openwork_gemm_linear_scratch(const openwork::Kernels* kernels, const openwork::GemmLinear* call);
int32_t openwork_gemm_linear(const openwork::Kernels* kernels, const openwork::GemmLinear* call);
int64_t openwork_gemm_conv2d_scratch(const openwork::Kernels* kernels, const openwork::GemmConv2d* call);
int32_t openwork_gemm_conv2d(const openwork::Kernels* kernels, const openwork::GemmConv2d* call);
int64_t openwork_dot_product_scratch(const openwork::Kernels* kernels, const openwork::DotProduct* d, int64_t threads);
int32_t openwork_dot_product(const openwork::Kernels* kernels, const openwork::DotProduct* d, int32_t dtype, int64_t threads);
int32_t openwork_gemv(const openwork::Kernels* kernels, const openwork::Gemv* gemv, int32_t dtype);
}

namespace openwork {
namespace ort {

constexpr int64_t kMost = INT32_MAX;

inline void done(int32_t status) {
  if (status == kNoMemory) throw std::bad_alloc();
  if (status != kDone) throw Refused("an offset of the packed weight is none of its tile");
}

inline const Kernels* kernels_here() {
  const char* name = std::getenv("OPENWORK_ISA");
  const Kernels* kernels = openwork_kernels(name && *name ? name : nullptr);
  if (!kernels) throw Refused("OPENWORK_ISA=" + std::string(name) + ": this machine has no such instruction set");
  return kernels;
}

inline char* scratch_of(int64_t bytes) { return (char*)memory<3>(size_t(parts(bytes, 4))); }

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (int64_t length : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(length);
  return text + ")";
}

// What both operators have.
struct Sparse {
  // Data, values, indices, bias, scales, and what is added.
  static int input_type(const CustomOp*, size_t index) { return index == 1 ? kAnyType : index == 2 ? kUint8 : kFloat; }

  const Table* table;
  const Kernels* kernels;
  Weight weight{};
  Numbers<float> bias, scales;
  Activation activation;
  PackedGemm gemm;
  std::atomic<bool> seen_threads{false};

  explicit Sparse(const Node& node) : table(node.table), kernels(kernels_here()) {
    const int64_t relu = node.number("relu");
    if (relu != 0 && relu != 1) throw Refused("relu = " + std::to_string(relu) + "; needed 0 or 1");
    activation = relu ? kRelu : kNone;
  }

  // The weight of `shape`, whose groups run along dim 1.
  void read(const Node& node, const std::vector<int64_t>& shape) {
    int64_t rows = 1;
    for (size_t i = 0; i < shape.size(); i++) {
      if (shape[i] < 1 || shape[i] > kMost) throw Refused("a weight of shape " + text_of(shape));
      if (i > 1 && __builtin_mul_overflow(rows, shape[i], &rows)) throw Refused("a weight of shape " + text_of(shape));
    }
    const int64_t n = node.number("n"), m = node.number("m");
    const StoredSizes sizes = stored_sizes(n, m, shape[0], rows, shape[1]);
    const Tensor values = node.constant(1, "values"), indices = node.constant(2, "indices");
    if (values.type != kFloat && values.type != kSigned8) throw Refused("values have to be float32 or int8");
    std::vector<int64_t> needed = shape;
    needed.erase(needed.begin() + 1);
    needed.push_back((shape[1] + m - 1) / m * n);
    if (values.shape != needed) throw Refused("values " + text_of(values.shape) + "; this weight has " + text_of(needed));
    if (indices.type != kUint8 || indices.shape != std::vector<int64_t>{sizes.index_bytes})
      throw Refused("indices " + text_of(indices.shape) + "; this weight has (" + std::to_string(sizes.index_bytes) + ") of uint8");
    weight.n = int32_t(n), weight.m = int32_t(m);
    weight.outputs = shape[0], weight.rows = rows, weight.length = shape[1];
    weight.dtype = values.type == kFloat ? kFloat32 : kInt8;
    expand(*kernels, weight, values.data, (const uint8_t*)indices.data);
    if (node.has_input(3)) bias = one_an_output(node, 3, "bias");
    if (weight.dtype == kInt8) scales = one_an_output(node, 4, "scales");
  }

  Numbers<float> one_an_output(const Node& node, size_t index, const char* name) const {
    const Tensor given = node.constant(index, name);
    if (given.type != kFloat || given.shape != std::vector<int64_t>{weight.outputs})
      throw Refused(name + (" " + text_of(given.shape)) + "; needed (" + std::to_string(weight.outputs) + ") of float32");
    Numbers<float> copy(weight.outputs);
    std::memcpy(copy.data(), given.data, size_t(weight.outputs) * 4);
    return copy;
  }

  // What was read is not needed once it is packed.
  void forget() { weight.dense = Numbers<char>(); }

  GemmWeight gemm_weight(int64_t K) const {
    return {gemm.values.data(), gemm.offsets.data(), scales.data(), bias.data(), weight.dtype, weight.n, weight.m, gemm.tile, K,
            weight.outputs};
  }
};

}  // namespace ort
}  // namespace openwork
