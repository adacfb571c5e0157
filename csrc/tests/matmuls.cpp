// Products against plain loops: whole numbers exactly, floats within the rounding of a sum in any order,
// |error| <= (terms + 2) * (2^-24 * sum of |terms| + 2^-149): one rounding for each multiply-add.
#include <cmath>
#include <vector>

#include "tests.h"

namespace openwork_tests {
namespace {

using openwork::Activation;
using openwork::GemmWeight;

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

float bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Values of a weight in memory, as the kernel for its dtype reads them.
struct Values {
  Guarded<char> memory;
  int32_t dtype;
  int size;

  Values(Random& random, int32_t dtype, int size, int64_t count) : memory(random, count * size), dtype(dtype), size(size) {
    for (int64_t i = 0; i < count; i++) {
      const float real = random.real();
      const int16_t whole = int16_t(random.from(-127, 127));
      if (dtype == openwork::kFloat32) memcpy(memory.data() + i * 4, &real, 4);
      if (dtype == openwork::kBFloat16) memcpy(memory.data() + i * 2, (const char*)&real + 2, 2);
      if (dtype == openwork::kInt8 && size == 2) memcpy(memory.data() + i * 2, &whole, 2);
      if (dtype == openwork::kInt8 && size == 1) memory[i] = char(whole);
    }
  }
  double operator[](int64_t i) const {
    const char* at = memory.data() + i * size;
    float real;
    int16_t half;
    if (dtype == openwork::kFloat32) return memcpy(&real, at, 4), real;
    if (size == 1) return double(int8_t(*at));
    memcpy(&half, at, 2);
    return dtype == openwork::kBFloat16 ? bfloat16(uint16_t(half)) : half;
  }
};

struct Sum {  // in double, with what bounds the error of a sum in float
  double value = 0, size = 0;
  int64_t terms = 0;
  void add(double term) { value += term, size += std::fabs(term), terms++; }
  bool met_by(float found, Activation activation) const {
    if (std::isnan(value)) return std::isnan(found);
    const double wanted = activation == openwork::kRelu && value < 0 ? 0 : value;
    return std::fabs(found - wanted) <= double(terms + 2) * (std::ldexp(size, -24) + std::ldexp(1.0, -149));
  }
};

int32_t random_dtype(Random& random) {
  return random.of({int32_t(openwork::kFloat32), int32_t(openwork::kBFloat16), int32_t(openwork::kInt8)});
}

Activation random_activation(Random& random) { return random.of({openwork::kNone, openwork::kRelu}); }

void fill(Random& random, Guarded<float>& x, bool nan) {
  const float scale = random.of({1.0f, 1e-3f, 30.0f, 1e-40f});
  for (float& each : x) each = random.one_in(20) ? 0 : random.real() * scale;
  if (nan && x.count() && random.one_in(8)) x[random.from(0, x.count() - 1)] = NAN;
}

// ---- the kernels themselves ----

template <class Number>
void run_gemm(const Kernels& kernels, Random& random, int32_t dtype) {
  const bool whole = dtype == openwork::kInt8;
  const int64_t step = whole ? 2 : 1, vectors = random.from(1, kernels.gemm_vectors / step) * step;
  const int64_t columns = vectors * kernels.lanes, rows = random.from(1, 9), nnz = random.from(0, 12) * step;
  const int64_t inputs = columns + random.from(0, 300), stride = columns + random.from(0, 3);
  Values values(random, dtype, dtype == openwork::kFloat32 ? 4 : 2, rows * nnz);
  Guarded<uint16_t> offsets(random, rows * nnz + 1);
  Guarded<Number> x(random, inputs);
  for (Number& each : x) each = whole ? Number(random.from(-127, 127)) : Number(random.real());
  for (uint16_t& each : offsets) each = uint16_t(random.from(0, inputs - columns) * int64_t(sizeof(Number)));
  Guarded<float> from(random, (rows - 1) * stride + columns), bias(random, rows), to(random, (rows - 1) * stride + columns);
  fill(random, from, false), fill(random, bias, false);
  if (whole)
    for (float& each : from) {
      const int32_t number = int32_t(random.from(-100000, 100000));
      memcpy(&each, &number, 4);
    }
  const std::vector<float> before(from.begin(), from.end());
  openwork::GemmTile p{};
  p.values = values.memory.data(), p.offsets = offsets.data(), p.rows = rows, p.nnz = nnz, p.x = (const char*)x.data();
  const bool in_place = random.one_in(3);
  p.from = random.one_in(2) ? from.data() : nullptr, p.stride = stride;
  p.bias = !whole && random.one_in(2) ? bias.data() : nullptr;
  p.to = in_place ? from.data() : to.data(), p.vectors = int32_t(vectors);
  p.activation = whole ? openwork::kNone : random_activation(random);
  kernels.gemm(p, dtype);

  for (int64_t o = 0; o < rows; o++)
    for (int64_t c = 0; c < columns; c++) {
      const auto number = [&](const float& at) {
        int32_t bits;
        memcpy(&bits, &at, 4);
        return whole ? double(bits) : double(at);
      };
      Sum sum;
      sum.add(p.from ? number(before[size_t(o * stride + c)]) : p.bias ? bias[o] : 0);
      for (int64_t j = o * nnz; j < (o + 1) * nnz; j++) sum.add(values[j] * x[offsets[j] / int64_t(sizeof(Number)) + c]);
      const float& found = p.to[o * stride + c];
      if (whole ? number(found) != sum.value : !sum.met_by(found, p.activation))
        fail("dtype %d, %lld of %lld outputs, %lld products, %lld columns: %g instead of %g at column %lld", dtype, (long long)o,
             (long long)rows, (long long)nnz, (long long)columns, number(found), sum.value, (long long)c);
    }
}

// Indices of the slots of one lane, `bits` each, and whatever in the bits that no slot uses.
int64_t index_of(const Guarded<uint32_t>& words, int64_t block, int64_t word_count, int lanes, int lane, int64_t window, int64_t slot,
                 int64_t slots, int bits) {
  const int64_t in_word = 32 / bits, together = slots > in_word ? 1 : in_word / slots;
  const int64_t word = slots > in_word ? window * ((slots + in_word - 1) / in_word) + slot / in_word : window / together;
  const int64_t place = slots > in_word ? slot % in_word : window % together * slots + slot;
  return words[(block * word_count + word) * lanes + lane] >> (place * bits);
}

}  // namespace

void test_gemm(const Kernels& kernels, Random& random) {
  const int32_t dtype = random_dtype(random);
  if (dtype == openwork::kInt8) run_gemm<int16_t>(kernels, random, dtype);
  else run_gemm<float>(kernels, random, dtype);
}

void test_gemv(const Kernels& kernels, Random& random) {
  const int32_t dtype = random_dtype(random), lanes = kernels.lanes;
  const bool whole = dtype == openwork::kInt8;
  openwork::Gemv r{};
  r.window = random.of<int32_t>({4, 8, 16, 32});
  r.slots = int32_t(random.one_in(2) ? random.from(1, 2) : random.from(1, r.window));
  r.windows = random.from(1, 20), r.outputs = random.from(1, 3 * lanes), r.blocks = up(r.outputs, lanes) / lanes;
  r.batch = random.from(1, 19), r.x_stride = r.windows * r.window + random.from(0, 3), r.y_stride = r.outputs + random.from(0, 3);
  r.activation = whole ? openwork::kNone : random_activation(random);
  const int bits = r.window == 4 ? 2 : r.window <= 16 ? 4 : 8;
  const int64_t words = openwork::words_of(r.windows, r.slots, 32 / bits), K = r.windows * r.window;
  const bool pairs = dtype == openwork::kBFloat16;
  const int64_t slots = pairs ? up(r.windows * r.slots, 2) : r.windows * r.slots;  // of a block, as stored
  Values values(random, dtype, dtype == openwork::kFloat32 ? 4 : whole ? 1 : 2, r.blocks * slots * lanes);
  Guarded<uint32_t> indices(random, r.blocks * words * lanes);
  for (uint32_t& each : indices) each = uint32_t(random.next());
  Guarded<float> x(random, (r.batch - 1) * r.x_stride + K), bias(random, r.outputs), y(random, (r.batch - 1) * r.y_stride + r.outputs);
  fill(random, x, false), fill(random, bias, false);
  const auto input = [&](int64_t i) {
    int32_t number;
    memcpy(&number, &x[i], 4);
    return whole ? double(int16_t(number)) : double(x[i]);
  };
  if (whole)
    for (float& each : x) {
      const uint32_t low = uint16_t(random.from(-127, 127));
      memcpy(&each, &low, 4);
    }
  r.values = values.memory.data(), r.indices = indices.data(), r.x = x.data(), r.y = y.data();
  r.bias = !whole && random.one_in(2) ? bias.data() : nullptr;
  openwork_gemv(&kernels, &r, dtype);

  for (int64_t b = 0; b < r.batch; b++)
    for (int64_t o = 0; o < r.outputs; o++) {
      const int64_t block = o / lanes;
      Sum sum;
      if (r.bias) sum.add(bias[o]);
      for (int64_t w = 0; w < r.windows; w++)
        for (int64_t s = 0; s < r.slots; s++) {
          const int64_t index = index_of(indices, block, words, lanes, int(o % lanes), w, s, r.slots, bits) % r.window;
          const int64_t slot = w * r.slots + s, lane = o % lanes;
          const double value = values[block * slots * lanes + (pairs ? (slot / 2 * lanes + lane) * 2 + slot % 2 : slot * lanes + lane)];
          sum.add(value * input(b * r.x_stride + w * r.window + index));
        }
      int32_t number;
      memcpy(&number, &y[b * r.y_stride + o], 4);
      if (whole ? number != sum.value : !sum.met_by(y[b * r.y_stride + o], r.activation))
        fail("dtype %d, window %d, %d slots, %lld windows, output %lld of %lld, input %lld of %lld: %g instead of %g", dtype, r.window,
             r.slots, (long long)r.windows, (long long)o, (long long)r.outputs, (long long)b, (long long)r.batch,
             whole ? double(number) : double(y[b * r.y_stride + o]), sum.value);
    }
}

void test_dot_product(const Kernels& kernels, Random& random) {
  const int32_t dtype = random.of({int32_t(openwork::kBFloat16), int32_t(openwork::kInt8)}), lanes = kernels.lanes;
  const bool whole = dtype == openwork::kInt8;
  const int together = whole ? 4 : 2;
  const int64_t window = lanes * together;
  openwork::DotProduct d{};
  d.steps = int32_t(random.one_in(2) ? random.from(1, 2) : random.from(1, 9));
  const bool images = random.one_in(2);
  openwork::Pixels p{};
  p.channels = random.one_in(3) ? window : random.from(1, 40), p.kernel_w = int32_t(random.from(1, 3));
  p.H = random.from(1, 9), p.W = random.from(1, 9), p.outH = random.from(1, 9), p.outW = random.from(1, 9);
  p.stride_h = int32_t(random.from(1, 2)), p.stride_w = int32_t(random.from(1, 2)), p.pad_h = int32_t(random.from(0, 2));
  p.pad_w = int32_t(random.from(0, 2)), p.dilation_h = int32_t(random.from(1, 2)), p.dilation_w = int32_t(random.from(1, 2));
  const int64_t N = random.from(1, 3), kernel_h = random.from(1, 3), threads = random.of({1, 2, 64});
  d.pixels = images ? &p : nullptr;
  d.K = images ? p.channels * p.kernel_w * kernel_h : random.from(1, 5 * window), d.windows = up(d.K, window) / window;
  d.outputs = random.from(1, 5 * lanes), d.blocks = up(d.outputs, lanes) / lanes;
  d.batch = images ? N * p.outH * p.outW : random.one_in(8) ? random.from(90, 230) : random.from(1, 30);
  d.x_stride = d.K + random.from(0, 3), d.y_stride = d.outputs + random.from(0, 3), d.activation = random_activation(random);
  const int64_t in_step = lanes * together, indices_of_window = (whole ? d.steps : up(d.steps, 2)) * in_step;
  Values values(random, dtype, whole ? 1 : 2, d.blocks * d.windows * d.steps * in_step);
  Guarded<uint8_t> indices(random, d.blocks * d.windows * indices_of_window);
  for (uint8_t& each : indices) each = uint8_t(random.next());
  const int64_t numbers_in = images ? N * p.H * p.W * p.channels : (d.batch - 1) * d.x_stride + d.K;
  Guarded<float> numbers(random, whole && !images ? numbers_in : 0), bias(random, d.outputs), scales(random, d.outputs);
  Guarded<uint16_t> halves(random, whole ? 0 : numbers_in);
  Guarded<uint8_t> bytes(random, whole && images ? numbers_in : 0);
  fill(random, numbers, true), fill(random, bias, false);
  for (uint8_t& each : bytes) each = uint8_t(random.from(1, 255));
  for (uint16_t& each : halves) each = uint16_t(random.next() >> 16 & 0x3fff) | uint16_t(random.one_in(2) << 15);
  for (float& each : scales) each = 0.01f * (1.5f + random.real());
  Guarded<float> y(random, whole ? (d.batch - 1) * d.y_stride + d.outputs : 0), x_scales(random, images ? N : d.batch);
  for (float& each : x_scales) each = 0.5f + 0.1f * random.real();
  Guarded<uint16_t> y_halves(random, whole ? 0 : (d.batch - 1) * d.y_stride + d.outputs);
  d.values = values.memory.data(), d.indices = indices.data();
  d.x = !whole ? (const void*)halves.data() : images ? (const void*)bytes.data() : numbers.data(), d.y = whole ? (void*)y.data() : y_halves.data();
  d.bias = random.one_in(2) ? bias.data() : nullptr;
  if (whole) d.scales = scales.data(), d.x_scales = x_scales.data();
  Guarded<char> packed(random, openwork_dot_product_scratch(&kernels, &d, threads), 64);
  d.packed = packed.data();
  openwork_dot_product(&kernels, &d, dtype, threads);

  const int64_t pixels = p.outH * p.outW;
  for (int64_t b = 0; b < d.batch; b++) {
    float largest = 0;
    for (int64_t k = 0; whole && !images && k < d.K; k++) {
      const float size = std::fabs(numbers[b * d.x_stride + k]);
      largest = std::isnan(size) || std::isnan(largest) ? NAN : std::fmax(largest, size);
    }
    const float scale = images ? x_scales[b / pixels] : largest / 127 < 1.17549435e-38f ? 1 : largest / 127;
    const auto input = [&](int64_t k) -> double {
      int64_t from = b * d.x_stride + k;
      if (images) {
        const int64_t tap = k / p.channels, row = b % pixels / p.outW * p.stride_h - p.pad_h + tap / p.kernel_w * p.dilation_h;
        const int64_t column = b % p.outW * p.stride_w - p.pad_w + tap % p.kernel_w * p.dilation_w;
        if (row < 0 || row >= p.H || column < 0 || column >= p.W) return 0;
        from = ((b / pixels * p.H + row) * p.W + column) * p.channels + k % p.channels;
      }
      return !whole ? double(bfloat16(halves[from])) : images ? bytes[from] - 128.0 : std::nearbyint(double(numbers[from] / scale));
    };
    for (int64_t o = 0; o < d.outputs; o++) {
      Sum sum;
      for (int64_t w = 0; w < d.windows; w++)
        for (int64_t step = 0; step < d.steps; step++)
          for (int i = 0; i < together; i++) {
            const int64_t slot = o % lanes * together + i, at = (o / lanes * d.windows + w) * indices_of_window;
            const int64_t index = w * window + indices[at + (whole ? step * in_step + slot : (step / 2 * in_step + slot) * 2 + step % 2)] % window;
            const double value = values[((o / lanes * d.windows + w) * d.steps + step) * in_step + slot];
            if (index < d.K) sum.add(value * input(index));
          }
      const int64_t to = b * d.y_stride + o;
      if (whole) {
        float wanted = float(sum.value) * (scale * scales[o]) + (d.bias ? bias[o] : 0);
        if (d.activation == openwork::kRelu && wanted < 0) wanted = 0;
        if (std::isnan(wanted) ? std::isnan(y[to]) : wanted == y[to]) continue;
      } else {  // rounded once more, to 8 bits, and numbers below 2^-126 may be zero
        if (d.bias) sum.add(bias[o]);
        const double exact = d.activation == openwork::kRelu && sum.value < 0 ? 0 : sum.value;
        const double slack = double(sum.terms + 2) * (std::ldexp(sum.size, -23) + std::ldexp(1.0, -126));
        if (std::fabs(bfloat16(y_halves[to]) - exact) <= slack + std::ldexp(std::fabs(exact), -8)) continue;
      }
      fail("dtype %d, %d steps, %lld windows, output %lld of %lld, input %lld of %lld: %g instead of %g", dtype, d.steps, (long long)d.windows,
           (long long)o, (long long)d.outputs, (long long)b, (long long)d.batch, whole ? double(y[to]) : double(bfloat16(y_halves[to])),
           sum.value);
    }
  }
}

void test_quantize(const Kernels& kernels, Random& random) {
  const int64_t N = random.from(1, 3), count = random.one_in(8) ? random.from(16000, 40000) : random.from(1, 200);
  Guarded<float> x(random, N * count), scales(random, N);
  Guarded<uint8_t> whole(random, N * count);
  Guarded<int32_t> bits(random, N * (count / (1 << 14) + 1));
  fill(random, x, true);
  openwork_quantize(&kernels, x.data(), N, count, whole.data(), scales.data(), bits.data());
  for (int64_t n = 0; n < N; n++) {
    float largest = 0;
    for (int64_t i = n * count; i < (n + 1) * count; i++)
      largest = std::isnan(x[i]) || std::isnan(largest) ? NAN : std::fmax(largest, std::fabs(x[i]));
    const float scale = largest / 127 < 1.17549435e-38f ? 1 : largest / 127;
    if (std::isnan(scale) ? !std::isnan(scales[n]) : scale != scales[n]) fail("scale %g instead of %g", double(scales[n]), double(scale));
    for (int64_t i = n * count; !std::isnan(scale) && i < (n + 1) * count; i++)
      if (whole[i] != uint8_t(int(std::nearbyint(x[i] / scale)) + 128)) fail("%d for %g at scale %g", whole[i], double(x[i]), double(scale));
  }
}

// ---- whole layers ----

namespace {

// A weight in the GEMM layout, with the input of each slot.
struct Weight {
  GemmWeight w{};
  std::vector<int64_t> nnz, before;  // of each tile
  std::vector<int64_t> input;        // of each slot
  Values values;
  Guarded<uint16_t> offsets;
  Guarded<float> scales, bias;

