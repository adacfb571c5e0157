// Masks by counting: a weight is kept when fewer than N others of its group beat it. Equal magnitudes keep the lower
// index, NaN counts as largest: exactly openwork/nm/masks.py. Everything works on the bits of the weights; magnitudes are
// compared as integers, which order as the floats do.
//
// A column is the members of one group, `inner` weights apart in memory. A vector holds one member of several columns.
// Three ways to fill it, all followed by the same counting; a sink then says what is written:
//   neighbours   inner >= lanes: columns that lie side by side (kernels of a convolution)
//   interleaved  inner == 1: groups that lie end to end, separated by shuffles (linear layers)
//   scattered    what is left over is collected column by column until there is a vector of it

constexpr int kLargestGroup = 64;

template <class T, int BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef T in_memory __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = BYTES / int(sizeof(T));
};

// The bits of a float other than the sign; infinity plus one, which every NaN counts as.
template <class T> constexpr T kMagnitude = T(~(T(1) << (8 * sizeof(T) - 1)));
inline int32_t nan_key(int32_t dtype) {
  return dtype == kFloat32 ? 0x7f800001 : dtype == kBFloat16 ? 0x7f81 : 0x7c01;
}

// f(0), ..., f(m - 1). M is m, and then arrays become registers, or 0 where m is only known at run time.
template <int M, class F>
inline __attribute__((always_inline)) void each(int m, const F& f) {
  if constexpr (M) unrolled<M>(f);
  else for (int i = 0; i < m; i++) f(i);
}

// weight[i] in, keep[i] out, all bits set where kept.
template <int M, class T, class V>
inline __attribute__((always_inline)) void count(const V* weight, V* keep, T nan, int n, int m) {
  if (M) m = M;
  V key[M ? M : kLargestGroup];
  each<M>(m, [&](auto i) {
    const V magnitude = weight[i] & (V{} + kMagnitude<T>);
    key[i] = magnitude < V{} + nan ? magnitude : V{} + nan;  // the minimum
  });
  if (n == 1) {  // the first that equals the largest
    V largest = key[0], taken{};
    each<M>(m, [&](auto i) { largest = largest > key[i] ? largest : key[i]; });
    each<M>(m, [&](auto i) {
      keep[i] = V(key[i] == largest) & ~taken;
      taken |= keep[i];
    });
    return;
  }
  if (m > 8 && 4 * n <= m) {  // a few of many: one after another, each of which becomes -1
    for (int times = 0; times < n; times++) {
      V largest = key[0], taken{};
      each<M>(m, [&](auto i) { largest = largest > key[i] ? largest : key[i]; });
      each<M>(m, [&](auto i) {
        const V equal = V(key[i] == largest);
        key[i] |= equal & ~taken;
        taken |= equal;
      });
    }
    each<M>(m, [&](auto i) { keep[i] = key[i] >> (8 * sizeof(T) - 1); });
    return;
  }
  if (M == 4 && n == 2) {  // both of one pair, or the larger of each
    const V second = V(key[1] > key[0]), fourth = V(key[3] > key[2]);
    const V high = key[0] > key[1] ? key[0] : key[1], low = key[0] < key[1] ? key[0] : key[1];
    const V last_high = key[2] > key[3] ? key[2] : key[3], last_low = key[2] < key[3] ? key[2] : key[3];
    const V not_both = V(last_high > low), last_both = V(last_low > high);
    keep[0] = ~(not_both & (second | last_both));
    keep[1] = ~(not_both & ~(second & ~last_both));
    keep[2] = last_both | ~(fourth | ~not_both);
    keep[3] = last_both | (fourth & not_both);
    return;
  }
  if (M == 2 || M == 4) {  // each pair compared once
    V lost[M ? M : 1];
    for (int i = 0; i < m; i++) lost[i] = V{} + T(i);  // beaten by all before it, until it beats them
    for (int i = 0; i < m; i++)
      for (int j = i + 1; j < m; j++) {
        const V later_wins = V(key[j] > key[i]);  // -1 where true
        lost[i] -= later_wins;
        lost[j] += later_wins;
      }
    for (int i = 0; i < m; i++) keep[i] = V(lost[i] < V{} + T(n));
    return;
  }
  each<M>(m, [&](auto i) {  // twice as many comparisons, but one sum in a register
    V lost = V{} + T(i);
    each<M>(m, [&](auto j) {
      if (j < i) lost += V(key[i] > key[j]);
      else if (j > i) lost -= V(key[j] > key[i]);
    });
    keep[i] = V(lost < V{} + T(n));
  });
}

