// Weights as files hold them (docs/format.md, openwork/files/packing.py): of each group its N slots, and the code that says
// where they are. Weights are integers here, of which only zero means something.
//
// Eight members are looked at together, as bits. Where groups of M divide eight, a table knows the rest: for each eight bits
// the slots and the code, for each code the slots. Other groups are taken bit by bit.

// Bit i: whether any `counted` bit of from[i] is set, of eight.
template <class T>
inline uint32_t nonzero8(const T* from, T counted) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 8) return _mm512_test_epi64_mask(_mm512_loadu_si512(from), _mm512_set1_epi64(int64_t(counted)));
  if constexpr (sizeof(T) == 4)
    return _mm256_test_epi32_mask(_mm256_loadu_si256((const __m256i*)from), _mm256_set1_epi32(int32_t(counted)));
  if constexpr (sizeof(T) == 2)
    return _mm_test_epi16_mask(_mm_loadu_si128((const __m128i*)from), _mm_set1_epi16(int16_t(counted)));
  if constexpr (sizeof(T) == 1)
    return _mm_test_epi8_mask(_mm_loadl_epi64((const __m128i*)from), _mm_set1_epi8(int8_t(counted))) & 0xff;
#elif defined(__AVX2__)
  const __m128i none = _mm_setzero_si128();
  if constexpr (sizeof(T) == 4) {
    const __m256i w = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)from), _mm256_set1_epi32(int32_t(counted)));
    return uint32_t(~_mm256_movemask_ps((__m256)_mm256_cmpeq_epi32(w, _mm256_setzero_si256()))) & 0xff;
  }
  if constexpr (sizeof(T) == 2) {
    const __m128i w = _mm_and_si128(_mm_loadu_si128((const __m128i*)from), _mm_set1_epi16(int16_t(counted)));
    return uint32_t(~_mm_movemask_epi8(_mm_packs_epi16(_mm_cmpeq_epi16(w, none), none))) & 0xff;
  }
  if constexpr (sizeof(T) == 1) {
    const __m128i w = _mm_and_si128(_mm_loadl_epi64((const __m128i*)from), _mm_set1_epi8(int8_t(counted)));
    return uint32_t(~_mm_movemask_epi8(_mm_cmpeq_epi8(w, none))) & 0xff;
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < 8; i++) bits |= uint32_t((from[i] & counted) != 0) << i;
  return bits;
}

// The same of up to 64.
template <class T>
inline uint64_t nonzero64(const T* from, int count, T counted) {
  uint64_t bits = 0;
  int i = 0;
  for (; i + 8 <= count; i += 8) bits |= uint64_t(nonzero8(from + i, counted)) << i;
  for (; i < count; i++) bits |= uint64_t((from[i] & counted) != 0) << i;
  return bits;
}

inline int ones(uint64_t bits) { return __builtin_popcountll(bits); }

// `bits` and the lowest others, to n in all.
inline uint64_t filled_up(uint64_t bits, int n) {
  for (int more = n - ones(bits); more > 0; more--) bits |= bits + 1;
  return bits;
}

inline uint64_t code_of(uint64_t slots, int n, int m) {
  if (uses_bitmask(n, m)) return slots;
  uint64_t code = 0;
  for (int at = 0; slots; slots &= slots - 1, at += width_of(m)) code |= uint64_t(__builtin_ctzll(slots)) << at;
  return code;
}

// The slots that a code says; none where it breaks a rule.
inline uint64_t slots_of(uint64_t code, int n, int m) {
  if (uses_bitmask(n, m)) return ones(code) == n ? code : 0;
  const int width = width_of(m);
  uint64_t slots = 0;
  for (int slot = 0, before = -1; slot < n; slot++) {
    const int index = int(code >> (slot * width) & ((uint64_t(1) << width) - 1));
    if (index <= before || index >= m) return 0;
    slots |= uint64_t(1) << index;
    before = index;
  }
  return slots;
}