  static GemmWeight numbers(Random& random, int64_t columns) {
    GemmWeight w{};
    w.dtype = openwork::Dtype(random_dtype(random));
    w.m = int32_t(random.one_in(2) ? random.of<int64_t>({2, 4, 8, 16}) : random.from(1, 20));
    w.n = int32_t(random.from(1, w.m));
    w.K = random.one_in(2) ? w.m * random.from(1, 4) : random.from(1, 40);
    w.O = random.one_in(8) ? random.from(200, 300) : random.from(1, 40);
    const int64_t most = 65536 / (columns * 4) / w.m;  // offsets have 16 bits
    w.tile = int32_t(w.m * random.from(1, most < 3 ? most : 3));
    return w;
  }
  static int64_t inputs(const GemmWeight& w, int64_t k) {
    const int64_t left = up(w.K, w.m) - k;
    return left < w.tile ? left : w.tile;
  }
  static int64_t slots(const GemmWeight& w, int64_t k) {
    const int64_t count = inputs(w, k) / w.m * w.n;
    return w.dtype == openwork::kInt8 ? up(count, 2) : count;
  }
  static int64_t slots(const GemmWeight& w) {
    int64_t count = 0;
    for (int64_t k = 0; k < w.K; k += w.tile) count += slots(w, k) * w.O;
    return count;
  }