template <int BYTES, class T>
inline typename Vector<T, BYTES>::type load(const T* from) {
  return *(const typename Vector<T, BYTES>::in_memory*)from;
}

template <int BYTES, class T>
inline void store(T* to, typename Vector<T, BYTES>::type v) {
  *(typename Vector<T, BYTES>::in_memory*)to = v;
}

// Within each piece of two vectors: the even members side by side, the odd ones, and the inverse of both.
enum Half { kEven, kOdd, kLow, kHigh };

template <int LANES, int PIECE>
constexpr int source(Half half, int l) {
  const int base = l / PIECE * PIECE, at = l % PIECE, middle = PIECE / 2;
  const int second = half < kLow ? at >= middle : at % 2;  // which of the two vectors
  const int within = half < kLow ? at % middle * 2 + (half == kOdd) : at / 2 + (half == kHigh ? middle : 0);
  return base + within + second * LANES;
}

template <Half HALF, class T, int BYTES, int PIECE, int... L>
inline typename Vector<T, BYTES>::type shuffled(typename Vector<T, BYTES>::type a, typename Vector<T, BYTES>::type b,
                                                std::integer_sequence<int, L...>) {
  constexpr int lanes = Vector<T, BYTES>::lanes;
#ifdef __clang__
  return __builtin_shufflevector(a, b, source<lanes, PIECE>(HALF, L)...);
#else
  return __builtin_shuffle(a, b, typename Vector<T, BYTES>::type{T(source<lanes, PIECE>(HALF, L))...});
#endif
}

template <Half HALF, class T, int BYTES, int PIECE = 16 / int(sizeof(T))>
inline typename Vector<T, BYTES>::type shuffled(typename Vector<T, BYTES>::type a, typename Vector<T, BYTES>::type b) {
  return shuffled<HALF, T, BYTES, PIECE>(a, b, std::make_integer_sequence<int, Vector<T, BYTES>::lanes>());
}

// Vectors are sorted in pieces of 16 bytes where groups are within them, since then the shuffles are the fastest.
template <int M, class T, int BYTES>
constexpr int piece_of = M && M * sizeof(T) <= 16 ? 16 / int(sizeof(T)) : Vector<T, BYTES>::lanes;