struct CodeWriter {
  uint8_t* to;
  uint64_t waiting;
  int bits;  // of it, below 64

  void put(uint64_t code, int more) {
    if (!more) return;
    waiting |= code << bits;
    bits += more;
    if (bits < 64) return;
    __builtin_memcpy(to, &waiting, 8);
    to += 8;
    bits -= 64;
    waiting = bits ? code >> (more - bits) : 0;
  }
  void finish() {
    for (; bits > 0; bits -= 8, waiting >>= 8) *to++ = uint8_t(waiting);
  }
};

struct CodeReader {
  const uint8_t* from;
  int64_t bytes, at;  // at: in bits

  uint64_t next(int bits) {
    const int64_t first = at >> 3;
    const int shift = int(at & 7);
    at += bits;
    uint64_t low = 0;
    if (first + 9 <= bytes) __builtin_memcpy(&low, from + first, 8);
    else
      for (int64_t i = first; i < bytes && i < first + 8; i++) low |= uint64_t(from[i]) << (8 * (i - first));
    low >>= shift;
    if (shift + bits > 64) low |= uint64_t(from[first + 8]) << (64 - shift);
    return bits < 64 ? low & ((uint64_t(1) << bits) - 1) : low;
  }
};

// What is known of eight members, by their bits or by their codes: `slots` is none where the bits are too many, or the code
// breaks a rule.
struct Eight {
  uint8_t slots, code, at[8];
};

struct Table {
  Eight of[256];
  int together, slots, bits;  // groups, their slots, the bits of their codes

  Table(int n, int m, bool by_code) : together(8 / m), slots(8 / m * n), bits(8 / m * code_bits(n, m)) {
    for (uint32_t bits_or_code = 0; bits_or_code < (by_code ? 1u << bits : 256u); bits_or_code++)
      of[bits_or_code] = by_code ? by_codes(bits_or_code, n, m) : by_bits(bits_or_code, n, m);
  }

 private:
  Eight by_bits(uint32_t all, int n, int m) const {
    Eight eight{};
    for (int group = together - 1; group >= 0; group--) {
      const uint64_t bits = all >> (group * m) & ((1u << m) - 1);
      if (ones(bits) > n) return Eight{};
      const uint64_t filled = filled_up(bits, n);
      eight.slots = uint8_t(eight.slots | filled << (group * m));
      eight.code = uint8_t(uint32_t(eight.code) << code_bits(n, m) | uint32_t(code_of(filled, n, m)));
    }
    return placed(eight);
  }
  Eight by_codes(uint32_t codes, int n, int m) const {
    Eight eight{};
    for (int group = 0; group < together; group++) {
      const uint64_t found = slots_of(codes >> (group * code_bits(n, m)) & ((1u << code_bits(n, m)) - 1), n, m);
      if (!found) return Eight{};
      eight.slots = uint8_t(eight.slots | found << (group * m));
    }
    return placed(eight);
  }
  static Eight placed(Eight eight) {
    int slot = 0;
    for (int i = 0; i < 8; i++)
      if (eight.slots >> i & 1) eight.at[slot++] = uint8_t(i);
    return eight;
  }
};

constexpr int64_t kPastCache = 4 << 20;  // bytes of a weight that is written around the caches

inline bool has_table(int m) { return m == 2 || m == 4 || m == 8; }

// Whole groups that lie end to end. Returns how many hold too many.
template <class T>
int64_t compress_groups(const T* weight, int64_t groups, int n, int m, const Table* table, T*& values, CodeWriter& codes) {
  int64_t crowded = 0, group = 0;
  for (; table && group + table->together <= groups; group += table->together, weight += 8) {
    const Eight& eight = table->of[nonzero8(weight, T(~T(0)))];
    if (!eight.slots) break;
    for (int slot = 0; slot < table->slots; slot++) values[slot] = weight[eight.at[slot]];
    values += table->slots;
    codes.put(eight.code, table->bits);
  }
  const int bits = code_bits(n, m);
  for (; group < groups; group++, weight += m) {
    const uint64_t found = nonzero64(weight, m, T(~T(0)));
    if (ones(found) > n) {
      crowded++;
      continue;
    }
    const uint64_t slots = filled_up(found, n);
    codes.put(code_of(slots, n, m), bits);
    for (uint64_t left = slots; left; left &= left - 1) *values++ = weight[__builtin_ctzll(left)];
  }
  return crowded;
}

