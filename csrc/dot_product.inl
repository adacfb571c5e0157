// Matmuls whose lanes are outputs and whose inputs are as short as the weights: bfloat16, int8.
//
// A window of inputs fills one vector. For each step a vector of weights, two bfloat16 or four int8 of each output, meets the
// inputs that a permutation picks, and one instruction multiplies and adds them. Weights and indices are loaded once for up to
// kDotProductBatch rows of inputs, which share the registers with their sums. Such groups of rows are packed window by
// window, so that they are read from end to end: rows are often a power of two apart, and then only a few of them stay in the
// cache.

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

  static Sum start(const DotProduct&, const char*) { return Sum{}; }
  static Sum add(Sum sum, Int x, Int index, Int value) { return add_pairs(sum, pick_pairs(x, index), value); }
  static Int first(const char* index) { return *(const IntInMemory*)index; }
  static Int second(const char* index) {
    typedef uint16_t Words __attribute__((vector_size(VECTOR_BYTES)));
    return (Int)((Words)first(index) >> 8);
  }
  static void finish(const DotProduct& d, int64_t, int64_t, Float sum, Float bias, Out* y) {
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    const Bits bits = (Bits)activated(sum + bias, d.activation), upper = bits >> 16;  // as to_bfloat16 of each
    const Bits rounded = (bits + 0x7fff + (upper & 1)) >> 16, nan = (upper & 0x8000) | 0x7fc0;
    const Halves halves = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Halves);
    __builtin_memcpy(y, &halves, sizeof halves);
  }
};

struct Quads {  // int8
  typedef Int Sum;
  typedef float Out;
  static constexpr int index_bytes = VECTOR_BYTES;

  // The instruction takes no negative inputs, so 128 was added to each. What that adds to the sums is taken off first.
  static Sum start(const DotProduct& d, const char* values) {
    Sum added{};
    for (int64_t step = 0; step < d.windows * d.steps; step++)
      added = add_quads(added, Int{} + int32_t(0x80808080), *(const IntInMemory*)(values + step * VECTOR_BYTES));
    return -added;
  }
  static Sum add(Sum sum, Int x, Int index, Int value) { return add_quads(sum, pick_quads(x, index), value); }
  static Int first(const char* index) { return *(const IntInMemory*)index; }
  static Int second(const char* index) { return first(index + VECTOR_BYTES); }
  static void finish(const DotProduct& d, int64_t at, int64_t b, Int sum, Float bias, Out* y) {
    const Float scale = some(d.scales + at, d.outputs - at) * broadcast(d.x_scales[d.pixels ? b / (d.pixels->outH * d.pixels->outW) : b]);
    store(y, activated(__builtin_convertvector(sum, Float) * scale + bias, d.activation));
  }
};

template <class T>
__attribute__((noinline)) void finish_dot_product(const DotProduct& d, int64_t output, int64_t b, typename T::Sum sum) {
  const int64_t count = d.outputs - output;
  const Float bias = d.bias ? some(d.bias + output, count) : Float{};
  typename T::Out *y = (typename T::Out*)d.y + b * d.y_stride + output, all[kLanes];
  T::finish(d, output, b, sum, bias, count < kLanes ? all : y);
  if (count < kLanes) __builtin_memcpy(y, all, count * sizeof *y);
}

// Some outputs: two blocks, or one.
template <class T>
struct Outputs {
  int64_t block;
  const char *values, *indices;
  int64_t between;  // from the first to the second, in values and, where there is one step a window, in indices
  typename T::Sum start[2];

  Outputs(const DotProduct& d, int64_t block, bool two) : block(block), between(d.windows * d.steps * VECTOR_BYTES) {
    values = (const char*)d.values + block * between;
    indices = (const char*)d.indices + block * d.windows * (d.steps / 2 * 2 * T::index_bytes + d.steps % 2 * VECTOR_BYTES);
    for (int i = 0; i <= two; i++) start[i] = T::start(d, values + i * between);
  }
};