  Weight(Random& random, const GemmWeight& numbers, int64_t columns)
      : w(numbers), values(random, w.dtype, w.dtype == openwork::kFloat32 ? 4 : 2, slots(w)), offsets(random, slots(w) + 1),
        scales(random, w.O), bias(random, w.O) {
    fill(random, bias, false);
    for (float& each : scales) each = 0.01f * (1.5f + random.real());
    const int64_t row = columns * (w.dtype == openwork::kInt8 ? 2 : 4);
    for (int64_t k = 0; k < w.K; k += w.tile) {
      nnz.push_back(slots(w, k)), before.push_back(int64_t(input.size()));
      for (int64_t i = 0; i < nnz.back() * w.O; i++) {
        const int64_t in_tile = random.from(0, inputs(w, k) - 1);
        offsets[int64_t(input.size())] = uint16_t(in_tile * row);
        input.push_back(k + in_tile);
      }
    }
    offsets[int64_t(input.size())] = 0;
    w.values = values.memory.data(), w.offsets = offsets.data();
    w.scales = w.dtype == openwork::kInt8 ? scales.data() : nullptr;
    w.bias = random.one_in(2) ? bias.data() : nullptr;
  }

  // One offset to anything that is not a row of its tile; false where there are none.
  bool damage(Random& random, int64_t columns) {
    if (input.empty()) return false;
    const int64_t at = random.from(0, int64_t(input.size()) - 1), row = columns * (w.dtype == openwork::kInt8 ? 2 : 4);
    size_t tile = 0;
    while (tile + 1 < before.size() && at >= before[tile + 1]) tile++;
    const int64_t rows = inputs(w, int64_t(tile) * w.tile);
    const int64_t wrong = random.from(0, 16383) * 4;  // misaligned floats are the sanitizer's, not the processor's
    offsets[at] = uint16_t(wrong % row == 0 && wrong < rows * row ? 65532 : wrong);
    return true;
  }

