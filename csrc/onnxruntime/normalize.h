// AddLayerNormalization: LayerNormalization over the last dim of a sum, as residual connections have it. ONNX Runtime fuses the two as
// well, but adds up a row number by number: that took a fifth of a 2:4 encoder in int8.
#pragma once

#include <cmath>
#include <cstring>

#include "host.h"
#include "sparse.h"
#include "threads.h"

namespace openwork {
namespace ort {

struct AddLayerNormalization {
  static constexpr int kOutput = kFloat;
  static constexpr size_t kInputs = 4, kOutputs = 2;  // x, added, scale, bias; the second output, the sum, may be left out
  static int input_type(const CustomOp*, size_t) { return kFloat; }

  const Table* table;
  float epsilon;
  Numbers<float> scale, bias;
  bool has_sum;
  std::atomic<bool> seen_threads{false};

  explicit AddLayerNormalization(const Node& node) : table(node.table), epsilon(node.real("epsilon")) {
    if (!(epsilon >= 0)) throw Refused("epsilon = " + std::to_string(epsilon) + "; needed 0 or more");
    scale = vector_of(node, 2, "scale");
    if (node.has_input(3)) bias = vector_of(node, 3, "bias");
    if (bias.data() && bias.size() != scale.size()) throw Refused("scale and bias are not equally long");
    size_t outputs = 0;
    check(KernelInfo_GetOutputCount::call(table, node.info, &outputs));
    has_sum = outputs > 1;
  }

  static Numbers<float> vector_of(const Node& node, size_t index, const char* name) {
    const Tensor given = node.constant(index, name);
    if (given.type != kFloat || given.shape.size() != 1 || given.shape[0] < 1) throw Refused(name + (" " + text_of(given.shape)));
    Numbers<float> copy(given.shape[0]);
    std::memcpy(copy.data(), given.data, size_t(given.shape[0]) * 4);
    return copy;
  }

  void compute(KernelContext* context) {
    const Tensor x = input_of(table, context, 0), added = input_of(table, context, 1);
    const int64_t size = scale.size();
    if (x.type != kFloat || added.type != kFloat || x.shape.empty() || x.shape.back() != size || added.shape != x.shape)
      throw Refused("inputs " + text_of(x.shape) + " and " + text_of(added.shape) + "; needed equal ones, (..., " + std::to_string(size) + ")");
    float* y = (float*)output_of(table, context, x.shape);
    float* sum = has_sum ? (float*)output_of(table, context, x.shape, 1) : y;
    const float *a = (const float*)x.data, *b = (const float*)added.data;
    const Threads threads(table, context, &seen_threads);
    parallel_for(x.size() / size, 1 + 8192 / size, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) normalize(a + row * size, b + row * size, sum + row * size, y + row * size);
    });
  }

 private:
  static constexpr int64_t kSums = 32;  // numbers that are added up side by side, so that none waits for the one before

  static float total(const float* sums) {
    double all = 0;
    for (int64_t i = 0; i < kSums; i++) all += double(sums[i]);
    return float(all);
  }

  void normalize(const float* a, const float* b, float* sum, float* y) const {
    const int64_t size = scale.size(), whole = size / kSums * kSums;
    float sums[kSums] = {}, squares[kSums] = {};
    for (int64_t i = 0; i < whole; i += kSums)
      for (int64_t j = 0; j < kSums; j++) sums[j] += sum[i + j] = a[i + j] + b[i + j];
    for (int64_t i = whole; i < size; i++) sums[i - whole] += sum[i] = a[i] + b[i];
    const float mean = total(sums) / float(size);
    for (int64_t i = 0; i < whole; i += kSums)
      for (int64_t j = 0; j < kSums; j++) squares[j] += (sum[i + j] - mean) * (sum[i + j] - mean);
    for (int64_t i = whole; i < size; i++) squares[i - whole] += (sum[i] - mean) * (sum[i] - mean);
    const float inverse = 1 / std::sqrt(total(squares) / float(size) + epsilon);
    if (!bias.data()) {
      for (int64_t i = 0; i < size; i++) y[i] = (sum[i] - mean) * inverse * scale[i];
      return;
    }
    for (int64_t i = 0; i < size; i++) y[i] = (sum[i] - mean) * inverse * scale[i] + bias[i];
  }
};

}  // namespace ort
}  // namespace openwork