// NB rows of a group of `count` that begins at row `group`, from its row `row` on.
template <class T, int BLOCKS, int NB>
void rows_of_dot_product(const DotProduct& d, const Outputs<T>& o, int64_t group, int64_t count, int64_t row) {
  constexpr int sums = NB <= 2 ? 2 : 1;  // the steps of one sum alone would wait for one another
  typename T::Sum sum[BLOCKS][NB][sums] = {};
  unrolled<BLOCKS>([&](auto i) { unrolled<NB>([&](auto b) { sum[i][b][0] = o.start[i]; }); });
  const char *x = d.packed + ((group - d.packed_from) * d.windows + row) * VECTOR_BYTES, *values = o.values, *indices = o.indices;
  for (int64_t at = 0; at < d.windows; at++, x += (BLOCKS > 1 ? count : NB) * VECTOR_BYTES) {
    Int inputs[NB];
    unrolled<NB>([&](auto b) { inputs[b] = *(const IntInMemory*)(x + b * VECTOR_BYTES); });
    const auto step = [&](Int index, auto i, auto turn) {
      const Int value = *(const IntInMemory*)(values + i * o.between);
      unrolled<NB>([&](auto b) { sum[i][b][turn % sums] = T::add(sum[i][b][turn % sums], inputs[b], index, value); });
    };
    const std::integral_constant<int, 0> first;
    int left = d.steps;
    for (; BLOCKS == 1 && left >= 2; left -= 2, indices += 2 * T::index_bytes) {
      step(T::first(indices), first, first);
      values += VECTOR_BYTES;
      step(T::second(indices), first, std::integral_constant<int, 1>());
      values += VECTOR_BYTES;
    }
    if (BLOCKS == 1 && !left) continue;
    unrolled<BLOCKS>([&](auto i) { step(T::first(indices + i * o.between), i, first); });
    values += VECTOR_BYTES, indices += VECTOR_BYTES;
  }
  unrolled<BLOCKS>([&](auto i) {
    unrolled<NB>([&](auto b) {  // not a loop: `sum` would be an array in memory
      for (int each = 1; each < sums; each++) sum[i][b][0] += sum[i][b][each];
      finish_dot_product<T>(d, (o.block + i) * kLanes, group + row + b, sum[i][b][0]);
    });
  });
}

template <class T, int BLOCKS, int NB = kDotProductBatch / BLOCKS, class... Rest>
void some_rows_of_dot_product(int64_t many, const Rest&... rest) {
  if constexpr (NB > 1)
    if (many < NB) return some_rows_of_dot_product<T, BLOCKS, NB - 1>(many, rest...);
  rows_of_dot_product<T, BLOCKS, NB>(rest...);
}

template <class T>
void dot_product_of(const DotProduct& d, int64_t first, int64_t last, int64_t from, int64_t to) {
  const int64_t groups = dot_product_groups(d);
  for (int64_t block = first; block < last;) {
    // With one step a window inputs come from the second-level cache too slowly: two blocks share them.
    const bool two = d.steps == 1 && block + 1 < last;
    const Outputs<T> outputs(d, block, two);
    for (int64_t group = from; group < to; group++) {
      const int64_t row = group * d.batch / groups, count = (group + 1) * d.batch / groups - row, half = count / 2;
      if (!two) some_rows_of_dot_product<T, 1>(count, d, outputs, row, count, 0);
      if (two && half) some_rows_of_dot_product<T, 2>(half, d, outputs, row, count, 0);
      if (two) some_rows_of_dot_product<T, 2>(count - half, d, outputs, row, count, half);
    }
    block += 1 + two;
  }
}

void dot_product(const DotProduct& d, int32_t dtype, int64_t first, int64_t last, int64_t from, int64_t to) {
  if (dtype == kBFloat16) return dot_product_of<Pairs>(d, first, last, from, to);
  dot_product_of<Quads>(d, first, last, from, to);
}

void quantize(const float* x, int64_t count, float scale, uint8_t* to) {
  for (int64_t i = 0; i < count; i++) to[i] = uint8_t(nearest(x[i], scale) + 128);
}

