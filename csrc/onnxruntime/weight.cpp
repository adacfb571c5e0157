#include "weight.h"

#include <cmath>
#include <cstring>

extern "C" {  // dispatch.cpp
int32_t openwork_expand(const openwork::Kernels* kernels, const openwork::Compressed* c, int64_t from, int64_t to, int32_t* sound);
int32_t openwork_slots(const openwork::Kernels* kernels, const openwork::Slots* s, int64_t* crowded);
int32_t openwork_gemm_columns(const openwork::Kernels* kernels);
}

namespace openwork {
namespace {

constexpr double kCache = 20 * 1024, kCacheWide = 28 * 1024;  // as in openwork/layouts/gemm.py, which says why

int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product) || product > INT64_MAX / 64) throw Refused("sizes of the weight that no memory holds");
  return product;
}

// The slots of a weight, filled up with zeros to `outputs` rows of `length` inputs: tile by tile, in each output by output.
struct Slotted {
  Numbers<char> values;       // float32, or int16 for int8
  Numbers<uint16_t> offsets;  // of an input in its tile, times `step`; one more than there are values
};
Slotted slots_of(const Kernels& kernels, const Weight& w, int64_t outputs, int64_t length, int64_t tile, int64_t step, bool even) {
  const int64_t own = w.rows * w.groups() * w.m, bytes = w.bytes();
  Numbers<char> wider;
  if (outputs != w.outputs || length != own) {
    wider = Numbers<char>(outputs * length * bytes);
    for (int64_t o = 0; o < w.outputs; o++)
      std::memcpy(wider.data() + o * length * bytes, w.dense.data() + o * own * bytes, size_t(lesser(own, length) * bytes));
  }
  const auto stored = [&](int64_t inputs) { return up(parts(inputs, w.m) * w.n, even ? 2 : 1); };
  const int64_t total = outputs * (length / tile * stored(tile) + stored(length % tile));
  Slotted made{Numbers<char>(total * bytes), Numbers<uint16_t>(total + 1)};
  const Slots call{wider.data() ? wider.data() : w.dense.data(), made.values.data(), made.offsets.data(), outputs, length, tile,
                   ~uint64_t(0), w.n, w.m, int32_t(bytes), int32_t(step), even};
  int64_t crowded = 0;
  if (openwork_slots(&kernels, &call, &crowded) != kDone) throw std::bad_alloc();
  return made;
}

int64_t tile_of(const Weight& w, int64_t columns, int64_t row) {
  const double density = double(w.n) / w.m, sparse = kCache * std::pow(0.25 / density, 1.5);
  const double wanted = columns > 64 ? kCacheWide : kCache, cache = sparse > wanted ? sparse : wanted;
  const int64_t inputs = int64_t(cache < 0xFFFF ? cache : 0xFFFF) / row / w.m * w.m;
  return inputs > w.m ? inputs : w.m;
}

int32_t window_of(int32_t m) { return m == 2 ? 4 : m; }
int32_t index_bits(int32_t window) { return window == 4 ? 2 : window == 32 ? 8 : 4; }

}  // namespace

StoredSizes stored_sizes(int64_t n, int64_t m, int64_t outputs, int64_t rows, int64_t length) {
  if (m < 1 || m > 64 || n < 1 || n > m)
    throw Refused("n = " + std::to_string(n) + ", m = " + std::to_string(m) + "; needed 1 <= n <= m <= 64");
  if (outputs < 1 || rows < 1 || length < 1) throw Refused("a weight without outputs or inputs");
  const int64_t groups = times(times(outputs, rows), (times(length, 2) / 2 + m - 1) / m);
  const int64_t bits = times(groups, code_bits(int32_t(n), int32_t(m)));
  times(groups, m);
  return {times(groups, n), bits / 8 + (bits % 8 != 0)};
}

void expand(const Kernels& kernels, Weight& w, const void* values, const uint8_t* indices) {
  const int64_t padded = w.groups() * w.m, all = w.outputs * w.rows, bytes = w.dtype == kInt8 ? 1 : 4;
  Numbers<char> dense(all * padded * bytes);
  const Compressed call{dense.data(), (void*)values, (uint8_t*)indices, all, padded, w.n, w.m, int32_t(bytes), kAsItIs};
  int32_t sound = 0;
  if (openwork_expand(&kernels, &call, 0, all * w.groups(), &sound) != kDone) throw std::bad_alloc();
  if (!sound)
    throw Refused("indices that are not ascending and below M, a spare slot that is not at the lowest free index, or bits after "
                  "the last group: the file is damaged");
  for (int64_t row = 0; row < all; row++)
    for (int64_t i = (row * padded + w.length) * bytes; i < (row + 1) * padded * bytes; i++)
      if (dense[i]) throw Refused("a value lies past the end of its row: the file is damaged");
  if (w.dtype == kFloat32) return void(w.dense = std::move(dense));
  w.dense = Numbers<char>(all * padded * 2);
  for (int64_t i = 0; i < all * padded; i++) ((int16_t*)w.dense.data())[i] = ((const int8_t*)dense.data())[i];
}

