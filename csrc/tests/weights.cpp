// What is told of weights, and weights as files hold them, against definitions one weight at a time.
#include <cmath>
#include <cstring>
#include <vector>

#include "tests.h"

namespace openwork_tests {
namespace {

uint64_t at(const void* weights, int bytes, int64_t i) {
  uint64_t value = 0;
  memcpy(&value, (const char*)weights + i * bytes, size_t(bytes));
  return value;
}

void put(void* weights, int bytes, int64_t i, uint64_t value) { memcpy((char*)weights + i * bytes, &value, size_t(bytes)); }

uint64_t random_value(Random& random, int bytes) {
  const uint64_t sign = uint64_t(1) << (8 * bytes - 1);
  const uint64_t value = random.of<uint64_t>({0, sign, random.next(), random.next(), 1});
  return value & (sign * 2 - 1);
}

int width_of(int m) {
  int width = 0;
  while ((1 << width) < m) width++;
  return width;
}

// The bits of the codes of a weight, one a byte, and its values, from the words of docs/format.md.
struct Definition {
  std::vector<uint64_t> values;
  std::vector<char> bits;
};

Definition definition(const Compressed& c) {
  Definition d;
  for (int64_t row = 0; row < c.rows; row++)
    for (int64_t start = 0; start < c.length; start += c.m) {
      const auto member = [&](int i) { return start + i < c.length ? at(c.weight, c.bytes, row * c.length + start + i) : 0; };
      std::vector<char> taken(size_t(c.m), 0);
      int slots = 0;
      for (int i = 0; i < c.m; i++) slots += taken[size_t(i)] = member(i) != 0;
      for (int i = 0; i < c.m && slots < c.n; i++)
        if (!taken[size_t(i)]) slots += taken[size_t(i)] = 1;
      const bool bitmask = c.m < c.n * width_of(c.m);
      for (int i = 0; i < c.m; i++) {
        if (taken[size_t(i)]) d.values.push_back(member(i));
        if (bitmask) d.bits.push_back(taken[size_t(i)]);
        for (int bit = 0; taken[size_t(i)] && !bitmask && bit < width_of(c.m); bit++) d.bits.push_back(char(i >> bit & 1));
      }
    }
  return d;
}

// A denser weight pruned on the way is what `prune` leaves, compressed.
void test_pruned(const Kernels& kernels, Random& random, Compressed c, char* pruned, int64_t groups) {
  const int64_t count = c.rows * c.length;
  Guarded<char> dense(random, count * c.bytes);
  for (int64_t i = 0; i < count; i++) put(dense.data(), c.bytes, i, random_value(random, c.bytes));
  kernels.prune({c.rows, c.length, 1, c.n, c.m}, c.pruned_as, dense.data(), pruned, 0, groups);
  const Definition d = definition(c);
  c.weight = dense.data();
  if (kernels.compress(c, 0, groups)) fail("pruned groups are called crowded");
  for (size_t i = 0; i < d.values.size(); i++)
    if (at(c.values, c.bytes, int64_t(i)) != d.values[i]) fail("pruned value %zu at %d:%d, %d bytes", i, c.n, c.m, c.bytes);
  for (size_t i = 0; i < d.bits.size(); i++)
    if ((c.indices[i / 8] >> (i % 8) & 1) != d.bits[i]) fail("pruned bit %zu at %d:%d", i, c.n, c.m);
}

}  // namespace

void test_compress(const Kernels& kernels, Random& random) {
  Compressed c{};
  c.pruned_as = openwork::kAsItIs;
  c.bytes = random.of({1, 2, 4, 8});
  c.m = int32_t(random.one_in(2) ? random.of<int64_t>({2, 4, 4, 8, 16, 32, 64}) : random.from(1, 64));
  c.n = int32_t(random.one_in(2) ? random.from(1, c.m) : random.from(1, c.m < 3 ? c.m : 3));
  c.length = random.one_in(2) ? c.m * random.from(1, 9) : random.from(1, 3 * c.m + 3);
  c.rows = random.from(1, 9);
  const int64_t groups = c.rows * ((c.length + c.m - 1) / c.m), count = c.rows * c.length;
  Guarded<char> weight(random, count * c.bytes), back(random, count * c.bytes), values(random, groups * c.n * c.bytes);
  for (int64_t row = 0, i = 0; row < c.rows; row++)
    for (int64_t k = 0, held = 0; k < c.length; k++, i++) {
      if (k % c.m == 0) held = 0;
      uint64_t value = held < c.n ? random_value(random, c.bytes) : 0;
      held += value != 0;
      put(weight.data(), c.bytes, i, value);
    }
  c.weight = weight.data();
  const Definition d = definition(c);
  Guarded<uint8_t> indices(random, int64_t(d.bits.size() + 7) / 8);
  c.values = values.data(), c.indices = indices.data();
  const int64_t middle = random.from(0, groups / 8) * 8;
  if ((c.bytes == 4 || c.bytes == 2) && random.one_in(3)) {  // pruned on the way: at least what is pruned already
    c.pruned_as = c.bytes == 4 ? openwork::kFloat32 : random.of({int32_t(openwork::kBFloat16), int32_t(openwork::kFloat16)});
    test_pruned(kernels, random, c, weight.data(), groups);
    return;
  }
  if (kernels.compress(c, 0, middle) + kernels.compress(c, middle, groups)) fail("groups are called crowded");
  for (size_t i = 0; i < d.values.size(); i++)
    if (at(values.data(), c.bytes, int64_t(i)) != d.values[i]) fail("value %zu at %d:%d, %d bytes", i, c.n, c.m, c.bytes);
  for (size_t i = 0; i < (d.bits.size() + 7) / 8 * 8; i++)
    if ((indices[int64_t(i / 8)] >> (i % 8) & 1) != (i < d.bits.size() && d.bits[i])) fail("bit %zu at %d:%d", i, c.n, c.m);

  c.weight = random.one_in(2) ? back.data() : nullptr;
  if (!kernels.expand(c, 0, middle) || !kernels.expand(c, middle, groups)) fail("refused at %d:%d, %d bytes", c.n, c.m, c.bytes);
  if (c.weight && memcmp(back.data(), weight.data(), size_t(count * c.bytes))) fail("another weight at %d:%d", c.n, c.m);

  // Damaged: refused, or what is read packs to the same bytes again.
  c.weight = back.data();
  for (int64_t flips = random.from(1, 3); flips > 0; flips--) {
    if (indices.count() && random.one_in(2)) indices[random.from(0, indices.count() - 1)] ^= uint8_t(1 << random.from(0, 7));
    else if (random.one_in(2)) put(values.data(), c.bytes, random.from(0, groups * c.n - 1), 0);
    else put(values.data(), c.bytes, random.from(0, groups * c.n - 1), random_value(random, c.bytes));
  }
  const bool sound = kernels.expand(c, 0, groups);
  c.weight = nullptr;
  if (kernels.expand(c, 0, groups) != sound) fail("looked at it is sound, read it is not, or the other way round");
  c.weight = back.data();
  if (!sound) return;
  const Definition again = definition(c);
  if (again.values.size() != d.values.size()) fail("too many values were accepted");
  for (size_t i = 0; i < again.values.size(); i++)
    if (at(values.data(), c.bytes, int64_t(i)) != again.values[i]) fail("a second packing was accepted at %d:%d", c.n, c.m);
  for (size_t i = 0; i < (again.bits.size() + 7) / 8 * 8; i++)
    if ((indices[int64_t(i / 8)] >> (i % 8) & 1) != (i < again.bits.size() && again.bits[i]))
      fail("second indices were accepted at %d:%d", c.n, c.m);
}

void test_counts(const Kernels& kernels, Random& random) {
  const Groups g = random_groups(random);
  const int bytes = random.of({1, 2, 4, 8});
  const uint64_t counted = random.one_in(2) ? ~uint64_t(0) : (uint64_t(1) << (8 * bytes - 1)) - 1;
  const int64_t count = g.outer * g.length * g.inner, groups = g.outer * groups_of(g);
  const int64_t first = random.one_in(2) ? 0 : random.from(0, groups), last = random.one_in(2) ? groups : random.from(first, groups);
  Guarded<char> weight(random, count * bytes);
  for (int64_t i = 0; i < count; i++) put(weight.data(), bytes, i, random.one_in(2) ? 0 : random_value(random, bytes));
  const uint64_t all = bytes == 8 ? ~uint64_t(0) : (uint64_t(1) << (8 * bytes)) - 1;
  int64_t expected[3] = {0, 0, 0}, found[3];
  for (int64_t group = first; group < last; group++)
    for (int64_t r = 0; r < g.inner; r++) {
      int64_t full = 0;
      for (int64_t i = group % groups_of(g) * g.m, end = i + g.m < g.length ? i + g.m : g.length; i < end; i++)
        full += (at(weight.data(), bytes, (group / groups_of(g) * g.length + i) * g.inner + r) & counted & all) != 0;
      expected[0] += full, expected[1] += full > g.n, expected[2] = full > expected[2] ? full : expected[2];
    }
  kernels.count_groups(g, bytes, counted, weight.data(), first, last, found);
  for (int i = 0; i < 3; i++)
    if (found[i] != expected[i]) fail("count %d of %d:%d is %lld, not %lld", i, g.n, g.m, (long long)found[i], (long long)expected[i]);
}

void test_retained(const Kernels& kernels, Random& random) {
  const Groups g = random_groups(random);
  const bool half = random.one_in(2);
  const int32_t dtype = half ? openwork::kBFloat16 : openwork::kFloat32;
  const int64_t count = g.outer * g.length * g.inner, groups = g.outer * groups_of(g), bytes = half ? 2 : 4;
  const int64_t first = random.one_in(2) ? 0 : random.from(0, groups), last = random.one_in(2) ? groups : random.from(first, groups);
  Guarded<char> weight(random, count * bytes);
  std::vector<char> pruned(size_t(count * bytes), 0), inside(size_t(count * bytes), 0);
  const bool few = random.one_in(3);
  for (int64_t i = 0; i < count; i++) {
    const float value = few ? float(random.from(-2, 2)) : random.real() * (random.one_in(9) ? 1e30f : 1.0f);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    put(weight.data(), int(bytes), i, half ? bits >> 16 : bits);
  }
  kernels.prune(g, dtype, weight.data(), pruned.data(), first, last);
  const auto square = [&](const void* from, int64_t i) {
    const uint32_t bits = uint32_t(at(from, int(bytes), i)) << (half ? 16 : 0);
    float value;
    memcpy(&value, &bits, 4);
    return double(value) * double(value);
  };
  double expected[2] = {0, 0}, found[2];
  for (int64_t i = start_of(g, first); i < start_of(g, last); i++) expected[0] += square(pruned.data(), i), expected[1] += square(weight.data(), i);
  kernels.retained(g, dtype, weight.data(), first, last, found);
  for (int i = 0; i < 2; i++)
    if (std::fabs(found[i] - expected[i]) > 1e-12 * expected[i]) fail("sum %d at %d:%d is %g, not %g", i, g.n, g.m, found[i], expected[i]);
}

}  // namespace openwork_tests