// Groups [first, last) of a weight, counted row by row; `first` is a multiple of 8. Returns how many hold too many: where
// there are any, what was written means nothing.
template <class T>
int64_t compress_of(const Compressed& c, const Table* table, int64_t first, int64_t last) {
  const int64_t in_row = (c.length + c.m - 1) / c.m;
  T* values = (T*)c.values + first * c.n;
  CodeWriter codes{c.indices + first * code_bits(c.n, c.m) / 8, 0, 0};
  int64_t crowded = 0;
  for (int64_t group = first; group < last;) {
    const int64_t row = group / in_row, at = group % in_row, some = in_row - at < last - group ? in_row - at : last - group;
    const T* weight = (const T*)c.weight + row * c.length + at * c.m;
    const int64_t members = c.length - at * c.m < some * c.m ? c.length - at * c.m : some * c.m, whole = members / c.m;
    crowded += compress_groups(weight, whole, c.n, c.m, table, values, codes);
    if (whole < some) {
      T last_group[kLargestGroup] = {};
      for (int64_t i = 0; i < members % c.m; i++) last_group[i] = weight[whole * c.m + i];
      crowded += compress_groups(last_group, 1, c.n, c.m, nullptr, values, codes);
    }
    group += some;
  }
  codes.finish();
  return crowded;
}

// The same of what `prune` would leave, some groups at a time: they are in the cache when they are compressed.
template <class T, class Bits>
int64_t compress_pruned(const Compressed& c, const Table* table, int64_t first, int64_t last) {
  const Groups g{c.rows, c.length, 1, c.n, c.m};
  const int64_t together = kThroughBuffer / c.m / 8 * 8;
  Bits pruned[kThroughBuffer];
  int64_t crowded = 0;
  for (int64_t group = first; group < last; group += together) {
    const int64_t end = group + together < last ? group + together : last;
    each_group(g, c.weight, pruned, c.pruned_as, Pruned<Bits>{}, group, end);
    Compressed some = c;
    some.weight = (T*)pruned - start_of(g, group);
    crowded += compress_of<T>(some, table, group, end);
  }
  return crowded;
}

// Whether zeros among the values lie in the lowest slots that they could: `slots` of one group.
template <class T>
inline bool spare_are_lowest(const T* values, uint64_t slots, int n) {
  uint64_t found = 0;
  for (uint64_t left = slots; left; left &= left - 1) found |= *values++ ? left & (~left + 1) : 0;
  return filled_up(found, n) == slots;
}

template <class T>
inline bool none_is_zero(const T* values, int64_t count) {
  T zero = 0;
  for (int64_t i = 0; i < count; i++) zero = T(zero | T(values[i] == 0));
  return !zero;
}

// Eight members from `slots` values.
template <class T>
inline void expand8(const T* values, int slots, const Eight& eight, T* to, bool past_cache) {
#if defined(__AVX512F__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) {
    const __m256i v = slots == 4 ? _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)values))
                                 : _mm256_maskz_loadu_epi32(__mmask8((1u << slots) - 1), values);
    const __m256i members = _mm256_maskz_expand_epi32(eight.slots, v);
    if (past_cache) _mm256_stream_si256((__m256i*)to, members);
    else _mm256_storeu_si256((__m256i*)to, members);
    return;
  }
#endif
  (void)past_cache;
  for (int i = 0; i < 8; i++) to[i] = 0;
  for (int slot = 0; slot < slots; slot++) to[eight.at[slot]] = values[slot];
}

