// The operators of domain `openwork`: SparseLinear and SparseConv2d, those on bytes (bytes.h), and AddLayerNormalization (normalize.h).
// Inputs: data (float32), `values` and `indices` of the compressed weight (docs/format.md), optionally `bias`, and `scales` where the
// values are int8, one an output, all constant; and of a convolution `added`, of the output's shape, as a residual connection adds it.
// Weights are checked and packed when a session is made. Of int8 the data is quantized as it comes: one scale a row, or an image.
//
//   B = rows of input, O = outputs, K = inputs
#include <cstring>
#include <mutex>

#include "bytes.h"
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

  explicit Linear(const Node& node) : Sparse(node) {
    read(node, node.numbers("shape", 2));
    if (has_dot_product(*kernels, weight)) {  // for any number of rows
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
    const Tensor x = input_of(table, context, 0);
    const int64_t K = weight.length, O = weight.outputs;
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != K)
      throw Refused("input " + text_of(x.shape) + "; needed (..., " + std::to_string(K) + ") of float32");
    std::vector<int64_t> shape = x.shape;
    shape.back() = O;
    float* y = (float*)output_of(table, context, shape);
    const int64_t B = x.size() / K;
    if (!B) return;
    const Threads threads(table, context, &seen_threads);
    const float* data = (const float*)x.data;
    if (dots.blocks) {
      DotProduct call{};
      call.x = data, call.x_stride = call.K = K, call.batch = B, call.y = y;
      return multiply_dots(call);
    }
    if (gemm.tile && (B > kGemvRows || !gemv.blocks)) return multiply(data, B, y);
    for (int64_t b = 0; b < B; b += kGemvRows) multiply_few(data + b * K, lesser(kGemvRows, B - b), y + b * O);
  }

  void multiply(const float* x, int64_t B, float* y) {
    GemmLinear call{gemm_weight(weight.length), x, y, nullptr, B, weight.length, weight.outputs, activation};
    call.scratch = scratch_of(openwork_gemm_linear_scratch(kernels, &call));
    done(openwork_gemm_linear(kernels, &call));
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
  const Geometry geometry;
  int64_t groups, channels;  // of one group

  explicit Conv2d(const Node& node) : Sparse(node), geometry(node), groups(node.number("group")), channels(geometry.shape[1]) {
    if (groups < 1 || groups > kMost || geometry.shape[0] % groups)
      throw Refused("group = " + std::to_string(groups) + " of " + std::to_string(geometry.shape[0]) + " outputs");
    read(node, geometry.shape);
    gemm = pack_gemm(*kernels, weight);
    forget();
  }

  void compute(KernelContext* context) {
    const Tensor x = input_of(table, context, 0);
    if (x.type != kFloat || x.shape.size() != 4 || x.shape[1] % groups || x.shape[1] / groups != channels)
      throw Refused("input " + text_of(x.shape) + "; needed (N, " + std::to_string(channels * groups) + ", H, W) of float32");
    const std::vector<int64_t> size = geometry.output_size(x.shape[2], x.shape[3], x.shape);
    const std::vector<int64_t> shape{x.shape[0], weight.outputs, size[0], size[1]};
    const float* added = has_added ? (const float*)added_of(context, shape).data : nullptr;
    float* y = (float*)output_of(table, context, shape);
    if (!x.shape[0]) return;
    const Threads threads(table, context, &seen_threads);
    GemmConv2d call = call_of(x, size);
    if (weight.dtype == kInt8) quantize(x, call);
    call.y = y;
    call.scratch = scratch_of(openwork_gemm_conv2d_scratch(kernels, &call));
    done(openwork_gemm_conv2d(kernels, &call));
    if (added) add(added, x.shape[0] * weight.outputs * size[0] * size[1], y);
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

  GemmConv2d call_of(const Tensor& x, const std::vector<int64_t>& out) const {
    const Geometry& g = geometry;
    GemmConv2d c{};
    c.weight = gemm_weight(weight.rows * weight.groups() * weight.m);
    c.x = x.data, c.threads = seen_threads ? processors() : 1, c.N = x.shape[0], c.channels = channels;
    c.groups = int32_t(groups), c.activation = has_added ? kNone : activation;
    const bool narrow = x.shape[3] == 1 && g.kernel[1] == 1 && !g.pads[1] && !g.pads[3];  // a column of pixels is a row of them
    const int h = narrow ? 1 : 0, w = 1 - h;
    const int64_t size[] = {x.shape[2], x.shape[3]};
    c.H = size[h], c.W = size[w], c.outH = out[h], c.outW = out[w];
    if (g.is_pointwise()) c.H = c.outH = 1, c.W = c.outW = out[0] * out[1];  // the whole image is one row
    c.stride_h = int32_t(g.stride[h]), c.stride_w = int32_t(g.stride[w]), c.pad_h = int32_t(g.pads[h]), c.pad_w = int32_t(g.pads[w]);
    c.dilation_h = int32_t(g.dilation[h]), c.dilation_w = int32_t(g.dilation[w]), c.kernel_w = int32_t(g.kernel[w]);
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
  op.GetOutputType = [](const CustomOp*, size_t) { return int(Kernel::kOutput); };
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
                                       operator_of<BytesLinear<uint8_t>>([](const CustomOp*) { return "QSparseLinear"; }),
                                       operator_of<BytesLinear<float>>([](const CustomOp*) { return "QSparseLinearToFloat"; }),
                                       operator_of<BytesConv2d<uint8_t>>([](const CustomOp*) { return "QSparseConv2d"; }),
                                       operator_of<BytesConv2d<float>>([](const CustomOp*) { return "QSparseConv2dToFloat"; }),
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
