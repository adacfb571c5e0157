#include "weight.h"

#include <cmath>
#include <cstring>

namespace openwork {
namespace {

constexpr double kCache = 20 * 1024, kCacheWide = 28 * 1024;  // as in openwork/layouts/gemm.py, which says why

int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product) || product > INT64_MAX / 64) throw Refused("sizes of the weight that no memory holds");
  return product;
}

uint64_t bits_at(const uint8_t* codes, int64_t at, int32_t count) {
  uint64_t found = 0;
  for (int32_t i = 0; i < count; i++, at++) found |= uint64_t(codes[at / 8] >> (at % 8) & 1) << i;
  return found;
}

// The indices of one group.
void read_group(int32_t n, int32_t m, uint64_t bitmask, const uint8_t* codes, int64_t at, uint8_t* index) {
  if (uses_bitmask(n, m)) {
    if (__builtin_popcountll(bitmask) != n) throw Refused("a bitmask of the indices has not N bits set: the file is damaged");
    for (int32_t i = 0; i < n; i++, bitmask &= bitmask - 1) index[i] = uint8_t(__builtin_ctzll(bitmask));
    return;
  }
  const int32_t width = width_of(m);
  for (int32_t i = 0; i < n; i++) {
    index[i] = uint8_t(bits_at(codes, at + i * width, width));
    if (index[i] >= m || (i && index[i] <= index[i - 1]))
      throw Refused("indices are not ascending, or not below M: the file is damaged");
  }
}

// Zeros fill up a group at its lowest free indices, and nothing else is past the end of a row.
void check_spare(const bool* is_zero, const uint8_t* index, int32_t n, int64_t left) {
  uint64_t free = ~uint64_t(0);
  for (int32_t i = 0; i < n; i++)
    if (!is_zero[i]) free &= ~(uint64_t(1) << index[i]);
  for (int32_t i = 0; i < n; i++) {
    if (!is_zero[i] && index[i] >= left) throw Refused("a value lies past the end of its row: the file is damaged");
    if (!is_zero[i]) continue;
    if (!free || index[i] != __builtin_ctzll(free)) throw Refused("a spare slot is not at the lowest free index: the file is damaged");
    free &= free - 1;
  }
}

int32_t tile_of(const CompressedWeight& w, int64_t columns, int64_t row) {
  const double density = double(w.n) / w.m, sparse = kCache * std::pow(0.25 / density, 1.5);
  const double wanted = columns > 64 ? kCacheWide : kCache, cache = sparse > wanted ? sparse : wanted;
  const int64_t inputs = int64_t(cache < 0xFFFF ? cache : 0xFFFF) / row / w.m * w.m;
  return int32_t(inputs > w.m ? inputs : w.m);
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
  return {times(groups, n), bits / 8 + (bits % 8 != 0)};
}

void read_indices(CompressedWeight& w, const uint8_t* codes) {
  const int64_t all = w.outputs * w.rows * w.groups();
  const int32_t bits = code_bits(w.n, w.m);
  const int64_t end = all * bits;
  if (end % 8 && codes[end / 8] >> (end % 8)) throw Refused("the indices have bits set after the last group: the file is damaged");
  w.index = Numbers<uint8_t>(all * w.n);
  for (int64_t g = 0; g < all; g++) {
    uint8_t* index = w.index.data() + g * w.n;
    read_group(w.n, w.m, uses_bitmask(w.n, w.m) ? bits_at(codes, g * bits, w.m) : 0, codes, g * bits, index);
    bool is_zero[64];
    for (int32_t i = 0; i < w.n; i++) {
      int32_t value = 0;
      if (w.dtype == kInt8) value = ((const int8_t*)w.values)[g * w.n + i];
      else std::memcpy(&value, (const float*)w.values + g * w.n + i, 4);
      is_zero[i] = value == 0;
    }
    check_spare(is_zero, index, w.n, w.length - g % w.groups() * w.m);
  }
}

