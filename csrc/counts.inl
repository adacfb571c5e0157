// What is told of weights: how many are in use, in how many groups too many, and how much of their squares a mask keeps.

// Of groups whose weights have any `counted` bit set.
struct Counts {
  int64_t nonzero, crowded;
  int32_t most, n;

  void add(int count) {
    nonzero += count;
    crowded += count > n;
    most = count > most ? count : most;
  }
};

// Groups [first, last) that lie end to end.
template <class T>
void count_neighbours(const Groups& g, const T* weight, T counted, int64_t first, int64_t last, Counts& counts) {
  const int64_t in_row = groups_of(g);
  const bool tabled = g.m == 2 || g.m == 4 || g.m == 8;
  for (int64_t group = first; group < last;) {
    const int64_t at = group % in_row, some = in_row - at < last - group ? in_row - at : last - group;
    const T* from = weight + start_of(g, group);
    int64_t left = g.length - at * g.m < some * g.m ? g.length - at * g.m : some * g.m;
    for (; tabled && left >= 8; left -= 8, from += 8) {
      const uint32_t bits = nonzero8(from, counted);
      for (int i = 0; i < 8; i += g.m) counts.add(ones(bits >> i & ((1u << g.m) - 1)));
    }
    for (; left > 0; left -= g.m, from += g.m) counts.add(ones(nonzero64(from, int(left < g.m ? left : g.m), counted)));
    group += some;
  }
}

// Groups [first, last) whose members are `inner` weights apart: some columns at a time.
template <class T>
void count_columns(const Groups& g, const T* weight, T counted, int64_t first, int64_t last, Counts& counts) {
  constexpr int64_t kSome = 512;
  uint8_t found[kSome];
  for (int64_t group = first; group < last; group++) {
    const int64_t left = g.length - group % groups_of(g) * g.m, members = left < g.m ? left : g.m;
    for (int64_t r = 0; r < g.inner; r += kSome) {
      const int64_t columns = g.inner - r < kSome ? g.inner - r : kSome;
      const T* from = weight + start_of(g, group) + r;
      for (int64_t c = 0; c < columns; c++) found[c] = 0;
      for (int64_t i = 0; i < members; i++, from += g.inner)
        for (int64_t c = 0; c < columns; c++) found[c] = uint8_t(found[c] + ((from[c] & counted) != 0));
      for (int64_t c = 0; c < columns; c++) counts.add(found[c]);
    }
  }
}

template <class T>
void count_of(const Groups& g, const void* weight, uint64_t counted, int64_t first, int64_t last, int64_t* to) {
  Counts counts{0, 0, 0, g.n};
  if (g.inner == 1) count_neighbours(g, (const T*)weight, T(counted), first, last, counts);
  else count_columns(g, (const T*)weight, T(counted), first, last, counts);
  to[0] = counts.nonzero, to[1] = counts.crowded, to[2] = counts.most;
}

// Non-zero weights, groups with more than n of them, and the most in a group.
void count_groups(const Groups& g, int32_t bytes, uint64_t counted, const void* weight, int64_t first, int64_t last, int64_t* to) {
  switch (bytes) {
    case 1: return count_of<uint8_t>(g, weight, counted, first, last, to);
    case 2: return count_of<uint16_t>(g, weight, counted, first, last, to);
    case 4: return count_of<uint32_t>(g, weight, counted, first, last, to);
    default: return count_of<uint64_t>(g, weight, counted, first, last, to);
  }
}

double sum_of_squares(const float* x, int64_t count) {
  constexpr int kWide = VECTOR_BYTES / 8;
  typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
  typedef float Floats __attribute__((vector_size(VECTOR_BYTES / 2)));
  Doubles sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWide <= count; i += 4 * kWide)
    for (int j = 0; j < 4; j++) {
      Floats some;
      __builtin_memcpy(&some, x + i + j * kWide, sizeof some);
      const Doubles wide = __builtin_convertvector(some, Doubles);
      sums[j] += wide * wide;
    }
  const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int l = 0; l < kWide; l++) sum += all[l];
  for (; i < count; i++) sum += double(x[i]) * double(x[i]);
  return sum;
}

inline double squares_of(const int32_t* weights, int64_t count) { return sum_of_squares((const float*)weights, count); }
inline double squares_of(const int16_t* weights, int64_t count) {  // bfloat16
  constexpr int64_t kSome = 1024;
  float wide[kSome];
  double sum = 0;
  for (int64_t at = 0; at < count; at += kSome) {
    const int64_t some = count - at < kSome ? count - at : kSome;
    for (int64_t i = 0; i < some; i++) wide[i] = from_bfloat16(uint16_t(weights[at + i]));
    sum += sum_of_squares(wide, some);
  }
  return sum;
}

template <class T>
void retained_of(const Groups& g, const void* weight, int32_t dtype, int64_t first, int64_t last, double* sums) {
  T pruned[kThroughBuffer];
  const T* all = (const T*)weight;
  through_buffer(g, weight, dtype, Pruned<T>{}, pruned, first, last, [&](int64_t at, int64_t from, int64_t weights) {
    sums[0] += squares_of(pruned + from, weights);
    sums[1] += squares_of(all + at, weights);
  });
}

// The sums of squares of the weights of groups [first, last) that are kept, and of all. float32 and bfloat16.
void retained(const Groups& g, int32_t dtype, const void* weight, int64_t first, int64_t last, double* sums) {
  sums[0] = sums[1] = 0;
  if (dtype == kFloat32) retained_of<int32_t>(g, weight, dtype, first, last, sums);
  else retained_of<int16_t>(g, weight, dtype, first, last, sums);
}