  // What output o sums over: term(k) is input k.
  template <class Term>
  Sum sum(int64_t o, const Term& term) const {
    Sum all;
    if (w.bias && w.dtype != openwork::kInt8) all.add(bias[o]);
    for (size_t tile = 0; tile < nnz.size(); tile++)
      for (int64_t j = before[tile] + o * nnz[tile], end = j + nnz[tile]; j < end; j++)
        all.add(values[j] * (input[size_t(j)] < w.K ? term(input[size_t(j)]) : 0));
    return all;
  }

  // The result of an int8 layer: the exact sum of whole numbers, scaled as the kernel does.
  bool met_by(const Sum& sum, float found, int64_t o, float input_scale, Activation activation) const {
    if (w.dtype != openwork::kInt8) return sum.met_by(found, activation);
    const float value = float(sum.value) * (input_scale * scales[o]) + (w.bias ? bias[o] : 0);
    const float wanted = activation == openwork::kRelu && value < 0 ? 0 : value;
    return std::isnan(value) ? std::isnan(found) : found == wanted;
  }
};

// One scale for `count` inputs, NaN where one of them is.
float scale_of(const float* x, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; i++) {
    if (std::isnan(x[i])) return NAN;
    largest = std::fmax(largest, std::fabs(x[i]));
  }
  return largest / 127 < 1.17549435e-38f ? 1 : largest / 127;
}

// The input as the layer multiplies it: whole numbers where the weight is int8.
double as_multiplied(float x, const GemmWeight& w, float scale) {
  return w.dtype != openwork::kInt8 ? x : std::isnan(scale) ? NAN : std::nearbyint(x / scale);
}

}  // namespace

