// QSparseLinear and QSparseConv2d: products that take bytes and give bytes, or, with `ToFloat` behind the name, float32. A byte q stands for
// (q - zero_point) * scale, and `Requantize` (kernels.h) says what is computed. Inputs as of SparseLinear; `x` is uint8, of a convolution
// (N, H, W, C), `values` int8, `added` uint8 or float32, of the output's shape. For processors that have dot products of bytes.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "host.h"
#include "sparse.h"

namespace openwork {
namespace ort {

// An output is `Out`, uint8_t or float.
template <class Out>
struct Bytes : Sparse {
  static constexpr bool is_float = std::is_same<Out, float>::value;
  static constexpr int kOutput = is_float ? kFloat : kUint8;
  static constexpr size_t kInputs = 6, kOutputs = 1;
  static int input_type(const CustomOp*, size_t index) {
    return index == 1 ? kSigned8 : index == 5 ? kAnyType : index == 0 || index == 2 ? kUint8 : kFloat;
  }

  Requantize form{};
  Numbers<int32_t> sums;

  Bytes(const Node& node, const std::vector<int64_t>& shape) : Sparse(node, "activation", kGelu) {
    read(node, shape);
    if (!has_dot_product(*kernels, weight))
      throw Refused(kernels->dot_product ? "dot products do not take int8 at " + std::to_string(weight.n) + ":" + std::to_string(weight.m)
                                         : "this processor has no dot products of bytes (AVX-512 with VBMI and VNNI): export for it without calibrate");
    const float x_scale = scale(node, "x_scale");
    for (int64_t o = 0; o < weight.outputs; o++) scales[o] *= x_scale;
    form.zero = zero_point(node, "x_zero_point");
    if (has_added) form.residual_scale = scale(node, "added_scale"), form.residual_zero = zero_point(node, "added_zero_point");
    form.y_is_float = is_float;
    if (!is_float) form.y_inverse = float(1 / double(scale(node, "y_scale"))), form.y_zero = zero_point(node, "y_zero_point");
    dots = pack_dot_product(*kernels, weight);
    add_up();
    forget();
  }

  // The weights of each output: so much is added for one more in every byte.
  void add_up() {
    const int64_t count = weight.rows * weight.groups() * weight.m;
    const int16_t* whole = (const int16_t*)weight.dense.data();
    sums = Numbers<int32_t>(weight.outputs);
    for (int64_t o = 0; o < weight.outputs; o++, whole += count) {
      int64_t sum = 0, size = 0;
      for (int64_t i = 0; i < count; i++) sum += whole[i], size += whole[i] < 0 ? -whole[i] : whole[i];
      if (size > INT32_MAX / 255) throw Refused("the products of output " + std::to_string(o) + " may add up to more than 32 bits");
      sums[o] = int32_t(sum);
    }
    form.sums = sums.data();
  }

  static float scale(const Node& node, const char* name) {
    const float value = node.real(name);
    if (!(value > 0) || !std::isfinite(value)) throw Refused(name + (" = " + std::to_string(value)) + "; needed a number above 0");
    return value;
  }

  static int32_t zero_point(const Node& node, const char* name) {
    const int64_t value = node.number(name);
    if (value < 0 || value > 255) throw Refused(name + (" = " + std::to_string(value)) + "; needed 0 to 255");
    return int32_t(value);
  }

  // The output, of `shape`, for rows of K bytes, or pixels.
  void multiply(KernelContext* context, const std::vector<int64_t>& shape, const void* x, int64_t K, const Pixels* pixels) {
    Requantize own = form;
    if (has_added) {
      const Tensor added = added_of(context, shape);
      own.residual = added.data, own.residual_is_float = added.type == kFloat;
    }
    DotProduct call{};
    call.x = x, call.x_stride = call.K = K, call.pixels = pixels, call.requantize = &own;
    call.y = output_of(table, context, shape), call.batch = 1;  // which is in memory: no product overflows
    for (size_t i = 0; i + 1 < shape.size(); i++) call.batch *= shape[i];
    if (!call.batch) return;
    const Threads threads(table, context, &seen_threads);
    multiply_dots(call);
  }
};

template <class Out>
struct BytesLinear : Bytes<Out> {
  explicit BytesLinear(const Node& node) : Bytes<Out>(node, node.numbers("shape", 2)) {}

  void compute(KernelContext* context) {
    const Tensor x = input_of(this->table, context, 0);
    const int64_t K = this->weight.length;
    if (x.type != kUint8 || x.shape.empty() || x.shape.back() != K)
      throw Refused("input " + text_of(x.shape) + "; needed (..., " + std::to_string(K) + ") of uint8");
    std::vector<int64_t> shape = x.shape;
    shape.back() = this->weight.outputs;
    this->multiply(context, shape, x.data, K, nullptr);
  }
};

template <class Out>
struct BytesConv2d : Bytes<Out> {
  const Geometry geometry;

  explicit BytesConv2d(const Node& node) : Bytes<Out>(node, node.numbers("shape", 4)), geometry(node) {}

  void compute(KernelContext* context) {
    const Tensor x = input_of(this->table, context, 0);
    const Geometry& g = geometry;
    const int64_t channels = this->weight.length, whole = this->weight.groups() * this->weight.m;
    if (x.type != kUint8 || x.shape.size() != 4 || x.shape[3] != channels)
      throw Refused("input " + text_of(x.shape) + "; needed (N, H, W, " + std::to_string(channels) + ") of uint8");
    const int64_t H = x.shape[1], W = x.shape[2];
    const std::vector<int64_t> size = g.output_size(H, W, x.shape);
    const uint8_t* images = whole == channels ? (const uint8_t*)x.data : wider((const uint8_t*)x.data, x.size() / channels, channels, whole);
    const Pixels pixels{whole, H, W, size[0], size[1], int32_t(g.stride[0]), int32_t(g.stride[1]), int32_t(g.pads[0]), int32_t(g.pads[1]),
                        int32_t(g.dilation[0]), int32_t(g.dilation[1]), int32_t(g.kernel[1])};
    const std::vector<int64_t> shape{x.shape[0], size[0], size[1], this->weight.outputs};
    this->multiply(context, shape, images, this->weight.rows * whole, g.is_pointwise() ? nullptr : &pixels);
  }

  // Pixels of some channels as those of more, whose weights are zeros.
  static const uint8_t* wider(const uint8_t* from, int64_t pixels, int64_t channels, int64_t whole) {
    if (!pixels) return from;
    uint8_t* const all = (uint8_t*)memory<4>(size_t(parts(pixels * whole, 4)));
    std::memset(all, 0, size_t(pixels * whole));
    for (int64_t i = 0; i < pixels; i++) std::memcpy(all + i * whole, from + i * channels, size_t(channels));
    return all;
  }
};

}  // namespace ort
}  // namespace openwork