// Whole groups to memory end to end, or, for null, only looked at. Returns whether they keep every rule. `past_cache`: what
// is written is large, and not read soon.
template <class T>
bool expand_groups(const T*& values, CodeReader& codes, int64_t groups, int n, int m, const Table* table, T* to, bool past_cache) {
  constexpr int kSteps = 256;
  int64_t group = 0;
  uint8_t code[kSteps];
  while (table && group + table->together <= groups) {
    const int64_t left = (groups - group) / table->together;
    const int steps = int(left < kSteps ? left : kSteps);
    if (table->bits == 8 && codes.at % 8 == 0) {
      __builtin_memcpy(code, codes.from + codes.at / 8, size_t(steps));
      codes.at += 8 * steps;
    } else {
      for (int i = 0; i < steps; i++) code[i] = uint8_t(codes.next(table->bits));
    }
    bool sound = true;
    for (int i = 0; i < steps; i++) sound &= table->of[code[i]].slots != 0;
    if (!sound) return false;
    if (!none_is_zero(values, int64_t(steps) * table->slots))
      for (int i = 0; i < steps * table->together; i++)
        if (!spare_are_lowest(values + i * n, table->of[code[i / table->together]].slots >> (i % table->together * m) & ((1u << m) - 1), n))
          return false;
    for (int i = 0; to && i < steps; i++) expand8(values + i * table->slots, table->slots, table->of[code[i]], to + 8 * i, past_cache);
    values += steps * table->slots;
    to = to ? to + 8 * steps : to;
    group += steps * table->together;
  }
  const int bits = code_bits(n, m);
  for (; group < groups; group++) {
    const uint64_t slots = slots_of(codes.next(bits), n, m);
    if (!slots || !spare_are_lowest(values, slots, n)) return false;
    if (to) {
      for (int i = 0; i < m; i++) to[i] = 0;
      for (uint64_t left = slots; left; left &= left - 1) to[__builtin_ctzll(left)] = *values++;
      to += m;
    } else {
      values += n;
    }
  }
  return true;
}

// Groups [first, last), counted row by row; `first` is a multiple of 8. Where the weight is null nothing is written. Returns
// whether values and indices are what `compress` makes.
template <class T>
bool expand_of(const Compressed& c, int64_t first, int64_t last) {
  const int64_t in_row = (c.length + c.m - 1) / c.m, bits = code_bits(c.n, c.m), all = c.rows * in_row;
  const bool tabled = has_table(c.m), past_cache = c.rows * c.length * c.bytes >= kPastCache && intptr_t(c.weight) % 32 == 0;
  const Table table(c.n, tabled ? c.m : 1, tabled);
  const T* values = (const T*)c.values + first * c.n;
  CodeReader codes{c.indices, (all * bits + 7) / 8, first * bits};
  for (int64_t group = first; group < last;) {
    const int64_t row = group / in_row, at = group % in_row, some = in_row - at < last - group ? in_row - at : last - group;
    T* to = c.weight ? (T*)c.weight + row * c.length + at * c.m : nullptr;
    const int64_t members = c.length - at * c.m < some * c.m ? c.length - at * c.m : some * c.m, whole = members / c.m;
    if (!expand_groups(values, codes, whole, c.n, c.m, tabled ? &table : nullptr, to, past_cache && intptr_t(to) % 32 == 0)) return false;
    if (whole < some) {
      T last_group[kLargestGroup];
      const T* of_last = values;
      if (!expand_groups(of_last, codes, 1, c.n, c.m, nullptr, last_group, false)) return false;
      values = of_last;
      for (int64_t i = members % c.m; i < c.m; i++)
        if (last_group[i]) return false;
      for (int64_t i = 0; to && i < members % c.m; i++) to[whole * c.m + i] = last_group[i];
    }
    group += some;
  }
#if defined(__AVX512F__)
  if (past_cache) _mm_sfence();
#endif
  return last < all || all * bits % 8 == 0 || c.indices[all * bits / 8] >> (all * bits % 8) == 0;
}