void test_linear(const Kernels& kernels, Random& random) {
  const int64_t columns = int64_t(kernels.lanes) * kernels.gemm_vectors;
  const GemmWeight numbers = Weight::numbers(random, columns);
  const int64_t K = numbers.K;
  Weight weight(random, numbers, columns);
  openwork::GemmLinear call{};
  call.weight = weight.w, call.activation = random_activation(random);
  call.B = random.one_in(2) ? random.from(1, 20) : random.from(1, 2 * columns + 1);
  call.x_stride = K + random.from(0, 3), call.y_stride = numbers.O + random.from(0, 3);
  Guarded<float> x(random, (call.B - 1) * call.x_stride + K), y(random, (call.B - 1) * call.y_stride + numbers.O);
  fill(random, x, true);
  call.x = x.data(), call.y = y.data();
  Guarded<char> scratch(random, openwork_gemm_linear_scratch(&kernels, &call), 64);
  call.scratch = scratch.data();
  const bool damaged = random.one_in(4) && weight.damage(random, columns);
  const int32_t status = openwork_gemm_linear(&kernels, &call);
  if (status != (damaged ? openwork::kDamaged : openwork::kDone)) fail("linear: status %d, damaged %d", status, damaged);
  if (damaged) return;

  for (int64_t b = 0; b < call.B; b++) {
    const float* row = x.data() + b * call.x_stride;
    const float scale = scale_of(row, K);
    for (int64_t o = 0; o < numbers.O; o++) {
      const Sum sum = weight.sum(o, [&](int64_t k) { return as_multiplied(row[k], weight.w, scale); });
      const float found = y[b * call.y_stride + o];
      if (!weight.met_by(sum, found, o, scale, call.activation))
        fail("linear dtype %d, %lld x %lld at %d:%d, tile %d, input %lld of %lld, output %lld: %g instead of %g", numbers.dtype,
             (long long)numbers.O, (long long)K, numbers.n, numbers.m, numbers.tile, (long long)b, (long long)call.B, (long long)o,
             double(found), sum.value);
    }
  }
}