PackedGemm pack_gemm(const Kernels& kernels, const Weight& w) {
  const int64_t columns = openwork_gemm_columns(&kernels), row = columns * w.bytes(), tile = tile_of(w, columns, row);
  Slotted made = slots_of(kernels, w, w.outputs, w.rows * w.groups() * w.m, tile, row, w.dtype == kInt8);
  return {std::move(made.values), std::move(made.offsets), int32_t(tile)};
}

bool has_gemv(int32_t m) { return m == 2 || m == 4 || m == 8 || m == 16 || m == 32; }

PackedGemv pack_gemv(const Kernels& kernels, const Weight& w) {
  PackedGemv packed;
  const int64_t lanes = kernels.lanes, window = window_of(w.m), slots = window / w.m * w.n;
  packed.window = int32_t(window), packed.slots = int32_t(slots);
  packed.windows = parts(w.length, window), packed.blocks = parts(w.outputs, lanes);
  const int64_t bits = index_bits(packed.window), in_word = 32 / bits, of_output = packed.windows * slots, outputs = packed.blocks * lanes;
  const int64_t words = words_of(packed.windows, slots, in_word), in_window = parts(slots, in_word);
  const bool int8 = w.dtype == kInt8;
  packed.values = Numbers<char>(outputs * of_output * (int8 ? 1 : 4));
  packed.indices = Numbers<uint32_t>(packed.blocks * words * lanes);
  const Slotted from = slots_of(kernels, w, outputs, packed.windows * window, window, 1, false);
  const int64_t together = slots > in_word ? 0 : in_word / slots;  // windows in a word
  int64_t at = 0;
  for (int64_t window_at = 0; window_at < packed.windows; window_at++)
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t slot = 0, block = o / lanes, lane = o % lanes; slot < slots; slot++, at++) {
        const int64_t to = (block * of_output + window_at * slots + slot) * lanes + lane;
        if (int8) packed.values[to] = char(((const int16_t*)from.values.data())[at]);
        else std::memcpy(packed.values.data() + to * 4, from.values.data() + at * 4, 4);
        const int64_t word = together ? window_at / together : window_at * in_window + slot / in_word;
        const int64_t nth = together ? window_at % together * slots + slot : slot % in_word;
        packed.indices[(block * words + word) * lanes + lane] |= uint32_t(from.offsets[at]) << (nth * bits);
      }
  return packed;
}

bool has_dot_product(const Kernels& kernels, const Weight& w) {
  const int64_t window = kernels.lanes * 4;
  return kernels.dot_product && w.dtype == kInt8 && has_gemv(w.m) && window % w.m == 0 && window / w.m * w.n % 4 == 0;
}

PackedDotProduct pack_dot_product(const Kernels& kernels, const Weight& w) {
  PackedDotProduct packed;
  const int64_t lanes = kernels.lanes, window = lanes * 4, slots = window / w.m * w.n;
  packed.windows = parts(w.rows * w.groups() * w.m, window), packed.blocks = parts(w.outputs, lanes), packed.steps = int32_t(slots / 4);
  const int64_t outputs = packed.blocks * lanes, all = outputs * packed.windows * slots;
  packed.values = Numbers<int8_t>(all);
  packed.indices = Numbers<uint8_t>(all);
  const Slotted from = slots_of(kernels, w, outputs, packed.windows * window, window, 1, false);
  int64_t at = 0;
  for (int64_t window_at = 0; window_at < packed.windows; window_at++)
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t slot = 0; slot < slots; slot++, at++) {
        const int64_t step = (o / lanes * packed.windows + window_at) * packed.steps + slot / 4;
        const int64_t to = (step * lanes + o % lanes) * 4 + slot % 4;
        packed.values[to] = int8_t(((const int16_t*)from.values.data())[at]);
        packed.indices[to] = uint8_t(from.offsets[at]);
      }
  return packed;
}

}  // namespace openwork