// Groups of M end to end, M a power of two -> member i of each group in v[i], and back.
template <int M, class T, int BYTES>
inline void separate(typename Vector<T, BYTES>::type* v, int m) {
  constexpr int piece = piece_of<M, T, BYTES>;
  if (M) m = M;
  typename Vector<T, BYTES>::type sorted[M ? M : kLargestGroup];
  for (int width = 1; width < m; width *= 2) {
    for (int i = 0; i < m / 2; i++) {
      sorted[i] = shuffled<kEven, T, BYTES, piece>(v[2 * i], v[2 * i + 1]);
      sorted[m / 2 + i] = shuffled<kOdd, T, BYTES, piece>(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < m; i++) v[i] = sorted[i];
  }
}

template <int M, class T, int BYTES>
inline void interleave(typename Vector<T, BYTES>::type* v, int m) {
  constexpr int piece = piece_of<M, T, BYTES>;
  if (M) m = M;
  typename Vector<T, BYTES>::type merged[M ? M : kLargestGroup];
  for (int width = 1; width < m; width *= 2) {
    for (int i = 0; i < m / 2; i++) {
      merged[2 * i] = shuffled<kLow, T, BYTES, piece>(v[i], v[m / 2 + i]);
      merged[2 * i + 1] = shuffled<kHigh, T, BYTES, piece>(v[i], v[m / 2 + i]);
    }
    for (int i = 0; i < m; i++) v[i] = merged[i];
  }
}

// Sinks: what is written for a weight and whether it is kept, one by one or a vector.
template <class T>
struct Bytes {  // the mask, one byte a weight, 1 where kept
  typedef T Weight;
  typedef uint8_t Out;
  static constexpr bool once = false;
  void one(Out* to, T, bool kept) const { *to = kept; }
  template <int BYTES>
  void vector(Out* to, typename Vector<T, BYTES>::type, typename Vector<T, BYTES>::type kept) const {
    typedef Vector<T, BYTES> W;
    typedef uint8_t Narrow __attribute__((vector_size(W::lanes)));
    // In two steps, since gcc 12 takes one from 32 bits to 8 member by member.
    const auto halves = __builtin_convertvector(kept, typename Vector<int16_t, 2 * W::lanes>::type);
    const Narrow bytes = __builtin_convertvector(halves, Narrow) & (Narrow{} + uint8_t(1));
    __builtin_memcpy(to, &bytes, sizeof bytes);
  }
};

template <class T>
struct Pruned {  // the weight where kept, else +0.0
  typedef T Weight;
  typedef T Out;
  static constexpr bool once = false;
  void one(Out* to, T weight, bool kept) const { *to = kept ? weight : T(0); }
  template <int BYTES>
  void vector(Out* to, typename Vector<T, BYTES>::type weight,
              typename Vector<T, BYTES>::type kept) const {
    store<BYTES>(to, weight & kept);
  }
};

struct Decayed {  // float32: the gradient plus rate * weight where pruned, each operation rounded
  typedef int32_t Weight;
  typedef int32_t Out;
  static constexpr bool once = true;
  float rate;
  int64_t gradient;  // where it is, in weights from where the sum goes; 0 is in place
  void one(Out* to, int32_t weight, bool kept) const {
    const float term = kept ? 0.0f : float_of(uint32_t(weight)) * rate;
    *to = int32_t(bits_of(float_of(uint32_t(to[gradient])) + term));
  }
  template <int BYTES>
  void vector(Out* to, typename Vector<int32_t, BYTES>::type weight,
              typename Vector<int32_t, BYTES>::type kept) const {
    typedef typename Vector<int32_t, BYTES>::type V;
    typedef typename Vector<float, BYTES>::type Floats;
    const Floats term = (Floats)((V)((Floats)weight * rate) & ~kept);
    store<BYTES>(to, (V)((Floats)load<BYTES>(to + gradient) + term));
  }
};

// Columns [0, columns) of one block of `members` rows: `inner` apart in the weight, `wide` apart in what is written.
template <class Sink>
struct Block {
  const typename Sink::Weight* weight;
  int64_t inner;
  int members;
  int64_t columns;
  typename Sink::Out* to;
  int64_t wide;
};

// Collects columns from anywhere until there is a vector of them.
template <class Sink>
struct Scattered {
  typedef typename Sink::Weight T;
  typedef typename Vector<T, VECTOR_BYTES>::type V;
  static constexpr int lanes = Vector<T, VECTOR_BYTES>::lanes;
  const Sink& sink;
  T nan;
  int n;
  int members, waiting;
  int64_t inner, wide;
  const T* weight[lanes];
  typename Sink::Out* to[lanes];

  Scattered(const Sink& sink, T nan, int n) : sink(sink), nan(nan), n(n), members(0), waiting(0), inner(0), wide(0) {}

  void add(const Block<Sink>& b, int64_t column) {
    if (b.members != members || b.inner != inner || b.wide != wide) finish();
    members = b.members, inner = b.inner, wide = b.wide;
    weight[waiting] = b.weight + column;
    to[waiting++] = b.to + column;
    if (waiting == lanes) finish();
  }

  __attribute__((noinline)) void finish() {
    V values[kLargestGroup] = {}, kept[kLargestGroup];
    for (int i = 0; waiting && i < members; i++)
      for (int l = 0; l < waiting; l++) values[i][l] = weight[l][i * inner];
    if (waiting && members == 4) count<4>(values, kept, nan, n, members);
    else if (waiting) count<0>(values, kept, nan, n, members);
    for (int l = 0; l < waiting; l++)
      for (int i = 0; i < members; i++) sink.one(to[l] + i * wide, values[i][l], kept[i][l] != 0);
    waiting = 0;
  }
};

// All columns of a block that is at least one vector of BYTES wide. The last vector ends with the last column, so some
// columns are seen twice: where a sink may not see them twice, what it wrote at first is put back.
template <int M, int BYTES, class Sink>
void neighbours(const Block<Sink>& b, const Scattered<Sink>& rest) {
  typedef Vector<typename Sink::Weight, BYTES> W;
  typename W::type values[M ? M : kLargestGroup], kept[M ? M : kLargestGroup], lane;
  const int m = M ? M : b.members;
  for (int l = 0; l < W::lanes; l++) lane[l] = l;
  for (int64_t next = 0; next < b.columns; next += W::lanes) {
    const int64_t r = next + W::lanes <= b.columns ? next : b.columns - W::lanes;
    for (int i = 0; i < m; i++) values[i] = load<BYTES>(b.weight + r + i * b.inner);
    count<M>(values, kept, rest.nan, rest.n, m);
    for (int i = 0; i < m; i++) {
      typename Sink::Out* to = b.to + r + i * b.wide;
      if constexpr (Sink::once)
        if (r != next) {
          const typename W::type seen = lane < (typename W::type{} + typename Sink::Weight(next - r));
          const typename W::type before = load<BYTES>(to) & seen;
          rest.sink.template vector<BYTES>(to, values[i], kept[i]);
          store<BYTES>(to, before | (load<BYTES>(to) & ~seen));
          continue;
        }
      rest.sink.template vector<BYTES>(to, values[i], kept[i]);
    }
  }
}

template <int M, class Sink>
void whole_block_of(const Block<Sink>& b, Scattered<Sink>& rest) {
  constexpr int size = sizeof(typename Sink::Weight);
  if (b.columns * size >= VECTOR_BYTES) return neighbours<M, VECTOR_BYTES>(b, rest);
  if (VECTOR_BYTES > 32 && b.columns * size >= 32) return neighbours<M, 32>(b, rest);
  if (VECTOR_BYTES > 16 && b.columns * size >= 16) return neighbours<M, 16>(b, rest);
  for (int64_t r = 0; r < b.columns; r++) rest.add(b, r);
}

template <class Sink>
void whole_block(const Block<Sink>& b, Scattered<Sink>& rest) {
  switch (b.members) {
    case 4: return whole_block_of<4>(b, rest);
    case 8: return whole_block_of<8>(b, rest);
    case 16: return whole_block_of<16>(b, rest);
    default: return whole_block_of<0>(b, rest);
  }
}

// As many whole vectors of groups that lie end to end as there are in `weights`; returns where the rest begins.
template <int M, class Sink>
int64_t interleaved(const typename Sink::Weight* weight, int64_t weights, typename Sink::Out* to, int m,
                    const Scattered<Sink>& rest) {
  typedef typename Sink::Weight T;
  typedef Vector<T, VECTOR_BYTES> W;
  if (M) m = M;
  typename W::type v[M ? M : kLargestGroup], kept[M ? M : kLargestGroup];
  int64_t at = 0;
  for (; at + int64_t(m) * W::lanes <= weights; at += int64_t(m) * W::lanes) {
    for (int i = 0; i < m; i++) v[i] = load<VECTOR_BYTES>(weight + at + i * W::lanes);
    separate<M, T, VECTOR_BYTES>(v, m);
    count<M>(v, kept, rest.nan, rest.n, m);
    interleave<M, T, VECTOR_BYTES>(kept, m);
    for (int i = 0; i < m; i++) {
      const int64_t here = at + i * W::lanes;
      rest.sink.template vector<VECTOR_BYTES>(to + here, load<VECTOR_BYTES>(weight + here), kept[i]);
    }
  }
  return at;
}

template <class Sink>
int64_t interleaved_of_any_size(const typename Sink::Weight* weight, int64_t weights, typename Sink::Out* to, int m,
                                const Scattered<Sink>& rest) {
  switch (m) {
    case 2: return interleaved<2>(weight, weights, to, m, rest);
    case 4: return interleaved<4>(weight, weights, to, m, rest);
    case 8: return interleaved<8>(weight, weights, to, m, rest);
    case 16: return interleaved<16>(weight, weights, to, m, rest);
    default: return interleaved<0>(weight, weights, to, m, rest);
  }
}

// Groups [first, last), which are one stretch of memory, to one stretch that begins at `to`.
template <class Sink>
void each_group(const Groups& g, const void* all, typename Sink::Out* to, int32_t dtype, const Sink& sink, int64_t first,
                int64_t last) {
  typedef typename Sink::Weight T;
  const int64_t groups = groups_of(g), start = start_of(g, first);
  const T* weight = (const T*)all + start;
  Scattered<Sink> rest(sink, T(nan_key(dtype)), g.n);
  if (g.inner == 1 && (g.m & (g.m - 1)) == 0 && g.m > 1 && g.length % g.m == 0) {
    const int64_t weights = (last - first) * g.m;
    int64_t at = interleaved_of_any_size(weight, weights, to, g.m, rest);
    for (; at < weights; at += g.m) rest.add({weight + at, 1, g.m, 1, to + at, 1}, 0);
    return rest.finish();
  }
  for (int64_t group = first; group < last; group++) {
    const int64_t at = start_of(g, group) - start, left = g.length - group % groups * g.m;
    whole_block<Sink>({weight + at, g.inner, int(left < g.m ? left : g.m), g.inner, to + at, g.inner}, rest);
  }
  rest.finish();
}

void keep(const Groups& g, int32_t dtype, const void* weight, uint8_t* out, int64_t first, int64_t last) {
  uint8_t* to = out + start_of(g, first);
  if (dtype == kFloat32) each_group(g, weight, to, dtype, Bytes<int32_t>{}, first, last);
  else each_group(g, weight, to, dtype, Bytes<int16_t>{}, first, last);
}

void prune(const Groups& g, int32_t dtype, const void* weight, void* out, int64_t first, int64_t last) {
  const int64_t start = start_of(g, first);
  if (dtype == kFloat32) each_group(g, weight, (int32_t*)out + start, dtype, Pruned<int32_t>{}, first, last);
  else each_group(g, weight, (int16_t*)out + start, dtype, Pruned<int16_t>{}, first, last);
}

// What a sink makes of groups [first, last), in a buffer, some weights at a time: done(at, from, weights) is called with
// where a stretch of weights lies, and where in the buffer.
constexpr int64_t kThroughBuffer = 4096;

template <class Sink, class Done>
void through_buffer(const Groups& g, const void* all, int32_t dtype, const Sink& sink, typename Sink::Out* buffer,
                    int64_t first, int64_t last, const Done& done) {
  const int64_t most = kThroughBuffer / g.m, columns = g.inner < most ? g.inner : most;
  const int64_t together = kThroughBuffer / (g.m * g.inner);
  for (int64_t group = first; together && group < last; group += together) {
    const int64_t end = group + together < last ? group + together : last, at = start_of(g, group);
    each_group(g, all, buffer, dtype, sink, group, end);
    done(at, 0, start_of(g, end) - at);
  }
  typedef typename Sink::Weight T;
  for (int64_t group = first; !together && group < last; group++) {
    const int64_t at = start_of(g, group);
    const int members = int((start_of(g, group + 1) - at) / g.inner);
    for (int64_t r = 0; r < g.inner; r += columns) {
      const int64_t some = r + columns < g.inner ? columns : g.inner - r;
      Scattered<Sink> rest(sink, T(nan_key(dtype)), g.n);
      whole_block<Sink>({(const T*)all + at + r, g.inner, members, some, buffer, some}, rest);
      rest.finish();
      for (int i = 0; i < members; i++) done(at + i * g.inner + r, i * some, some);
    }
  }
}

// bfloat16 goes by way of a mask of bytes: its arithmetic is float32's.
void decay_half(const Groups& g, const uint16_t* weight, const uint16_t* gradient, uint16_t* out, float rate,
                int64_t first, int64_t last) {
  uint8_t mask[kThroughBuffer];
  through_buffer(g, weight, kBFloat16, Bytes<int16_t>{}, mask, first, last, [=, &mask](int64_t at, int64_t from, int64_t weights) {
    for (int64_t i = 0; i < weights; i++) {
      const uint16_t decayed = to_bfloat16(from_bfloat16(weight[at + i]) * rate), term = decayed & (mask[from + i] - 1);
      out[at + i] = to_bfloat16(from_bfloat16(gradient[at + i]) + from_bfloat16(term));
    }
  });
}

// float32 and bfloat16. `out` may be `gradient`.
void decay(const Groups& g, int32_t dtype, const void* weight, const void* gradient, void* out, float rate,
           int64_t first, int64_t last) {
  if (dtype == kBFloat16)
    return decay_half(g, (const uint16_t*)weight, (const uint16_t*)gradient, (uint16_t*)out, rate, first, last);
  const int64_t apart = (int64_t(intptr_t(gradient)) - int64_t(intptr_t(out))) / int64_t(sizeof(float));
  each_group(g, weight, (int32_t*)out + start_of(g, first), dtype, Decayed{rate, apart}, first, last);
}
