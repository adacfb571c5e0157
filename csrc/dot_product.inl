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

// `count` bytes, often those of a vector; of images of three channels, four.
inline void copy(char* to, const char* from, int64_t count) {
  if (count == VECTOR_BYTES) __builtin_memcpy(to, from, VECTOR_BYTES);
  else if (count == 4) __builtin_memcpy(to, from, 4);
  else __builtin_memcpy(to, from, count);
}

struct Pairs {  // bfloat16
  typedef Float Sum;
  typedef uint16_t Out;
  static constexpr int index_bytes = VECTOR_BYTES / 2;  // of a step: one vector holds the indices of two

  static Sum start(const DotProduct&, const char*, int64_t) { return Sum{}; }
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
  static Sum start(const DotProduct& d, const char* values, int64_t) {
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

// The nearest whole numbers of 0 to 255: as `nearest`, after which the lowest byte is all.
inline Byte whole_bytes(Float v) {
  const Float least = v > Float{} ? v : Float{}, both = least < broadcast(255) ? least : broadcast(255);
  return low_bytes((Int)(both + broadcast(12582912.0f)));
}
inline Float floats_of(Byte bytes) { return __builtin_convertvector(widened(bytes), Float); }
inline Byte bytes_at(const uint8_t* from, int64_t count) {
  Byte bytes{};
  if (count >= kLanes) __builtin_memcpy(&bytes, from, kLanes);
  else __builtin_memcpy(&bytes, from, count);
  return bytes;
}

// x * Phi(x), erf by a quotient of polynomials that XLA and Eigen use: within 4e-7 of the exact value, times |x|.
inline Float gelu(Float x) {
  constexpr float above[] = {-2.72614225801306e-10f, 2.77068142495902e-08f,  -2.10102402082508e-06f, -5.69250639462346e-05f,
                             -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
  constexpr float below[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                             -1.42647390514189e-02f};
  const Float most = broadcast(3.832506856900711f), scaled = x * broadcast(0.70710678f);
  const Float low = scaled > -most ? scaled : -most, z = low < most ? low : most, square = z * z;
  Float up = broadcast(above[0]), down = broadcast(below[0]);
  for (int i = 1; i < 7; i++) up = fma(up, square, broadcast(above[i]));
  for (int i = 1; i < 5; i++) down = fma(down, square, broadcast(below[i]));
  const Float half = x * broadcast(0.5f);
  return fma(half, z * up / down, half);
}

struct ByteQuads : Quads {  // int8 weights, inputs of 0 to 255 of which one stands for 0
  static Sum start(const DotProduct& d, const char*, int64_t output) {
    const int64_t count = d.outputs - output;
    Int sums{};
    __builtin_memcpy(&sums, d.requantize->sums + output, 4 * (count < kLanes ? count : kLanes));
    return sums * -d.requantize->zero;
  }
};

// The outputs of `count` rows from sums, which are in memory: kept in registers they would all be code of their own.
template <class T>
__attribute__((noinline)) void finish_rows(const DotProduct& d, int64_t output, int64_t row, int64_t count, const typename T::Sum* sums) {
  const int64_t left = d.outputs - output;
  const Float bias = d.bias ? some(d.bias + output, left) : Float{};
  for (int64_t b = 0; b < count; b++) {
    typename T::Out *y = (typename T::Out*)d.y + (row + b) * d.y_stride + output, all[kLanes];
    T::finish(d, output, row + b, sums[b], bias, left < kLanes ? all : y);
    if (left < kLanes) __builtin_memcpy(y, all, left * sizeof *y);
  }
}

template <>
__attribute__((noinline)) void finish_rows<ByteQuads>(const DotProduct& d, int64_t output, int64_t row, int64_t count, const Int* sums) {
  const Requantize r = *d.requantize;  // copies: a byte that is written may be anything
  const Activation activation = d.activation;
  const int64_t left = d.outputs - output, stride = d.y_stride, start = row * stride + output;
  const Float bias = d.bias ? some(d.bias + output, left) : Float{}, scale = some(d.scales + output, left);
  const Float residual_zero = broadcast(float(r.residual_zero)), residual_scale = broadcast(r.residual_scale);
  const Float inverse = broadcast(r.y_inverse), zero = broadcast(float(r.y_zero));
  const auto each = [&](auto is_whole) {
    const int64_t some_left = is_whole ? kLanes : left;
    const uint8_t* added = (const uint8_t*)r.residual + start;
    const float* added_floats = (const float*)r.residual + start;
    uint8_t* bytes = (uint8_t*)d.y + start;
    float* floats = (float*)d.y + start;
    for (int64_t b = 0; b < count; b++, added += stride, added_floats += stride, bytes += stride, floats += stride) {
      Float y = fma(__builtin_convertvector(sums[b], Float), scale, bias);
      if (r.residual && r.residual_is_float) y += some(added_floats, some_left);
      else if (r.residual) y = fma(floats_of(bytes_at(added, some_left)) - residual_zero, residual_scale, y);
      y = activation == kGelu ? gelu(y) : activated(y, activation);
      const Byte whole = whole_bytes(fma(y, inverse, zero));
      if (r.y_is_float) __builtin_memcpy(floats, &y, 4 * some_left);
      else __builtin_memcpy(bytes, &whole, some_left);
    }
  };
  if (left >= kLanes) each(std::true_type());
  else each(std::false_type());
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
    for (int i = 0; i <= two; i++) start[i] = T::start(d, values + i * between, (block + i) * kLanes);
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
    typename T::Sum all[NB];
    unrolled<NB>([&](auto b) {  // not a loop: `sum` would be an array in memory
      for (int each = 1; each < sums; each++) sum[i][b][0] += sum[i][b][each];
      all[b] = sum[i][b][0];
    });
    finish_rows<T>(d, (o.block + i) * kLanes, group + row, NB, all);
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
  if (d.requantize) return dot_product_of<ByteQuads>(d, first, last, from, to);
  if (dtype == kBFloat16) return dot_product_of<Pairs>(d, first, last, from, to);
  dot_product_of<Quads>(d, first, last, from, to);
}

void quantize(const float* x, int64_t count, float scale, uint8_t* to) {
  for (int64_t i = 0; i < count; i++) to[i] = uint8_t(nearest(x[i], scale) + 128);
}

void to_bytes(const float* x, int64_t count, float inverse, int32_t zero, uint8_t* to) {
  const auto one = [&](int64_t many) { return whole_bytes(fma(some(x, many), broadcast(inverse), broadcast(float(zero)))); };
  for (; count >= kLanes; count -= kLanes, x += kLanes, to += kLanes) {
    const Byte bytes = one(kLanes);
    __builtin_memcpy(to, &bytes, kLanes);
  }
  if (!count) return;
  const Byte bytes = one(count);
  __builtin_memcpy(to, &bytes, count);
}

void from_bytes(const uint8_t* x, int64_t count, float scale, int32_t zero, float* to) {
  const auto one = [&](int64_t many) { return (floats_of(bytes_at(x, many)) - broadcast(float(zero))) * broadcast(scale); };
  for (; count >= kLanes; count -= kLanes, x += kLanes, to += kLanes) store(to, one(kLanes));
  if (!count) return;
  const Float y = one(count);
  __builtin_memcpy(to, &y, 4 * count);
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

// Gemv of pixels: stretches of channels, kernel position by kernel position, or zeros where that is outside of the image.
template <class Number>
void pack_pixels(const DotProduct& d, const Pixels& p, int64_t row, int64_t count, Number zero) {
  constexpr int64_t window = VECTOR_BYTES / sizeof(Number);
  const Number *image[kDotProductBatch], *from[kDotProductBatch];
  int64_t y0[kDotProductBatch], x0[kDotProductBatch], inside[kDotProductBatch];  // all bits, or none
  for (int64_t b = 0; b < count; b++) {
    const int64_t pixels = p.outH * p.outW, pixel = (row + b) % pixels;
    image[b] = (const Number*)d.x + (row + b) / pixels * p.H * p.W * p.channels;
    y0[b] = pixel / p.outW * p.stride_h - p.pad_h, x0[b] = pixel % p.outW * p.stride_w - p.pad_w;
  }
  Number zeros[window];
  for (Number& each : zeros) each = zero;
  char* const to = d.packed + (row - d.packed_from) * d.windows * VECTOR_BYTES;
  if (d.K % window)
    for (int64_t b = 0; b < count; b++) __builtin_memset(to + ((d.windows - 1) * count + b) * VECTOR_BYTES, int(zero), VECTOR_BYTES);
  int64_t dy = 0, dx = 0;
  for (int64_t k = 0; k < d.K; dx += p.dilation_w) {
    if (dx == int64_t(p.kernel_w) * p.dilation_w) dx = 0, dy += p.dilation_h;
    for (int64_t b = 0; b < count; b++) {
      const int64_t y = y0[b] + dy, x = x0[b] + dx;
      const bool is_inside = uint64_t(y) < uint64_t(p.H) && uint64_t(x) < uint64_t(p.W);
      inside[b] = -int64_t(is_inside);
      from[b] = is_inside ? image[b] + (y * p.W + x) * p.channels : zeros;
    }
    for (int64_t channel = 0; channel < p.channels;) {
      const int64_t left = window - k % window, rest = p.channels - channel, some = left < rest ? left : rest;
      char* vectors = to + k / window * count * VECTOR_BYTES + k % window * int64_t(sizeof(Number));
      for (int64_t b = 0; b < count; b++)
        copy(vectors + b * VECTOR_BYTES, (const char*)(from[b] + (channel & inside[b])), some * int64_t(sizeof(Number)));
      k += some, channel += some;
    }
  }
}

void pack(const DotProduct& d, int32_t dtype, int64_t from, int64_t to) {
  const int64_t groups = dot_product_groups(d);
  for (int64_t group = from; group < to; group++) {
    const int64_t row = group * d.batch / groups, count = (group + 1) * d.batch / groups - row;
    if (d.pixels && dtype == kBFloat16) pack_pixels<uint16_t>(d, *d.pixels, row, count, 0);
    else if (d.pixels) pack_pixels<uint8_t>(d, *d.pixels, row, count, d.requantize ? uint8_t(d.requantize->zero) : 128);
    else if (dtype == kBFloat16)
      pack_group(d, row, count, VECTOR_BYTES / 2, 0, [&](int64_t b, int64_t at, int64_t inputs, char* vector) {
        copy(vector, (const char*)((const uint16_t*)d.x + b * d.x_stride + at), 2 * inputs);
      });
    else if (d.requantize)
      pack_group(d, row, count, VECTOR_BYTES, 0, [&](int64_t b, int64_t at, int64_t inputs, char* vector) {
        copy(vector, (const char*)d.x + b * d.x_stride + at, inputs);
      });
    else {
      for (int64_t b = row; b < row + count; b++) d.x_scales[b] = scale_for(largest((const float*)d.x + b * d.x_stride, d.K));
      pack_group(d, row, count, VECTOR_BYTES, 128, [&](int64_t b, int64_t at, int64_t inputs, char* vector) {
        quantize((const float*)d.x + b * d.x_stride + at, inputs, d.x_scales[b], (uint8_t*)vector);
      });
    }
  }
}
