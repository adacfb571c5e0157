// Masks by counting: a weight is kept when fewer than N others of its group beat it. Equal magnitudes keep the lower
// index, NaN counts as largest: exactly openwork/masks.py. Everything works on the bits of the weights; magnitudes are
// compared as integers, which order as the floats do.
//
// A column is the members of one group, `inner` weights apart in memory. A vector holds one member of several columns.
// Three ways to fill it, all followed by the same counting, then written as bytes, 1 where kept:
//   neighbours   inner >= lanes: columns that lie side by side (kernels of a convolution)
//   interleaved  inner == 1: groups that lie end to end, separated by shuffles (linear layers)
//   scattered    what is left over is collected column by column until there is a vector of it

constexpr int kLargestGroup = 64;

template <class T, int BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef T in_memory __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = BYTES / int(sizeof(T)), pieces = BYTES / 16, piece = 16 / int(sizeof(T));
};

// The bits of a float other than the sign; infinity plus one, which every NaN counts as.
template <class T> constexpr T kMagnitude = T(~(T(1) << (8 * sizeof(T) - 1)));
inline int32_t nan_key(int32_t dtype) {
  return dtype == kFloat32 ? 0x7f800001 : dtype == kBFloat16 ? 0x7f81 : 0x7c01;
}

// weight[i] in, keep[i] out, all bits set where kept. M is 0 where the group size is only known at run time.
template <int M, class T, class V>
inline void count(const V* weight, V* keep, T nan, int n, int m) {
  if (M) m = M;
  V key[M ? M : kLargestGroup], lost[M ? M : kLargestGroup];
  for (int i = 0; i < m; i++) {
    V magnitude = weight[i] & (V{} + kMagnitude<T>);
    key[i] = magnitude > nan ? V{} + nan : magnitude;
    lost[i] = V{} + T(i);  // beaten by all before it, until it beats them
  }
  for (int i = 0; i < m; i++)
    for (int j = i + 1; j < m; j++) {
      V later_wins = V(key[j] > key[i]);  // -1 where true
      lost[i] -= later_wins;
      lost[j] += later_wins;
    }
  for (int i = 0; i < m; i++) keep[i] = V(lost[i] < V{} + T(n));
}

// A vector from pieces of 16 bytes, `stride` weights apart, and back.
template <int BYTES, class T>
inline typename Vector<T, BYTES>::type load(const T* from, int64_t stride) {
  typedef Vector<T, BYTES> W;
  if (stride == W::piece) return *(const typename W::in_memory*)from;
  typename W::type v;
  for (int p = 0; p < W::pieces; p++) __builtin_memcpy((char*)&v + 16 * p, from + p * stride, 16);
  return v;
}

template <int BYTES, class T>
inline void store(T* to, int64_t stride, typename Vector<T, BYTES>::type v) {
  typedef Vector<T, BYTES> W;
  if (stride == W::piece) {
    *(typename W::in_memory*)to = v;
    return;
  }
  for (int p = 0; p < W::pieces; p++) __builtin_memcpy(to + p * stride, (char*)&v + 16 * p, 16);
}

// Within each piece of 16 bytes, of two vectors: the even members side by side, the odd ones, and the inverse of both.
enum Half { kEven, kOdd, kLow, kHigh };

template <int LANES, int PIECE>
constexpr int source(Half half, int l) {
  const int base = l / PIECE * PIECE, at = l % PIECE, middle = PIECE / 2;
  const int second = half < kLow ? at >= middle : at % 2;  // which of the two vectors
  const int within = half < kLow ? at % middle * 2 + (half == kOdd) : at / 2 + (half == kHigh ? middle : 0);
  return base + within + second * LANES;
}

template <Half HALF, class T, int BYTES, int... L>
inline typename Vector<T, BYTES>::type shuffled(typename Vector<T, BYTES>::type a, typename Vector<T, BYTES>::type b,
                                                std::integer_sequence<int, L...>) {
  typedef Vector<T, BYTES> W;
#ifdef __clang__
  return __builtin_shufflevector(a, b, source<W::lanes, W::piece>(HALF, L)...);
#else
  return __builtin_shuffle(a, b, typename W::type{T(source<W::lanes, W::piece>(HALF, L))...});
#endif
}

