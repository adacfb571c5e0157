// The operators of domain `openwork`: SparseLinear and SparseConv2d, and AddLayerNormalization (normalize.h). Inputs: data (float32), `values` and `indices` of the
// compressed weight (docs/format.md), optionally `bias`, and `scales` where the values are int8, one an output, all constant; and of
// a convolution `added`, of the output's shape, as a residual connection adds it. Weights are checked and packed when a session is
// made. Of int8 the data is quantized as it comes: one scale a row, or an image.
//
//   B = rows of input, O = outputs, K = inputs
#include <cstring>
#include <mutex>

#include "normalize.h"
#include "quantize.h"
#include "sparse.h"
#include "threads.h"

namespace openwork {
namespace ort {
namespace {

constexpr int64_t kGemvRows = 16;  // at so many GEMV still takes half of GEMM's time (1024 x 1024, 2:4 and 1:8, AVX-512)

struct Linear : Sparse {
  static constexpr size_t kInputs = 5, kOutputs = 1;
  PackedGemv gemv;
  PackedDotProduct dots;  // of int8, for any number of rows, where the processor has them

  explicit Linear(const Node& node) : Sparse(node) {
    read(node, node.numbers("shape", 2));
    if (has_dot_product(*kernels, weight)) {
      dots = pack_dot_product(*kernels, weight);
      forget();
      return;
    }
    const int64_t rows = rows_of(node.input_shape(0));  // negative: any
    const bool few = has_gemv(weight.m) && rows <= kGemvRows, many = rows < 0 || rows > kGemvRows || !has_gemv(weight.m);
    if (few) gemv = pack_gemv(*kernels, weight);
    if (many) gemm = pack_gemm(*kernels, weight);
    forget();
  }

  static int64_t rows_of(const std::vector<int64_t>& shape) {
    if (shape.empty()) return -1;
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); i++) {
      if (shape[i] < 0 || shape[i] > kMost) return -1;
      if (__builtin_mul_overflow(rows, shape[i], &rows)) return -1;
    }
    return rows;
  }

  void compute(KernelContext* context) {
    const Value* given = nullptr;
    check(KernelContext_GetInput::call(table, context, 0, &given));
    const Tensor x = tensor_of(table, given);
    const int64_t K = weight.length, O = weight.outputs;
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != K)
      throw Refused("input " + text_of(x.shape) + "; needed (..., " + std::to_string(K) + ") of float32");
    std::vector<int64_t> shape = x.shape;
    shape.back() = O;
    float* y = output_of(table, context, shape);
    const int64_t B = x.size() / K;
    if (!B) return;
    const Threads threads(table, context, &seen_threads);
    const float* data = (const float*)x.data;
    if (dots.blocks) return multiply_dots(data, B, y);
    if (gemm.tile && (B > kGemvRows || !gemv.blocks)) return multiply(data, B, y);
    for (int64_t b = 0; b < B; b += kGemvRows) multiply_few(data + b * K, lesser(kGemvRows, B - b), y + b * O);
  }

  void multiply(const float* x, int64_t B, float* y) {
    GemmLinear call{gemm_weight(weight.length), x, y, nullptr, B, weight.length, weight.outputs, activation};
    call.scratch = scratch_of(openwork_gemm_linear_scratch(kernels, &call));
    done(openwork_gemm_linear(kernels, &call));
  }

  void multiply_dots(const float* x, int64_t B, float* y) {
    const int64_t K = weight.length, O = weight.outputs, workers = seen_threads ? processors() : 1;
    DotProduct call{};
    call.values = dots.values.data(), call.indices = dots.indices.data(), call.windows = dots.windows, call.blocks = dots.blocks;
    call.x = x, call.x_stride = call.K = K, call.bias = bias.data(), call.scales = scales.data();
    call.y = y, call.y_stride = call.outputs = O, call.batch = B, call.steps = dots.steps, call.activation = activation;
    call.packed = scratch_of(openwork_dot_product_scratch(kernels, &call, workers));
    call.x_scales = memory<4>(size_t(B));
    done(openwork_dot_product(kernels, &call, kInt8, workers));
  }