namespace {

openwork::GemmConv2d random_conv(Random& random, int64_t columns) {
  openwork::GemmConv2d c{};
  const int32_t kernel_h = random.of({1, 1, 2, 3, 3, 5});
  c.kernel_w = random.one_in(4) ? 2 : kernel_h;
  c.weight = Weight::numbers(random, columns);
  c.channels = random.one_in(2) ? c.weight.m * random.from(1, 2) : random.from(1, 20);
  c.weight.K = up(c.channels, c.weight.m) * kernel_h * c.kernel_w;
  c.groups = int32_t(random.one_in(2) ? 1 : random.from(1, 3));
  c.weight.O = c.groups * (random.one_in(16) ? random.from(100, 200) : random.from(1, 12));
  c.stride_h = int32_t(random.one_in(2) ? 1 : random.from(1, 3)), c.stride_w = random.one_in(4) ? 2 : c.stride_h;
  c.pad_h = int32_t(random.one_in(2) ? 0 : random.from(0, 3)), c.pad_w = random.one_in(4) ? 1 : c.pad_h;
  c.dilation_h = int32_t(random.one_in(2) ? 1 : random.from(1, 3)), c.dilation_w = random.one_in(4) ? 2 : c.dilation_h;
  c.N = random.from(1, 3), c.threads = random.of({1, 2, 64});
  c.outH = random.one_in(2) ? random.from(1, 4) : random.from(1, 13), c.outW = random.one_in(2) ? c.outH : random.from(1, 20);
  // An input that gives so many outputs, with some rows and columns that the stride leaves over.
  const auto input = [&](int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return (out - 1) * stride + dilation * (kernel - 1) + 1 - 2 * pad + random.from(0, stride - 1);
  };
  c.H = input(c.outH, kernel_h, c.stride_h, c.pad_h, c.dilation_h);
  c.W = input(c.outW, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w);
  c.activation = random_activation(random);
  return c;
}

}  // namespace