template <Half HALF, class T, int BYTES>
inline typename Vector<T, BYTES>::type shuffled(typename Vector<T, BYTES>::type a, typename Vector<T, BYTES>::type b) {
  return shuffled<HALF, T, BYTES>(a, b, std::make_integer_sequence<int, Vector<T, BYTES>::lanes>());
}

// Groups of M end to end, M a power of two -> member i of each group in v[i], and back. Each piece of 16 bytes is sorted
// on its own, so the pieces of a vector hold different stretches of M * piece weights.
template <int M, class T, int BYTES>
inline void separate(typename Vector<T, BYTES>::type* v, int m) {
  if (M) m = M;
  typename Vector<T, BYTES>::type sorted[M ? M : kLargestGroup];
  for (int width = 1; width < m; width *= 2) {
    for (int i = 0; i < m / 2; i++) {
      sorted[i] = shuffled<kEven, T, BYTES>(v[2 * i], v[2 * i + 1]);
      sorted[m / 2 + i] = shuffled<kOdd, T, BYTES>(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < m; i++) v[i] = sorted[i];
  }
}

template <int M, class T, int BYTES>
inline void interleave(typename Vector<T, BYTES>::type* v, int m) {
  if (M) m = M;
  typename Vector<T, BYTES>::type merged[M ? M : kLargestGroup];
  for (int width = 1; width < m; width *= 2) {
    for (int i = 0; i < m / 2; i++) {
      merged[2 * i] = shuffled<kLow, T, BYTES>(v[i], v[m / 2 + i]);
      merged[2 * i + 1] = shuffled<kHigh, T, BYTES>(v[i], v[m / 2 + i]);
    }
    for (int i = 0; i < m; i++) v[i] = merged[i];
  }
}

// One byte a weight, 1 where kept, of a vector whose pieces are `stride` weights apart.
template <int BYTES, class T>
inline void store_bytes(uint8_t* to, int64_t stride, typename Vector<T, BYTES>::type kept) {
  typedef Vector<T, BYTES> W;
  typedef uint8_t Bytes __attribute__((vector_size(W::lanes)));
  const Bytes bytes = __builtin_convertvector(kept, Bytes) & (Bytes{} + uint8_t(1));
  for (int p = 0; p < W::pieces; p++) __builtin_memcpy(to + p * stride, (char*)&bytes + p * W::piece, W::piece);
}

// Columns [0, columns) of one block of `members` rows, `inner` weights apart; the mask's rows are `wide` apart.
template <class T>
struct Block {
  const T* weight;
  int64_t inner;
  int members;
  int64_t columns;
  uint8_t* keep;
  int64_t wide;
};

// Collects columns from anywhere until there is a vector of them.
template <class T>
struct Scattered {
  typedef typename Vector<T, VECTOR_BYTES>::type V;
  static constexpr int lanes = Vector<T, VECTOR_BYTES>::lanes;
  T nan;
  int n;
  int members, waiting;
  int64_t inner, wide;
  const T* weight[lanes];
  uint8_t* keep[lanes];

  Scattered(T nan, int n) : nan(nan), n(n), members(0), waiting(0), inner(0), wide(0) {}

  void add(const Block<T>& b, int64_t column) {
    if (b.members != members || b.inner != inner || b.wide != wide) finish();
    members = b.members, inner = b.inner, wide = b.wide;
    weight[waiting] = b.weight + column;
    keep[waiting++] = b.keep + column;
    if (waiting == lanes) finish();
  }

  __attribute__((noinline)) void finish() {
    V values[kLargestGroup] = {}, kept[kLargestGroup];
    for (int i = 0; waiting && i < members; i++)
      for (int l = 0; l < waiting; l++) values[i][l] = weight[l][i * inner];
    if (waiting && members == 4) count<4>(values, kept, nan, n, members);
    else if (waiting) count<0>(values, kept, nan, n, members);
    for (int l = 0; l < waiting; l++)
      for (int i = 0; i < members; i++) keep[l][i * wide] = kept[i][l] != 0;
    waiting = 0;
  }
};

// From column r as many as fit BYTES; returns the first one left over.
template <int M, int BYTES, class T>
inline int64_t neighbours(const Block<T>& b, T nan, int n, int64_t r) {
  typedef Vector<T, BYTES> W;
  typename W::type values[M ? M : kLargestGroup], kept[M ? M : kLargestGroup];
  const int m = M ? M : b.members;
  for (; r + W::lanes <= b.columns; r += W::lanes) {
    for (int i = 0; i < m; i++) values[i] = load<BYTES>(b.weight + r + i * b.inner, W::piece);
    count<M>(values, kept, nan, n, m);
    for (int i = 0; i < m; i++) store_bytes<BYTES, T>(b.keep + r + i * b.wide, W::piece, kept[i]);
  }
  return r;
}

template <int M, class T>
inline int64_t neighbours_of_any_width(const Block<T>& b, T nan, int n) {
  int64_t r = neighbours<M, VECTOR_BYTES>(b, nan, n, 0);
  if (VECTOR_BYTES > 32) r = neighbours<M, 32>(b, nan, n, r);
  if (VECTOR_BYTES > 16) r = neighbours<M, 16>(b, nan, n, r);
  return r;
}

template <class T>
void keep_block(const Block<T>& b, Scattered<T>& rest) {
  int64_t r = 0;
  switch (b.members) {
    case 4: r = neighbours_of_any_width<4>(b, rest.nan, rest.n); break;
    case 8: r = neighbours_of_any_width<8>(b, rest.nan, rest.n); break;
    default: r = neighbours_of_any_width<0>(b, rest.nan, rest.n);
  }
  for (; r < b.columns; r++) rest.add(b, r);
}

// As many whole vectors of groups that lie end to end as there are in `count` weights; returns where the rest begins.
template <int M, class T>
int64_t interleaved(const T* weight, int64_t weights, uint8_t* keep, int m, T nan, int n) {
  typedef Vector<T, VECTOR_BYTES> W;
  if (M) m = M;
  const bool whole = m <= W::piece;  // a group is within a piece of 16 bytes: vectors may be loaded as they lie
  const int64_t stride = whole ? W::piece : int64_t(m) * W::piece, next = whole ? W::lanes : W::piece;
  typename W::type v[M ? M : kLargestGroup], kept[M ? M : kLargestGroup];
  int64_t at = 0;
  for (; at + int64_t(m) * W::lanes <= weights; at += int64_t(m) * W::lanes) {
    for (int i = 0; i < m; i++) v[i] = load<VECTOR_BYTES>(weight + at + i * next, stride);
    separate<M, T, VECTOR_BYTES>(v, m);
    count<M>(v, kept, nan, n, m);
    interleave<M, T, VECTOR_BYTES>(kept, m);
    for (int i = 0; i < m; i++) store_bytes<VECTOR_BYTES, T>(keep + at + i * next, stride, kept[i]);
  }
  return at;
}

template <class T>
int64_t interleaved_of_any_size(const T* weight, int64_t weights, uint8_t* keep, int m, T nan, int n) {
  switch (m) {
    case 2: return interleaved<2>(weight, weights, keep, m, nan, n);
    case 4: return interleaved<4>(weight, weights, keep, m, nan, n);
    case 8: return interleaved<8>(weight, weights, keep, m, nan, n);
    case 16: return interleaved<16>(weight, weights, keep, m, nan, n);
    default: return interleaved<0>(weight, weights, keep, m, nan, n);
  }
}

// The mask of groups [first, last), which are one stretch of memory, written to one stretch of bytes.
template <class T>
void keep_groups(const Groups& g, const T* weight, uint8_t* keep, T nan, int64_t first, int64_t last) {
  Scattered<T> rest(nan, g.n);
  const int64_t groups = groups_of(g), start = start_of(g, first);
  if (g.inner == 1 && (g.m & (g.m - 1)) == 0 && g.m > 1 && g.length % g.m == 0) {
    const int64_t weights = (last - first) * g.m;
    int64_t at = interleaved_of_any_size(weight + start, weights, keep, g.m, nan, g.n);
    for (; at < weights; at += g.m) rest.add({weight + start + at, 1, g.m, 1, keep + at, 1}, 0);
    return rest.finish();
  }
  for (int64_t group = first; group < last; group++) {
    const int64_t at = start_of(g, group), left = g.length - group % groups * g.m;
    keep_block<T>({weight + at, g.inner, int(left < g.m ? left : g.m), g.inner, keep + (at - start), g.inner}, rest);
  }
  rest.finish();
}

void keep(const Groups& g, int32_t dtype, const void* weight, uint8_t* out, int64_t first, int64_t last) {
  uint8_t* to = out + start_of(g, first);
  if (dtype == kFloat32) keep_groups(g, (const int32_t*)weight, to, nan_key(dtype), first, last);
  else keep_groups(g, (const int16_t*)weight, to, int16_t(nan_key(dtype)), first, last);
}

// Calls use(first weight, mask, weights) for stretches of the groups [first, last), with masks that stay in the cache.
constexpr int64_t kStretch = 8192;

template <class T, class Use>
void each_stretch(const Groups& g, const T* weight, T nan, int64_t first, int64_t last, const Use& use) {
  uint8_t mask[kStretch];
  const int64_t block = int64_t(g.m) * g.inner;
  const int64_t together = kStretch / block;  // groups; 0 where one alone is larger: then some columns at a time
  for (int64_t group = first; together && group < last; group += together) {
    const int64_t end = group + together < last ? group + together : last, at = start_of(g, group);
    keep_groups(g, weight, mask, nan, group, end);
    use(at, mask, start_of(g, end) - at);
  }
  const int64_t columns = kStretch / g.m;
  for (int64_t group = first; !together && group < last; group++) {
    const int64_t at = start_of(g, group);
    const int members = int((start_of(g, group + 1) - at) / g.inner);
    for (int64_t r = 0; r < g.inner; r += columns) {
      const int64_t some = r + columns < g.inner ? columns : g.inner - r;
      Scattered<T> rest(nan, g.n);
      keep_block<T>({weight + at + r, g.inner, members, some, mask, some}, rest);
      rest.finish();
      for (int i = 0; i < members; i++) use(at + i * g.inner + r, mask + i * some, some);
    }
  }
}

template <class T>
void prune_as(const Groups& g, const T* weight, T* out, T nan, int64_t first, int64_t last) {
  each_stretch(g, weight, nan, first, last, [=](int64_t at, const uint8_t* mask, int64_t weights) {
    for (int64_t i = 0; i < weights; i++) out[at + i] = T(weight[at + i] & -T(mask[i]));
  });
}

void prune(const Groups& g, int32_t dtype, const void* weight, void* out, int64_t first, int64_t last) {
  if (dtype == kFloat32) prune_as(g, (const int32_t*)weight, (int32_t*)out, nan_key(dtype), first, last);
  else prune_as(g, (const int16_t*)weight, (int16_t*)out, int16_t(nan_key(dtype)), first, last);
}

// gradient += rate * weight where pruned, each operation rounded to the dtype, as torch does it.
template <int DTYPE, class T>
void decay_as(const Groups& g, const T* weight, T* gradient, float rate, int64_t first, int64_t last) {
  each_stretch(g, weight, T(nan_key(DTYPE)), first, last, [=](int64_t at, const uint8_t* mask, int64_t weights) {
    for (int64_t i = at; i < at + weights; i++) {
      const T decayed = to_bits<DTYPE>(to_float<DTYPE>(weight[i]) * rate), term = T(decayed & (T(mask[i - at]) - 1));
      gradient[i] = to_bits<DTYPE>(to_float<DTYPE>(gradient[i]) + to_float<DTYPE>(term));
    }
  });
}

void decay(const Groups& g, int32_t dtype, const void* weight, void* gradient, float rate, int64_t first, int64_t last) {
  const int16_t* half = (const int16_t*)weight;
  if (dtype == kFloat32) decay_as<kFloat32>(g, (const int32_t*)weight, (int32_t*)gradient, rate, first, last);
  else if (dtype == kBFloat16) decay_as<kBFloat16>(g, half, (int16_t*)gradient, rate, first, last);
  else decay_as<kFloat16>(g, half, (int16_t*)gradient, rate, first, last);
}

int64_t differ(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int64_t bits = 0, at = 0;
  for (; at + 8 <= bytes; at += 8) {
    uint64_t x, y;
    __builtin_memcpy(&x, a + at, 8);
    __builtin_memcpy(&y, b + at, 8);
    bits += __builtin_popcountll(x ^ y);
  }
  for (; at < bytes; at++) bits += __builtin_popcount(a[at] ^ b[at]);
  return bits;
}