int64_t compress(const Compressed& c, int64_t first, int64_t last) {
  const bool tabled = has_table(c.m);
  const Table of_all(c.n, tabled ? c.m : 1, false);
  const Table* table = tabled ? &of_all : nullptr;
  if (c.pruned_as == kFloat32) return compress_pruned<uint32_t, int32_t>(c, table, first, last);
  if (c.pruned_as != kAsItIs) return compress_pruned<uint16_t, int16_t>(c, table, first, last);
  switch (c.bytes) {
    case 1: return compress_of<uint8_t>(c, table, first, last);
    case 2: return compress_of<uint16_t>(c, table, first, last);
    case 4: return compress_of<uint32_t>(c, table, first, last);
    default: return compress_of<uint64_t>(c, table, first, last);
  }
}

bool expand(const Compressed& c, int64_t first, int64_t last) {
  switch (c.bytes) {
    case 1: return expand_of<uint8_t>(c, first, last);
    case 2: return expand_of<uint16_t>(c, first, last);
    case 4: return expand_of<uint32_t>(c, first, last);
    default: return expand_of<uint64_t>(c, first, last);
  }
}

// `groups` groups that begin at input `first` of a tile: what is in their slots, and where.
template <class T>
int64_t slots_of_groups(const Slots& s, const T* weight, int64_t groups, int64_t first, const Table* table, T*& values,
                        uint16_t*& offsets) {
  int64_t group = 0, crowded = 0;
  const auto place = [&](int64_t at) {
    *values++ = weight[at];
    *offsets++ = uint16_t((first + at) * s.step);
  };
  for (; table && group + table->together <= groups; group += table->together, weight += 8, first += 8) {
    const Eight& eight = table->of[nonzero8(weight, T(s.counted))];
    if (!eight.slots) break;
    for (int slot = 0; slot < table->slots; slot++) place(eight.at[slot]);
  }
  for (; group < groups; group++, weight += s.m, first += s.m) {
    const uint64_t found = nonzero64(weight, s.m, T(s.counted));
    crowded += ones(found) > s.n;
    uint64_t left = filled_up(found, s.n);
    for (int slot = 0; slot < s.n; slot++, left &= left - 1) place(__builtin_ctzll(left));
  }
  return crowded;
}

// Rows [first, last). Returns how many groups hold too many.
template <class T>
int64_t slots_of_rows(const Slots& s, int64_t first, int64_t last) {
  const bool tabled = has_table(s.m);
  const Table table(s.n, tabled ? s.m : 1, false);
  int64_t crowded = 0, before = 0;
  for (int64_t start = 0; start < s.length; start += s.tile) {
    const int64_t members = s.length - start < s.tile ? s.length - start : s.tile, whole = members / s.m;
    const int64_t slots = (members + s.m - 1) / s.m * s.n, stored = slots + (s.even ? slots % 2 : 0);
    for (int64_t row = first; row < last; row++) {
      const T* weight = (const T*)s.weight + row * s.length + start;
      T* values = (T*)s.values + before + row * stored;
      uint16_t* offsets = s.offsets + before + row * stored;
      crowded += slots_of_groups(s, weight, whole, 0, tabled ? &table : nullptr, values, offsets);
      if (members % s.m) {
        T last_group[kLargestGroup] = {};
        for (int64_t i = 0; i < members % s.m; i++) last_group[i] = weight[whole * s.m + i];
        crowded += slots_of_groups(s, last_group, 1, whole * s.m, nullptr, values, offsets);
      }
      if (stored > slots) *values = 0, *offsets = 0;
    }
    before += s.rows * stored;
  }
  return crowded;
}

int64_t slots(const Slots& s, int64_t first, int64_t last) {
  return s.bytes == 2 ? slots_of_rows<uint16_t>(s, first, last) : slots_of_rows<uint32_t>(s, first, last);
}