  Gemv call_of(const void* x, const float* bias, float* y, int64_t B) const {
    const int64_t O = weight.outputs, whole = gemv.windows * gemv.window;
    return {gemv.values.data(), gemv.indices.data(), gemv.windows, gemv.blocks, gemv.window, gemv.slots, x, whole, bias, y,
            O, O, B, activation};
  }

  void multiply_few(const float* x, int64_t B, float* y) {
    const int64_t K = weight.length, whole = gemv.windows * gemv.window;
    if (weight.dtype == kInt8) return multiply_few_whole(x, B, y);
    if (whole != K) {
      float* padded = (float*)scratch_of(B * whole * 4);
      for (int64_t b = 0; b < B; b++) {
        std::memcpy(padded + b * whole, x + b * K, size_t(K) * 4);
        std::memset(padded + b * whole + K, 0, size_t(whole - K) * 4);
      }
      x = padded;
    }
    const Gemv call = call_of(x, bias.data(), y, B);
    done(openwork_gemv(kernels, &call, kFloat32));
  }

  // int8: the rows as whole numbers in the low halves of 32 bits, and int32 sums that are scaled in place.
  void multiply_few_whole(const float* x, int64_t B, float* y) {
    const int64_t K = weight.length, O = weight.outputs, whole = gemv.windows * gemv.window;
    int32_t* quantized = (int32_t*)scratch_of(B * whole * 4);
    float x_scales[kGemvRows];
    std::memset(quantized, 0, size_t(B * whole) * 4);
    for (int64_t b = 0; b < B; b++) {
      x_scales[b] = scale_for(kernels->largest(x + b * K, K));
      for (int64_t k = 0; k < K; k++) quantized[b * whole + k] = nearest(x[b * K + k], x_scales[b]) & 0xFFFF;
    }
    const Gemv call = call_of(quantized, nullptr, y, B);
    done(openwork_gemv(kernels, &call, kInt8));
    for (int64_t b = 0; b < B; b++)
      for (int64_t o = 0; o < O; o++) {
        int32_t sum;
        std::memcpy(&sum, y + b * O + o, 4);
        const float value = float(sum) * (x_scales[b] * scales[o]) + (bias.data() ? bias[o] : 0);
        y[b * O + o] = activation == kRelu && value < 0 ? 0 : value;
      }
  }
};

struct Conv2d : Sparse {
  static constexpr size_t kInputs = 6, kOutputs = 1;
  std::vector<int64_t> kernel, stride, pads, dilation;  // pads: above, left, below, right
  int64_t groups, channels;                             // of one group
  bool has_added;

  explicit Conv2d(const Node& node) : Sparse(node) {
    const std::vector<int64_t> shape = node.numbers("shape", 4);
    kernel = {shape[2], shape[3]}, channels = shape[1];
    stride = positive(node, "strides", 1), dilation = positive(node, "dilations", 1);
    pads = node.numbers("pads", 4), groups = node.number("group");
    for (int64_t pad : pads)
      if (pad < 0 || pad > kMost) throw Refused("pads " + text_of(pads));
    if (groups < 1 || groups > kMost || shape[0] % groups)
      throw Refused("group = " + std::to_string(groups) + " of " + std::to_string(shape[0]) + " outputs");
    read(node, shape);
    gemm = pack_gemm(*kernels, weight);
    has_added = node.has_input(5);
    forget();
  }

  static std::vector<int64_t> positive(const Node& node, const char* name, int64_t least) {
    const std::vector<int64_t> values = node.numbers(name, 2);
    for (int64_t value : values)
      if (value < least || value > kMost) throw Refused(std::string(name) + " " + text_of(values));
    return values;
  }

