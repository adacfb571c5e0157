// Products of bytes that give bytes or floats, against plain loops: the same numbers to the last bit, but for GELU.
#include <cmath>
#include <cstdlib>

#include "tests.h"

namespace openwork_tests {
namespace {

#ifdef NO_AVX2  // intrinsics in plain C, where multiply-adds round twice
constexpr bool kRoundsTwice = true;
#else
constexpr bool kRoundsTwice = false;
#endif

int whole_byte(double value) {
  const double whole = std::nearbyint(value);
  return whole >= 255 ? 255 : whole > 0 ? int(whole) : 0;  // NaN is no more than 0
}

openwork::Pixels random_pixels(Random& random, int64_t window) {
  openwork::Pixels p{};
  p.channels = random.one_in(3) ? window : random.from(1, 140), p.kernel_w = int32_t(random.from(1, 3));
  p.H = random.from(1, 9), p.W = random.from(1, 9), p.outH = random.from(1, 9), p.outW = random.from(1, 9);
  p.stride_h = int32_t(random.from(1, 2)), p.stride_w = int32_t(random.from(1, 2)), p.pad_h = int32_t(random.from(0, 2));
  p.pad_w = int32_t(random.from(0, 2)), p.dilation_h = int32_t(random.from(1, 2)), p.dilation_w = int32_t(random.from(1, 2));
  return p;
}

}  // namespace

void test_bytes(const Kernels& kernels, Random& random) {
  const int64_t lanes = kernels.lanes, window = lanes * 4, N = random.from(1, 3), kernel_h = random.from(1, 3);
  openwork::DotProduct d{};
  openwork::Requantize r{};
  const openwork::Pixels p = random_pixels(random, window);
  const bool images = random.one_in(2);
  d.steps = int32_t(random.one_in(2) ? random.from(1, 2) : random.from(1, 9)), d.pixels = images ? &p : nullptr;
  d.K = images ? p.channels * p.kernel_w * kernel_h : random.from(1, 5 * window), d.windows = (d.K + window - 1) / window;
  d.outputs = random.from(1, 5 * lanes), d.blocks = (d.outputs + lanes - 1) / lanes;
  d.batch = images ? N * p.outH * p.outW : random.one_in(8) ? random.from(90, 230) : random.from(1, 30);
  d.x_stride = d.K + random.from(0, 3), d.y_stride = d.outputs + random.from(0, 3);
  d.activation = random.of({openwork::kNone, openwork::kRelu, openwork::kGelu});
  const int64_t numbers = images ? N * p.H * p.W * p.channels : (d.batch - 1) * d.x_stride + d.K;
  const int64_t results = (d.batch - 1) * d.y_stride + d.outputs, slots = d.blocks * d.windows * d.steps * window;
  Guarded<int8_t> values(random, slots);
  Guarded<uint8_t> indices(random, slots), x(random, numbers), residual_bytes(random, results), y_bytes(random, results);
  Guarded<float> bias(random, d.outputs), scales(random, d.outputs), residual(random, results), y(random, results);
  Guarded<int32_t> sums(random, d.outputs);
  for (int8_t& each : values) each = int8_t(random.from(-127, 127));
  for (uint8_t& each : indices) each = uint8_t(random.next());
  for (uint8_t& each : x) each = uint8_t(random.next());
  for (uint8_t& each : residual_bytes) each = uint8_t(random.next());
  for (float& each : bias) each = random.one_in(30) ? NAN : random.real();
  for (float& each : residual) each = random.real();
  for (float& each : scales) each = 1e-4f * (1.5f + random.real());
  const auto at = [&](int64_t o, int64_t w, int64_t step, int64_t i) {
    return ((o / lanes * d.windows + w) * d.steps + step) * window + o % lanes * 4 + i;
  };
  for (int64_t o = 0; o < d.outputs; o++) {  // weights of inputs behind the last are zeros
    sums[o] = 0;
    for (int64_t w = 0; w < d.windows; w++)
      for (int64_t step = 0; step < d.steps; step++)
        for (int64_t i = 0; i < 4; i++) {
          if (w * window + indices[at(o, w, step, i)] % window >= d.K) values[at(o, w, step, i)] = 0;
          sums[o] += values[at(o, w, step, i)];
        }
  }
  r.zero = int32_t(random.from(0, 255)), r.residual_zero = int32_t(random.from(0, 255)), r.y_zero = int32_t(random.from(0, 255));
  r.y_is_float = random.one_in(2), r.residual_is_float = random.one_in(2), r.sums = sums.data();
  r.residual_scale = 0.01f, r.y_inverse = random.of({1.0f, 50.0f, 1000.0f});
  r.residual = random.one_in(3) ? nullptr : r.residual_is_float ? (const void*)residual.data() : residual_bytes.data();
  d.values = values.data(), d.indices = indices.data(), d.x = x.data(), d.scales = scales.data(), d.requantize = &r;
  d.y = r.y_is_float ? (void*)y.data() : y_bytes.data(), d.bias = random.one_in(2) ? bias.data() : nullptr;
  const int64_t threads = random.of({1, 2, 64});
  Guarded<char> packed(random, openwork_dot_product_scratch(&kernels, &d, threads), 64);
  d.packed = packed.data();
  openwork_dot_product(&kernels, &d, openwork::kInt8, threads);

  const int64_t pixels = p.outH * p.outW;
  for (int64_t b = 0; b < d.batch; b++) {
    const auto input = [&](int64_t k) -> int32_t {
      if (!images) return x[b * d.x_stride + k];
      const int64_t tap = k / p.channels, row = b % pixels / p.outW * p.stride_h - p.pad_h + tap / p.kernel_w * p.dilation_h;
      const int64_t column = b % p.outW * p.stride_w - p.pad_w + tap % p.kernel_w * p.dilation_w;
      if (row < 0 || row >= p.H || column < 0 || column >= p.W) return r.zero;
      return x[((b / pixels * p.H + row) * p.W + column) * p.channels + k % p.channels];
    };
    for (int64_t o = 0; o < d.outputs; o++) {
      int32_t sum = 0;
      for (int64_t w = 0; w < d.windows; w++)
        for (int64_t step = 0; step < d.steps; step++)
          for (int64_t i = 0; i < 4; i++) {
            const int64_t k = w * window + indices[at(o, w, step, i)] % window;
            if (k < d.K) sum += values[at(o, w, step, i)] * (input(k) - r.zero);
          }
      const int64_t to = b * d.y_stride + o;
      float wanted = std::fmaf(float(sum), scales[o], d.bias ? bias[o] : 0);
      if (r.residual && r.residual_is_float) wanted += residual[to];
      else if (r.residual) wanted = std::fmaf(float(residual_bytes[to] - r.residual_zero), r.residual_scale, wanted);
      if (d.activation == openwork::kRelu && wanted < 0) wanted = 0;
      const double exact = d.activation == openwork::kGelu ? 0.5 * wanted * (1 + std::erf(wanted / std::sqrt(2.0))) : wanted;
      const double size = 1 + std::fabs(wanted) + (kRoundsTwice ? std::fabs(double(sum) * scales[o]) : 0);
      const double slack = d.activation == openwork::kGelu || kRoundsTwice ? 1e-6 * size : 0;
      if (r.y_is_float) {
        if (std::isnan(exact) ? std::isnan(y[to]) : std::fabs(double(y[to]) - exact) <= slack) continue;
      } else {
        const double low = (exact - slack) * double(r.y_inverse), high = (exact + slack) * double(r.y_inverse);
        const float middle = std::fmaf(float(exact), r.y_inverse, float(r.y_zero));
        if (slack > 0 ? y_bytes[to] >= whole_byte(low + r.y_zero) && y_bytes[to] <= whole_byte(high + r.y_zero)
                      : y_bytes[to] == whole_byte(double(middle)))
          continue;
        if (std::isnan(exact) && y_bytes[to] == 0) continue;
      }
      fail("%d steps, %lld windows, output %lld of %lld, input %lld of %lld, activation %d: %g instead of %g", d.steps, (long long)d.windows,
           (long long)o, (long long)d.outputs, (long long)b, (long long)d.batch, d.activation,
           r.y_is_float ? double(y[to]) : double(y_bytes[to]), exact);
    }
  }
}

void test_there_and_back(const Kernels& kernels, Random& random) {
  const int64_t count = random.one_in(8) ? random.from(60000, 70000) : random.from(0, 200);
  const int32_t zero = int32_t(random.from(0, 255));
  const float scale = random.of({0.01f, 1.0f, 3e-5f});
  Guarded<float> x(random, count), back(random, count);
  Guarded<uint8_t> bytes(random, count);
  for (float& each : x) each = random.one_in(50) ? NAN : random.one_in(8) ? float(random.from(-300, 300)) / 2 : random.real();
  openwork_to_bytes(&kernels, x.data(), count, 1 / scale, zero, bytes.data());
  openwork_from_bytes(&kernels, bytes.data(), count, scale, zero, back.data());
  for (int64_t i = 0; i < count; i++) {
    const int wanted = whole_byte(double(std::fmaf(x[i], 1 / scale, float(zero))));
    if (std::abs(bytes[i] - wanted) > kRoundsTwice) fail("%d instead of %d for %g", bytes[i], wanted, double(x[i]));
    if (back[i] != float(bytes[i] - zero) * scale) fail("%g of byte %d", double(back[i]), bytes[i]);
  }
}

}  // namespace openwork_tests
