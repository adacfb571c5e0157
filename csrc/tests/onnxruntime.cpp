// A weight of ONNX Runtime's operators: read from what a file holds, and packed for each kernel, against the dense weight; and files
// that are damaged: refused, or packed like any other.
#include <cstring>
#include <vector>

#include "../onnxruntime/weight.h"
#include "tests.h"

namespace openwork_tests {
namespace {

using openwork::Weight;

struct Dense {
  int64_t outputs, inputs;
  std::vector<float> of;
  Dense(int64_t outputs, int64_t inputs) : outputs(outputs), inputs(inputs), of(size_t(outputs * inputs), 0) {}
  void add(int64_t o, int64_t k, float value) {
    if (!value) return;
    if (o >= outputs || k >= inputs) fail("a value of output %lld, input %lld", (long long)o, (long long)k);
    of[size_t(o * inputs + k)] += value;
  }
};

// The rows of the weight of each output with what fills them up.
Dense read(const Weight& w) {
  Dense dense(w.outputs, w.rows * w.groups() * w.m);
  for (int64_t i = 0; i < dense.outputs * dense.inputs; i++)
    dense.of[size_t(i)] = w.dtype == openwork::kInt8 ? ((const int16_t*)w.dense.data())[i] : ((const float*)w.dense.data())[i];
  return dense;
}

Dense of_gemm(const Kernels& kernels, const Weight& w) {
  const openwork::PackedGemm packed = openwork::pack_gemm(kernels, w);
  const bool int8 = w.dtype == openwork::kInt8;
  const int64_t row = int64_t(kernels.lanes) * kernels.gemm_vectors * (int8 ? 2 : 4), inputs = w.rows * w.groups() * w.m;
  Dense dense(w.outputs, inputs);
  int64_t at = 0;
  for (int64_t first = 0; first < inputs; first += packed.tile) {
    const int64_t groups = openwork::lesser(packed.tile, inputs - first) / w.m;
    for (int64_t o = 0; o < w.outputs; o++)
      for (int64_t slot = 0; slot < openwork::up(groups * w.n, int8 ? 2 : 1); slot++, at++) {
        if (packed.offsets[at] % row || packed.offsets[at] / row >= groups * w.m) fail("an offset that is none of its tile");
        dense.add(o, first + packed.offsets[at] / row, int8 ? ((int16_t*)packed.values.data())[at] : ((float*)packed.values.data())[at]);
      }
  }
  if (at + 1 != packed.offsets.size()) fail("%lld offsets, not %lld", (long long)packed.offsets.size(), (long long)at + 1);
  return dense;
}

Dense of_gemv(const Kernels& kernels, const Weight& w) {
  const openwork::PackedGemv packed = openwork::pack_gemv(kernels, w);
  const bool int8 = w.dtype == openwork::kInt8;
  const int64_t bits = packed.window == 4 ? 2 : packed.window == 32 ? 8 : 4, in_word = 32 / bits, slots = packed.slots;
  const int64_t words = openwork::words_of(packed.windows, slots, in_word);
  Dense dense(packed.blocks * kernels.lanes, packed.windows * packed.window);
  for (int64_t o = 0; o < dense.outputs; o++)
    for (int64_t window = 0; window < packed.windows; window++)
      for (int64_t slot = 0; slot < slots; slot++) {
        const int64_t block = o / kernels.lanes, lane = o % kernels.lanes;
        const int64_t nth = slots > in_word ? window * openwork::up(slots, in_word) + slot : window % (in_word / slots) * slots + slot;
        const int64_t word = slots > in_word ? nth / in_word : window / (in_word / slots);
        const uint32_t index = packed.indices[(block * words + word) * kernels.lanes + lane] >> (nth % in_word * bits) & ((1u << bits) - 1);
        const int64_t at = ((block * packed.windows + window) * slots + slot) * kernels.lanes + lane;
        dense.add(o, window * packed.window + index, int8 ? float((int8_t)packed.values[at]) : ((float*)packed.values.data())[at]);
      }
  return dense;
}

Dense of_dot_product(const Kernels& kernels, const Weight& w) {
  const openwork::PackedDotProduct packed = openwork::pack_dot_product(kernels, w);
  const int64_t lanes = kernels.lanes, steps = packed.windows * packed.steps;
  Dense dense(packed.blocks * lanes, packed.windows * lanes * 4);
  for (int64_t at = 0; at < packed.values.size(); at++) {
    const int64_t o = at / (steps * lanes * 4) * lanes + at / 4 % lanes, window = at / (lanes * 4) % steps / packed.steps;
    dense.add(o, window * lanes * 4 + packed.indices[at], packed.values[at]);
  }
  return dense;
}

void compare(const Weight& w, const Dense& expected, const Dense& found, const char* kernel) {
  for (int64_t o = 0; o < found.outputs; o++)
    for (int64_t k = 0; k < found.inputs; k++) {
      const float value = o < expected.outputs && k < expected.inputs ? expected.of[size_t(o * expected.inputs + k)] : 0;
      if (found.of[size_t(o * found.inputs + k)] != value) fail("%s of %d:%d, output %lld, input %lld", kernel, w.n, w.m, (long long)o, (long long)k);
    }
}

void check_packed(const Kernels& kernels, const Weight& w) {
  const Dense expected = read(w);
  compare(w, expected, of_gemm(kernels, w), "gemm");
  if (w.rows == 1 && openwork::has_gemv(w.m)) compare(w, expected, of_gemv(kernels, w), "gemv");
  if (openwork::has_dot_product(kernels, w)) compare(w, expected, of_dot_product(kernels, w), "dot_product");
}

}  // namespace

void test_onnxruntime(const Kernels& kernels, Random& random) {
  Weight w{};
  w.m = int32_t(random.one_in(2) ? random.of<int64_t>({2, 4, 4, 8, 16, 32, 64}) : random.from(1, 64));
  w.n = int32_t(random.one_in(2) ? random.from(1, w.m) : random.from(1, w.m < 3 ? w.m : 3));
  w.dtype = random.of({openwork::kFloat32, openwork::kInt8});
  w.outputs = random.from(1, 40), w.rows = random.one_in(2) ? 1 : random.from(1, 9), w.length = random.from(1, 3 * w.m + 70);
  const int64_t all = w.outputs * w.rows, bytes = w.dtype == openwork::kInt8 ? 1 : 4;
  const openwork::StoredSizes sizes = openwork::stored_sizes(w.n, w.m, w.outputs, w.rows, w.length);
  Guarded<char> dense(random, all * w.length * bytes), values(random, sizes.values * bytes);
  Guarded<uint8_t> indices(random, sizes.index_bytes);
  for (int64_t i = 0, held = 0; i < all * w.length; i++) {
    held = i % w.length % w.m ? held : 0;
    const int8_t whole = int8_t(held < w.n && !random.one_in(4) ? random.from(-127, 127) : 0);
    const float real = whole;
    held += whole != 0;
    if (bytes == 1) ((int8_t*)dense.data())[i] = whole;
    else memcpy(dense.data() + i * 4, &real, 4);
  }
  const Compressed c{dense.data(), values.data(), indices.data(), all, w.length, w.n, w.m, int32_t(bytes), openwork::kAsItIs};
  if (kernels.compress(c, 0, all * w.groups())) fail("groups are called crowded");
  openwork::expand(kernels, w, values.data(), indices.data());
  const Dense expected = read(w);
  for (int64_t i = 0; i < all * w.length; i++) {
    const float value = bytes == 1 ? ((const int8_t*)dense.data())[i] : ((const float*)dense.data())[i];
    if (expected.of[size_t(i / w.length * w.groups() * w.m + i % w.length)] != value) fail("another weight at %d:%d", w.n, w.m);
  }
  check_packed(kernels, w);
  for (int64_t flips = random.from(1, 3); flips > 0; flips--) {
    if (indices.count() && random.one_in(2)) indices[random.from(0, indices.count() - 1)] ^= uint8_t(1 << random.from(0, 7));
    else values[random.from(0, values.count() - 1)] = random.one_in(2) ? 0 : 1;
  }
  try {
    openwork::expand(kernels, w, values.data(), indices.data());
  } catch (const openwork::Refused&) {
    return;
  }
  check_packed(kernels, w);
}

}  // namespace openwork_tests