  int64_t output_along(int dim, int64_t size) const {
    const int64_t room = size + pads[dim] + pads[dim + 2] - dilation[dim] * (kernel[dim] - 1) - 1;
    return room < 0 ? 0 : room / stride[dim] + 1;
  }

  void compute(KernelContext* context) {
    const Value* given = nullptr;
    check(KernelContext_GetInput::call(table, context, 0, &given));
    const Tensor x = tensor_of(table, given);
    if (x.type != kFloat || x.shape.size() != 4 || x.shape[1] % groups || x.shape[1] / groups != channels)
      throw Refused("input " + text_of(x.shape) + "; needed (N, " + std::to_string(channels * groups) + ", H, W) of float32");
    const int64_t H = x.shape[2], W = x.shape[3], outH = output_along(0, H), outW = output_along(1, W);
    if (outH < 1 || outW < 1 || outH > kMost || outW > kMost || H > kMost || W > kMost)
      throw Refused("input " + text_of(x.shape) + " gives no output of kernel " + text_of(kernel) + " with pads " + text_of(pads));
    const std::vector<int64_t> shape{x.shape[0], weight.outputs, outH, outW};
    const float* added = has_added ? added_of(context, shape) : nullptr;
    float* y = output_of(table, context, shape);
    if (!x.shape[0]) return;
    const Threads threads(table, context, &seen_threads);
    GemmConv2d call = call_of(x, outH, outW);
    if (weight.dtype == kInt8) quantize(x, call);
    call.y = y;
    call.scratch = scratch_of(openwork_gemm_conv2d_scratch(kernels, &call));
    done(openwork_gemm_conv2d(kernels, &call));
    if (added) add(added, x.shape[0] * weight.outputs * outH * outW, y);
  }

  const float* added_of(KernelContext* context, const std::vector<int64_t>& shape) const {
    const Value* given = nullptr;
    check(KernelContext_GetInput::call(table, context, 5, &given));
    const Tensor added = tensor_of(table, given);
    if (added.type != kFloat || added.shape != shape) throw Refused("added " + text_of(added.shape) + "; the output has " + text_of(shape));
    return (const float*)added.data;
  }

  // One pass instead of one each for the sum and the activation, which then is not the kernel's.
  void add(const float* added, int64_t count, float* y) const {
    parallel_for(count, 1 << 15, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const float sum = y[i] + added[i];
        y[i] = activation == kRelu && sum < 0 ? 0 : sum;
      }
    });
  }

  // int8: the images as whole numbers in 16 bits, one scale each.
  void quantize(const Tensor& x, GemmConv2d& call) const {
    const int64_t N = x.shape[0], size = x.size() / N, pieces = quantize_pieces(size);
    char* memory_of_all = (char*)memory<4>(size_t(parts(N * (pieces + 1) * 4 + x.size() * 2, 4)));
    int32_t* largest = (int32_t*)memory_of_all;
    float* x_scales = (float*)(largest + N * pieces);
    int16_t* to = (int16_t*)(x_scales + N);
    const float* from = (const float*)x.data;
    quantize_images(*kernels, from, N, size, x_scales, largest, [=](int64_t at, int64_t some, float scale) {
      for (int64_t k = at; k < at + some; k++) to[k] = int16_t(nearest(from[k], scale));
    });
    call.x = to, call.x_scales = x_scales;
  }

  GemmConv2d call_of(const Tensor& x, int64_t outH, int64_t outW) const {
    GemmConv2d c{};
    c.weight = gemm_weight(weight.rows * weight.groups() * weight.m);
    c.x = x.data, c.threads = seen_threads ? processors() : 1, c.N = x.shape[0], c.channels = channels;
    c.groups = int32_t(groups), c.activation = has_added ? kNone : activation;
    const bool narrow = x.shape[3] == 1 && kernel[1] == 1 && !pads[1] && !pads[3];  // a column of pixels is a row of them
    const int h = narrow ? 1 : 0, w = 1 - h;
    const int64_t size[] = {x.shape[2], x.shape[3]}, out[] = {outH, outW};
    c.H = size[h], c.W = size[w], c.outH = out[h], c.outW = out[w];
    if (kernel[0] * kernel[1] * stride[0] * stride[1] == 1 && pads == std::vector<int64_t>(4, 0))
      c.H = c.outH = 1, c.W = c.outW = outH * outW;  // the whole image is one row
    c.stride_h = int32_t(stride[h]), c.stride_w = int32_t(stride[w]), c.pad_h = int32_t(pads[h]), c.pad_w = int32_t(pads[w]);
    c.dilation_h = int32_t(dilation[h]), c.dilation_w = int32_t(dilation[w]), c.kernel_w = int32_t(kernel[w]);
    return c;
  }
};

