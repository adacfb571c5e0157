// Products whose lanes are outputs and whose inputs are as short as the weights: bfloat16, int8.
//
// A window of inputs fills one vector. For each step a vector of weights, two bfloat16 or four int8 of each output, meets
// the inputs that a permutation picks, and one instruction multiplies and adds them. Weights and indices are loaded once
// for up to kDotsBatch inputs, which share the registers with their sums.

constexpr int kDotsBatch = 12;

inline Float some(const float* from, int64_t count) {  // zeros behind the last
  if (count >= kLanes) return load(from);
  Float v{};
  __builtin_memcpy(&v, from, 4 * count);
  return v;
}

struct Pairs {  // bfloat16
  typedef Float Sum;
  typedef uint16_t Out;
  static constexpr int index_bytes = VECTOR_BYTES / 2;  // of a step: one vector holds the indices of two

  static Sum start(const Dots&, const char*) { return Sum{}; }
  static Sum add(Sum sum, Int x, Int index, Int value) { return add_pairs(sum, pick_pairs(x, index), value); }
  static Int first(const char* index) { return *(const IntInMemory*)index; }
  static Int second(const char* index) {
    typedef uint16_t Words __attribute__((vector_size(VECTOR_BYTES)));
    return (Int)((Words)first(index) >> 8);
  }
  static void finish(const Dots&, int64_t, int64_t, Float sum, Float bias, Activation activation, Out* y) {
    sum = activated(sum + bias, activation);
    for (int l = 0; l < kLanes; l++) y[l] = to_bfloat16(sum[l]);
  }
};

struct Quads {  // int8
  typedef Int Sum;
  typedef float Out;
  static constexpr int index_bytes = VECTOR_BYTES;

  // The instruction takes no negative inputs, so 128 was added to each. What that adds to the sums is taken off first.
  static Sum start(const Dots& d, const char* values) {
    Sum added{};
    for (int64_t step = 0; step < d.windows * d.steps; step++)
      added = add_quads(added, Int{} + int32_t(0x80808080), *(const IntInMemory*)(values + step * VECTOR_BYTES));
    return -added;
  }
  static Sum add(Sum sum, Int x, Int index, Int value) { return add_quads(sum, pick_quads(x, index), value); }
  static Int first(const char* index) { return *(const IntInMemory*)index; }
  static Int second(const char* index) { return first(index + VECTOR_BYTES); }
  static void finish(const Dots& d, int64_t at, int64_t b, Int sum, Float bias, Activation activation, Out* y) {
    const Float scale = some(d.scales + at, d.outputs - at) * broadcast(d.x_scales[b]);
    store(y, activated(__builtin_convertvector(sum, Float) * scale + bias, activation));
  }
};

template <class T, int NB>
void block_of_dots(const Dots& d, int64_t block, int64_t batch, const char* values, const char* indices, typename T::Sum start) {
  constexpr int sums = NB <= 2 ? 2 : 1;  // the steps of one sum alone would wait for one another
  typename T::Sum sum[NB][sums] = {};
  unrolled<NB>([&](auto b) { sum[b][0] = start; });
  const char* x = (const char*)d.x + batch * d.x_stride;
  for (int64_t at = 0; at < d.windows; at++, x += VECTOR_BYTES) {
    Int inputs[NB];
    unrolled<NB>([&](auto b) { inputs[b] = *(const IntInMemory*)(x + b * d.x_stride); });
    const auto step = [&](Int index, auto turn) {
      const Int value = *(const IntInMemory*)values;
      values += VECTOR_BYTES;
      unrolled<NB>([&](auto b) { sum[b][turn % sums] = T::add(sum[b][turn % sums], inputs[b], index, value); });
    };
    int left = d.steps;
    for (; left >= 2; left -= 2, indices += 2 * T::index_bytes) {
      step(T::first(indices), std::integral_constant<int, 0>());
      step(T::second(indices), std::integral_constant<int, 1>());
    }
    if (left) step(T::first(indices), std::integral_constant<int, 0>()), indices += VECTOR_BYTES;
  }
  const int64_t output = block * kLanes, count = d.outputs - output;
  const Float bias = d.bias ? some(d.bias + output, count) : Float{};
  for (int b = 0; b < NB; b++) {
    for (int i = 1; i < sums; i++) sum[b][0] += sum[b][i];
    typename T::Out* y = (typename T::Out*)d.y + (batch + b) * d.y_stride + output;
    typename T::Out all[kLanes];
    T::finish(d, output, batch + b, sum[b][0], bias, d.activation, count < kLanes ? all : y);
    if (count < kLanes) __builtin_memcpy(y, all, count * sizeof *y);
  }
}

template <class T, int NB = kDotsBatch, class... Rest>
void as_many_dots(int64_t count, const Rest&... rest) {
  if constexpr (NB > 1)
    if (count < NB) return as_many_dots<T, NB - 1>(count, rest...);
  block_of_dots<T, NB>(rest...);
}

template <class T>
void dots_of(const Dots& d, int64_t first, int64_t last, int64_t from, int64_t to) {
  for (int64_t block = first; block < last; block++) {
    const char* values = (const char*)d.values + block * d.windows * d.steps * VECTOR_BYTES;
    const int64_t index_bytes = d.steps / 2 * 2 * T::index_bytes + d.steps % 2 * VECTOR_BYTES;  // of a window
    const char* indices = (const char*)d.indices + block * d.windows * index_bytes;
    const typename T::Sum start = T::start(d, values);
    int64_t groups = (to - from + kDotsBatch - 1) / kDotsBatch;  // of nearly the same size
    for (int64_t b = from; b < to; groups--) {
      const int64_t count = (to - b + groups - 1) / groups;
      as_many_dots<T>(count, d, block, b, values, indices, start);
      b += count;
    }
  }
}

void dots(const Dots& d, int32_t dtype, int64_t first, int64_t last, int64_t from, int64_t to) {
  if (dtype == kBFloat16) return dots_of<Pairs>(d, first, last, from, to);
  dots_of<Quads>(d, first, last, from, to);
}

float quantize(const float* x, int64_t count, uint8_t* to, int64_t padded) {
  int32_t largest = 0;  // the bits of magnitudes order as they do, and NaN is above all
  for (int64_t i = 0; i < count; i++) {
    const int32_t magnitude = int32_t(bits_of(x[i]) & 0x7fffffff);
    largest = largest > magnitude ? largest : magnitude;
  }
  const float by = float_of(uint32_t(largest)) / 127, scale = by < kSmallest ? 1 : by;
  for (int64_t i = 0; i < count; i++)  // to the nearest, ties to even, in the low bits of the sum
    to[i] = uint8_t(bits_of(x[i] / scale + 12582912.0f) + 128);
  __builtin_memset(to + count, 128, padded - count);
  return scale;
}
