// Masks against the definition: a weight is kept when fewer than N others of its group beat it.
#include <cmath>
#include <vector>

#include "tests.h"

namespace openwork_tests {
namespace {

struct Float {  // how a dtype is laid out in its bits
  int size;
  uint32_t infinity, sign;
};

Float float_of(int32_t dtype) {
  return dtype == openwork::kFloat32    ? Float{4, 0x7f800000, 0x80000000}
         : dtype == openwork::kBFloat16 ? Float{2, 0x7f80, 0x8000}
                                        : Float{2, 0x7c00, 0x8000};
}

uint32_t random_bits(Random& random, const Float& f, bool few) {
  if (random.one_in(12)) {
    const uint32_t sign = random.one_in(2) ? f.sign : 0, nan = f.infinity | uint32_t(random.from(1, f.size == 4 ? 0x7fffff : 0x7f));
    return sign | random.of<uint32_t>({0, 1, f.infinity, f.infinity - 1, nan, nan});
  }
  const uint32_t one = f.size == 4 ? 0x3f800000 : 0x3f80, all = uint32_t(random.next()) & (f.sign * 2 - 1);
  if (few) return (all & f.sign) | (one + uint32_t(random.from(0, 3)));  // ties
  return random.one_in(4) ? all : (all & f.sign) | (one + (all & (f.size == 4 ? 0x00ffffff : 0x00ff)));
}

uint32_t bits_at(const void* weights, const Float& f, int64_t i) {
  uint32_t bits = 0;
  memcpy(&bits, (const char*)weights + i * f.size, size_t(f.size));
  return bits;
}

// For each weight whether it is kept, one comparison at a time, and whether its group is one of [first, last).
struct Answer {
  std::vector<char> kept, inside;
};

Answer definition(const Groups& g, const Float& f, const void* weights, int64_t first, int64_t last) {
  Answer answer{std::vector<char>(size_t(g.outer * g.length * g.inner)), {}};
  answer.inside = answer.kept;
  const auto key = [&](int64_t i) {
    const uint32_t magnitude = bits_at(weights, f, i) & (f.sign - 1);
    return magnitude > f.infinity ? f.infinity + 1 : magnitude;
  };
  for (int64_t o = 0, group = 0; o < g.outer; o++)
    for (int64_t start = 0; start < g.length; start += g.m, group++)
      for (int64_t r = 0; r < g.inner; r++) {
        const int64_t end = start + g.m < g.length ? start + g.m : g.length;
        for (int64_t i = start; i < end; i++) {
          const int64_t mine = (o * g.length + i) * g.inner + r;
          int lost = 0;
          for (int64_t j = start; j < end; j++) {
            const int64_t other = (o * g.length + j) * g.inner + r;
            lost += key(other) > key(mine) || (key(other) == key(mine) && j < i);
          }
          answer.kept[size_t(mine)] = lost < g.n;
          answer.inside[size_t(mine)] = group >= first && group < last;
        }
      }
  return answer;
}

float wide(uint32_t bits, const Float& f) {
  if (f.size == 2) bits <<= 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// A float rounded to the dtype, half to even; by arithmetic where the kernel works on bits.
float rounded(float value, const Float& f) {
  if (f.size == 4 || !std::isfinite(value) || value == 0) return value;
  const int exponent = std::ilogb(value) < -126 ? -126 : std::ilogb(value);
  return float(std::ldexp(std::nearbyint(std::ldexp(double(value), 7 - exponent)), exponent - 7));
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || memcmp(&a, &b, 4) == 0; }

}  // namespace

Groups random_groups(Random& random) {
  Groups g{};
  g.m = int32_t(random.one_in(2) ? random.of<int64_t>({2, 4, 8, 16, 32, 64}) : random.from(1, 64));
  g.n = int32_t(random.one_in(3) ? 1 : random.from(1, g.m));
  g.inner = random.one_in(2) ? 1 : random.one_in(24) ? random.from(8192 / g.m, 8192 / g.m + 70) : random.from(2, 70);
  g.outer = random.from(1, g.inner > 100 ? 2 : 5);
  g.length = random.one_in(2) ? g.m * random.from(1, g.inner > 1 ? 2 : 9) : random.from(1, 2 * g.m + 3);
  return g;
}

void test_masks(const Kernels& kernels, Random& random) {
  const Groups g = random_groups(random);
  const int32_t dtype = random.of({int32_t(openwork::kFloat32), int32_t(openwork::kBFloat16), int32_t(openwork::kFloat16)});
  const Float f = float_of(dtype);
  const int64_t count = g.outer * g.length * g.inner, groups = g.outer * groups_of(g);
  const int64_t first = random.one_in(2) ? 0 : random.from(0, groups), last = random.one_in(2) ? groups : random.from(first, groups);
  Guarded<char> weight(random, count * f.size), pruned(random, count * f.size), gradient(random, count * f.size);
  Guarded<uint8_t> keep(random, count);
  const bool few = random.one_in(2);
  for (int64_t i = 0; i < count; i++)
    for (auto each : {&weight, &gradient}) {
      const uint32_t bits = random_bits(random, f, few);
      memcpy(each->data() + i * f.size, &bits, size_t(f.size));
    }
  const std::vector<char> before(gradient.begin(), gradient.end());
  const float rate = random.of({0.0f, 2e-4f, 0.5f, 3.0f});
  kernels.keep(g, dtype, weight.data(), keep.data(), first, last);
  kernels.prune(g, dtype, weight.data(), pruned.data(), first, last);
  if (dtype != openwork::kFloat16) kernels.decay(g, dtype, weight.data(), gradient.data(), gradient.data(), rate, first, last);

  const Answer answer = definition(g, f, weight.data(), first, last);
  for (int64_t i = 0; i < count; i++) {
    const bool kept = answer.kept[size_t(i)], inside = answer.inside[size_t(i)];
    const uint32_t bits = bits_at(weight.data(), f, i), old = bits_at(before.data(), f, i);
    const auto where = [&](const char* what) {
      fail("%s of weight %lld: %lld x %lld x %lld at %d:%d, dtype %d, groups %lld to %lld", what, (long long)i, (long long)g.outer,
           (long long)g.length, (long long)g.inner, g.n, g.m, dtype, (long long)first, (long long)last);
    };
    if (keep[i] != (inside ? uint8_t(kept) : 0xa5)) where("mask");
    const uint32_t untouched = 0xa5a5a5a5 & (f.sign * 2 - 1);
    if (bits_at(pruned.data(), f, i) != (!inside ? untouched : kept ? bits : 0)) where("pruned");
    if (dtype == openwork::kFloat16) continue;
    const float term = kept ? 0.0f : rounded(wide(bits, f) * rate, f);
    const float expected = inside ? rounded(wide(old, f) + term, f) : wide(old, f);
    if (!same(wide(bits_at(gradient.data(), f, i), f), expected)) where("decay");
  }
}

void test_transpose(const Kernels& kernels, Random& random) {
  const int64_t rows = random.from(0, 40), columns = random.from(0, 40);
  const int64_t from_stride = columns + random.from(0, 3), to_stride = rows + random.from(0, 3);
  // The last row of each ends with its last value: what lies between rows may belong to others.
  Guarded<float> from(random, rows && columns ? (rows - 1) * from_stride + columns : 0);
  Guarded<float> to(random, rows && columns ? (columns - 1) * to_stride + rows : 0);
  for (float& each : from) each = random.real();
  const float untouched = to.count() ? to[0] : 0;
  kernels.transpose(from.data(), from_stride, rows, columns, to.data(), to_stride);
  for (int64_t i = 0; i < to.count(); i++) {
    const int64_t c = i / to_stride, r = i % to_stride;
    if (!same(to[i], r < rows ? from[r * from_stride + c] : untouched))
      fail("transpose of %lld x %lld at %lld, %lld", (long long)rows, (long long)columns, (long long)r, (long long)c);
  }
}

}  // namespace openwork_tests