// Gemv [row, row + count) as (windows, count, vector): `fill(b, at, inputs, to)` writes inputs [at, at + inputs) of row b.
template <class Fill>
void pack_group(const DotProduct& d, int64_t row, int64_t count, int64_t window, int zero, const Fill& fill) {
  char* to = d.packed + (row - d.packed_from) * d.windows * VECTOR_BYTES;
  for (int64_t b = 0; b < count; b++)
    for (int64_t at = 0; at < d.windows; at++) {
      char* vector = to + (at * count + b) * VECTOR_BYTES;
      const int64_t left = d.K - at * window;
      if (left < window) __builtin_memset(vector, zero, VECTOR_BYTES);
      fill(row + b, at * window, left < window ? left : window, vector);
    }
}

// Gemv of pixels: stretches of channels, or zeros where the kernel is outside of the image.
template <class Number>
void pack_pixels(const DotProduct& d, const Pixels& p, int64_t row, int64_t count, Number zero) {
  constexpr int64_t window = VECTOR_BYTES / sizeof(Number);
  const Number* image[kDotProductBatch];
  int64_t y0[kDotProductBatch], x0[kDotProductBatch];
  for (int64_t b = 0; b < count; b++) {
    const int64_t pixels = p.outH * p.outW, pixel = (row + b) % pixels;
    image[b] = (const Number*)d.x + (row + b) / pixels * p.H * p.W * p.channels;
    y0[b] = pixel / p.outW * p.stride_h - p.pad_h, x0[b] = pixel % p.outW * p.stride_w - p.pad_w;
  }
  Number zeros[window];
  for (Number& each : zeros) each = zero;
  char* to = d.packed + (row - d.packed_from) * d.windows * VECTOR_BYTES;
  for (int64_t at = 0; at < d.windows * window; at += window, to += count * VECTOR_BYTES)
    for (int64_t k = at; k < at + window;) {
      const int64_t tap = k / p.channels, channel = k % p.channels, dy = tap / p.kernel_w * p.dilation_h, dx = tap % p.kernel_w * p.dilation_w;
      const int64_t left = at + window - k, some = k >= d.K ? left : left < p.channels - channel ? left : p.channels - channel;
      for (int64_t b = 0; b < count; b++) {
        const int64_t y = y0[b] + dy, x = x0[b] + dx;
        const bool outside = k >= d.K || y < 0 || y >= p.H || x < 0 || x >= p.W;
        const Number* from = outside ? zeros : image[b] + (y * p.W + x) * p.channels + channel;
        if (some == window) __builtin_memcpy(to + b * VECTOR_BYTES, from, VECTOR_BYTES);
        else __builtin_memcpy(to + b * VECTOR_BYTES + (k - at) * sizeof(Number), from, some * sizeof(Number));
      }
      k += some;
    }
}

void pack(const DotProduct& d, int32_t dtype, int64_t from, int64_t to) {
  const int64_t groups = dot_product_groups(d);
  for (int64_t group = from; group < to; group++) {
    const int64_t row = group * d.batch / groups, count = (group + 1) * d.batch / groups - row;
    if (d.pixels && dtype == kBFloat16) pack_pixels<uint16_t>(d, *d.pixels, row, count, 0);
    else if (d.pixels) pack_pixels<uint8_t>(d, *d.pixels, row, count, 128);
    else if (dtype == kBFloat16)
      pack_group(d, row, count, VECTOR_BYTES / 2, 0, [&](int64_t b, int64_t at, int64_t inputs, char* vector) {
        __builtin_memcpy(vector, (const uint16_t*)d.x + b * d.x_stride + at, 2 * inputs);
      });
    else {
      for (int64_t b = row; b < row + count; b++) d.x_scales[b] = scale_for(largest((const float*)d.x + b * d.x_stride, d.K));
      pack_group(d, row, count, VECTOR_BYTES, 128, [&](int64_t b, int64_t at, int64_t inputs, char* vector) {
        quantize((const float*)d.x + b * d.x_stride + at, inputs, d.x_scales[b], (uint8_t*)vector);
      });
    }
  }
}