template <class Kernel>
Status* create(const CustomOp*, const Table* table, const KernelInfo* info, void** kernel) {
  return status_of(table, [&] { *kernel = new Kernel(Node{table, info}); });
}
template <class Kernel>
Status* compute(void* kernel, KernelContext* context) {
  Kernel& self = *(Kernel*)kernel;
  return status_of(self.table, [&] { self.compute(context); });
}
template <class Kernel>
void destroy(void* kernel) {
  delete (Kernel*)kernel;
}

template <class Kernel>
CustomOp operator_of(const char* (*name)(const CustomOp*)) {
  CustomOp op{};
  op.version = kVersion;
  op.GetName = name;
  op.GetExecutionProviderType = [](const CustomOp*) { return (const char*)nullptr; };
  op.GetInputType = Kernel::input_type;
  op.GetInputTypeCount = [](const CustomOp*) { return Kernel::kInputs; };
  op.GetOutputType = [](const CustomOp*, size_t) { return int(kFloat); };
  op.GetOutputTypeCount = [](const CustomOp*) { return Kernel::kOutputs; };
  op.KernelDestroy = destroy<Kernel>;
  op.GetInputCharacteristic = [](const CustomOp*, size_t index) { return int(index >= 3 ? kOptional : kRequired); };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t index) { return int(index ? kOptional : kRequired); };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op.CreateKernelV2 = create<Kernel>;
  op.KernelComputeV2 = compute<Kernel>;
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return int(kMost); };
  return op;
}

// One domain for all sessions of an ONNX Runtime: it has to outlive them.
Domain* domain_of(const Table* table) {
  static const CustomOp operators[] = {operator_of<Linear>([](const CustomOp*) { return "SparseLinear"; }),
                                       operator_of<Conv2d>([](const CustomOp*) { return "SparseConv2d"; }),
                                       operator_of<AddLayerNormalization>([](const CustomOp*) { return "AddLayerNormalization"; })};
  static std::mutex mutex;
  static std::vector<std::pair<const Table*, Domain*>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& each : known)
    if (each.first == table) return each.second;
  Domain* domain = nullptr;
  check(CreateCustomOpDomain::call(table, "openwork", &domain));
  for (const CustomOp& each : operators) check(CustomOpDomain_Add::call(table, domain, &each));
  known.emplace_back(table, domain);
  return domain;
}

}  // namespace
}  // namespace ort
}  // namespace openwork

// The entry that every ONNX Runtime looks for in a library of operators.
OPENWORK_API openwork::ort::Status* RegisterCustomOps(openwork::ort::SessionOptions* options, const openwork::ort::ApiBase* base) {
  using namespace openwork;
  using namespace openwork::ort;
  const Table* table = base->GetApi(kVersion);
  if (!table) {
    const std::string text = std::string("openwork: its operators need ONNX Runtime 1.17 or newer, this is ") + base->GetVersionString();
    return CreateStatus::call(base->GetApi(1), kFail, text.c_str());
  }
  return status_of(table, [&] {
    kernels_here();
    check(AddCustomOpDomain::call(table, options, domain_of(table)));
  });
}