void test_conv(const Kernels& kernels, Random& random) {
  const int64_t columns = int64_t(kernels.lanes) * kernels.gemm_vectors;
  openwork::GemmConv2d c = random_conv(random, columns);
  if (c.H < 1 || c.W < 1) return;
  Weight weight(random, c.weight, columns);
  c.weight = weight.w;
  const bool whole = c.weight.dtype == openwork::kInt8;
  const int64_t C = c.channels * c.groups, O = c.weight.O, padded = up(c.channels, c.weight.m), count = c.N * C * c.H * c.W;
  Guarded<float> x(random, whole ? 0 : count), y(random, c.N * O * c.outH * c.outW), scales(random, c.N);
  Guarded<int16_t> numbers(random, whole ? count : 0);
  fill(random, x, true);
  for (int16_t& each : numbers) each = int16_t(random.from(-127, 127));
  for (float& each : scales) each = random.one_in(16) ? NAN : 0.01f * (1.5f + random.real());
  c.x = whole ? (const void*)numbers.data() : x.data(), c.x_scales = whole ? scales.data() : nullptr, c.y = y.data();
  Guarded<char> scratch(random, openwork_gemm_conv2d_scratch(&kernels, &c), 64);
  c.scratch = scratch.data();
  const bool damaged = random.one_in(4) && weight.damage(random, columns);
  const int32_t status = openwork_gemm_conv2d(&kernels, &c);
  if (status != (damaged ? openwork::kDamaged : openwork::kDone)) fail("convolution: status %d, damaged %d", status, damaged);
  if (damaged) return;

  for (int64_t n = 0; n < c.N; n++)
    for (int64_t o = 0; o < O; o++)
      for (int64_t h = 0; h < c.outH; h++)
        for (int64_t w = 0; w < c.outW; w++) {
          const Sum sum = weight.sum(o, [&](int64_t k) -> double {
            const int64_t channel = k % padded, tap = k / padded;
            const int64_t row = h * c.stride_h - c.pad_h + tap / c.kernel_w * c.dilation_h;
            const int64_t column = w * c.stride_w - c.pad_w + tap % c.kernel_w * c.dilation_w;
            if (channel >= c.channels || row < 0 || row >= c.H || column < 0 || column >= c.W) return 0;
            const int64_t at = ((n * C + o / (O / c.groups) * c.channels + channel) * c.H + row) * c.W + column;
            return whole ? numbers[at] : x[at];
          });
          const float found = y[((n * O + o) * c.outH + h) * c.outW + w];
          if (!weight.met_by(sum, found, o, scales[n], c.activation))
            fail("dtype %d, %lld outputs, %lld channels at %d:%d, tile %d, groups %d, kernel %lld x %d, stride %d %d, padding %d %d, "
                 "dilation %d %d, %lld images %lld x %lld: %g instead of %g at %lld %lld %lld %lld",
                 c.weight.dtype, (long long)O, (long long)c.channels, c.weight.n, c.weight.m, c.weight.tile, c.groups,
                 (long long)(c.weight.K / padded / c.kernel_w), c.kernel_w, c.stride_h, c.stride_w, c.pad_h, c.pad_w, c.dilation_h,
                 c.dilation_w, (long long)c.N, (long long)c.H, (long long)c.W, double(found), sum.value, (long long)n, (long long)o,
                 (long long)h, (long long)w);
        }
}

}  // namespace openwork_tests
