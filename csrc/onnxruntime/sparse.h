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

// What all operators with a weight have.
struct Sparse {
  static constexpr int kOutput = kFloat;
  // Data, values, indices, bias, scales, and what is added.
  static int input_type(const CustomOp*, size_t index) { return index == 1 ? kAnyType : index == 2 ? kUint8 : kFloat; }

  const Table* table;
  const Kernels* kernels;
  Weight weight{};
  Numbers<float> bias, scales;
  Activation activation;
  bool has_added = false;
  PackedGemm gemm;
  PackedDotProduct dots;
  std::atomic<bool> seen_threads{false};

  // The attribute `name` is the activation, of 0 to `most`.
  explicit Sparse(const Node& node, const char* name = "relu", Activation most = kRelu) : table(node.table), kernels(kernels_here()) {
    const int64_t number = node.number(name);
    if (number < 0 || number > most) throw Refused(name + (" = " + std::to_string(number)) + "; needed 0 to " + std::to_string(most));
    activation = Activation(number);
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
    has_added = node.has_input(5);
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

  // What is added to an output of `shape`.
  Tensor added_of(KernelContext* context, const std::vector<int64_t>& shape) const {
    const Tensor added = input_of(table, context, 5);
    if (added.shape != shape || (added.type != kFloat && added.type != kUint8))
      throw Refused("added " + text_of(added.shape) + "; the output has " + text_of(shape));
    return added;
  }

  // `call` says what is multiplied, and where the result goes.
  void multiply_dots(DotProduct call) {
    const int64_t workers = seen_threads ? processors() : 1;
    call.values = dots.values.data(), call.indices = dots.indices.data(), call.windows = dots.windows, call.blocks = dots.blocks;
    call.bias = bias.data(), call.scales = scales.data(), call.steps = dots.steps, call.activation = activation;
    call.y_stride = call.outputs = weight.outputs;
    call.packed = scratch_of(openwork_dot_product_scratch(kernels, &call, workers));
    if (!call.requantize) call.x_scales = memory<4>(size_t(call.batch));
    done(openwork_dot_product(kernels, &call, kInt8, workers));
  }
};

// What a convolution does with its images.
struct Geometry {
  std::vector<int64_t> shape, kernel, stride, pads, dilation;  // shape: of the weight; pads: above, left, below, right

  explicit Geometry(const Node& node) : shape(node.numbers("shape", 4)), kernel{shape[2], shape[3]}, pads(node.numbers("pads", 4)) {
    stride = positive(node, "strides"), dilation = positive(node, "dilations");
    for (int64_t pad : pads)
      if (pad < 0 || pad > kMost) throw Refused("pads " + text_of(pads));
  }

  static std::vector<int64_t> positive(const Node& node, const char* name) {
    const std::vector<int64_t> values = node.numbers(name, 2);
    for (int64_t value : values)
      if (value < 1 || value > kMost) throw Refused(std::string(name) + " " + text_of(values));
    return values;
  }

  int64_t output_along(int dim, int64_t size) const {
    const int64_t room = size + pads[dim] + pads[dim + 2] - dilation[dim] * (kernel[dim] - 1) - 1;
    return room < 0 ? 0 : room / stride[dim] + 1;
  }

  // Of images of so many rows and columns; `given` is the shape they have.
  std::vector<int64_t> output_size(int64_t H, int64_t W, const std::vector<int64_t>& given) const {
    const std::vector<int64_t> size{output_along(0, H), output_along(1, W)};
    if (size[0] < 1 || size[1] < 1 || size[0] > kMost || size[1] > kMost || H > kMost || W > kMost)
      throw Refused("input " + text_of(given) + " gives no output of kernel " + text_of(kernel) + " with pads " + text_of(pads));
    return size;
  }

  // Whether each output pixel is of the input pixel in its place alone.
  bool is_pointwise() const {
    const std::vector<int64_t> ones(2, 1);
    return kernel == ones && stride == ones && pads == std::vector<int64_t>(4, 0);
  }
};

}  // namespace ort
}  // namespace openwork