PackedGemm pack_gemm(const CompressedWeight& w, int64_t columns) {
  const bool int8 = w.dtype == kInt8;
  const int64_t row = columns * (int8 ? 2 : 4), all = w.rows * w.groups(), value_bytes = int8 ? 2 : 4;
  PackedGemm packed;
  packed.tile = tile_of(w, columns, row);
  const int64_t tile_groups = packed.tile / w.m;
  const auto stored = [&](int64_t groups) { return up(groups * w.n, int8 ? 2 : 1); };
  const int64_t total = w.outputs * (all / tile_groups * stored(tile_groups) + stored(all % tile_groups));
  packed.values = Numbers<char>(total * value_bytes);
  packed.offsets = Numbers<uint16_t>(total + 1);
  int64_t to = 0;
  for (int64_t first = 0; first < all; first += tile_groups) {
    const int64_t groups = lesser(tile_groups, all - first), padded = stored(groups);
    for (int64_t o = 0; o < w.outputs; o++, to += padded)
      for (int64_t i = 0; i < groups * w.n; i++) {
        const int64_t from = (o * all + first) * w.n + i;
        packed.offsets[to + i] = uint16_t((i / w.n * w.m + w.index[from]) * row);
        if (int8) ((int16_t*)packed.values.data())[to + i] = ((const int8_t*)w.values)[from];
        else std::memcpy((float*)packed.values.data() + to + i, (const float*)w.values + from, 4);
      }
  }
  return packed;
}

bool has_gemv(int32_t m) { return m == 2 || m == 4 || m == 8 || m == 16 || m == 32; }

PackedGemv pack_gemv(const CompressedWeight& w, int64_t lanes) {
  PackedGemv packed;
  packed.window = window_of(w.m), packed.slots = packed.window / w.m * w.n;
  packed.windows = parts(w.length, packed.window), packed.blocks = parts(w.outputs, lanes);
  const int64_t bits = index_bits(packed.window), in_word = 32 / bits, slots = packed.slots, of_output = packed.windows * slots;
  const int64_t words = words_of(packed.windows, slots, in_word), in_window = parts(slots, in_word);
  const int64_t bytes = w.dtype == kInt8 ? 1 : 4;
  packed.values = Numbers<char>(packed.blocks * of_output * lanes * bytes);
  packed.indices = Numbers<uint32_t>(packed.blocks * words * lanes);
  const int64_t together = slots > in_word ? 0 : in_word / slots;  // windows in a word
  for (int64_t o = 0; o < packed.blocks * lanes; o++)
    for (int64_t slot = 0; slot < of_output; slot++) {
      const int64_t at = slot % slots, group = slot / w.n, place = o / lanes, lane = o % lanes;
      int64_t index = at % w.n;  // of what is added to fill up
      if (o < w.outputs && group < w.groups()) {
        const int64_t from = o * w.slots() + slot;
        std::memcpy(packed.values.data() + ((place * of_output + slot) * lanes + lane) * bytes, (const char*)w.values + from * bytes, size_t(bytes));
        index = w.index[from];
      }
      index += at / w.n * w.m;
      const int64_t window = slot / slots;
      const int64_t word = together ? window / together : window * in_window + at / in_word;
      const int64_t nth = together ? window % together * slots + at : at % in_word;
      packed.indices[(place * words + word) * lanes + lane] |= uint32_t(index) << (nth * bits);
    }
  return packed;
}

bool has_dot_product(const CompressedWeight& w, int64_t lanes) {
  const int64_t window = lanes * 4;
  return w.dtype == kInt8 && w.rows == 1 && has_gemv(w.m) && window % w.m == 0 && window / w.m * w.n % 4 == 0;
}

PackedDotProduct pack_dot_product(const CompressedWeight& w, int64_t lanes) {
  PackedDotProduct packed;
  const int64_t window = lanes * 4, slots = window / w.m * w.n;
  packed.windows = parts(w.length, window), packed.blocks = parts(w.outputs, lanes), packed.steps = int32_t(slots / 4);
  const int64_t of_output = packed.windows * slots, all = packed.blocks * lanes * of_output;
  packed.values = Numbers<int8_t>(all);
  packed.indices = Numbers<uint8_t>(all);
  for (int64_t o = 0; o < packed.blocks * lanes; o++)
    for (int64_t slot = 0; slot < of_output; slot++) {
      const int64_t group = slot / w.n, step = slot / 4, from = o * w.slots() + slot;  // steps of all windows, one after the other
      const int64_t to = ((o / lanes * packed.windows * packed.steps + step) * lanes + o % lanes) * 4 + slot % 4;
      const bool is_stored = o < w.outputs && group < w.groups();
      if (is_stored) packed.values[to] = ((const int8_t*)w.values)[from];
      packed.indices[to] = uint8_t((group * w.m + (is_stored ? w.index[from] : slot % w.n)) % window);
    }
  return packed;
}

}  // namespace openwork
