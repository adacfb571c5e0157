// Matmuls whose lanes are outputs: for one input (a token), or a few.
//
// A window of inputs is held in registers. For each slot of the window, a vector of weights (one of each of `kLanes`
// outputs) meets the inputs that a permutation picks by their indices. N:M gives every output equally many slots in
// every window: no row pointers, no branches. Indices are as tight as the instruction reads them, 2 bits where M <= 4.

template <int WINDOW> constexpr int kIndexBits = WINDOW == 4 ? 2 : WINDOW <= 16 ? 4 : 8;

// One input reads the weights at the speed of memory, and faster when asked for ahead of time: 10 to 15 % on Zen 1.
constexpr int64_t kAhead = 1024;

template <class Value> inline void ask_ahead(const Value* values, int slot) {
  if (slot * kLanes * sizeof(Value) % 64 == 0) __builtin_prefetch((const char*)values + kAhead);  // once a cache line
}

// The weights of a block, one vector a slot.
template <class Value> struct Values {
  typedef std::conditional_t<std::is_same<Value, float>::value, Float, Int> Vector;
  const Value* at;

  static int64_t size(int64_t slots) { return slots * kLanes; }
  Vector next(int64_t) {
    typedef Value Stored __attribute__((vector_size(kLanes * sizeof(Value))));
    Stored stored;
    __builtin_memcpy(&stored, at, sizeof stored);
    at += kLanes;
    return __builtin_convertvector(stored, Vector);
  }
};

// bfloat16: a dword of each lane holds two slots, the first in its lower half, which spares the widening.
template <> struct Values<uint16_t> {
  typedef Float Vector;
  const uint16_t* at;
  Int pair = {};

  static int64_t size(int64_t slots) { return (slots + 1) / 2 * 2 * kLanes; }
  Vector next(int64_t slot) {
    if (slot % 2) return (Float)(pair & ~0xffff);
    pair = *(const IntInMemory*)at;
    at += 2 * kLanes;
    return (Float)(pair << 16);
  }
};

inline Float multiply_add(Float value, Float x, Float sum) { return fma(value, x, sum); }
// The upper half of each x is zero, so a product of pairs is the product of the lower halves.
inline Int multiply_add(Int value, Float x, Int sum) { return dot_pairs(sum, (Short)(Int)x, (Short)value); }

inline void finish(const Gemv& r, int64_t block, int64_t b, Float sum) {
  const int64_t at = block * kLanes, left = r.outputs - at;
  float* y = (float*)r.y + b * r.y_stride + at;
  if (left >= kLanes) {
    if (r.bias) sum += load(r.bias + at);
    return store(y, activated(sum, r.activation));
  }
  for (int l = 0; l < left; l++) y[l] = activated(sum + broadcast(r.bias ? r.bias[at + l] : 0), r.activation)[l];
}

inline void finish(const Gemv& r, int64_t block, int64_t b, Int sum) {
  const int64_t at = block * kLanes, left = r.outputs - at;
  __builtin_memcpy((int32_t*)r.y + b * r.y_stride + at, &sum, 4 * (left < kLanes ? left : kLanes));
}

// NB inputs at once. SLOTS is 0 where the slots of a window are only known at run time. One input has four sums for each
// output, added at the end: the slots of one sum alone would wait for one another.
template <int WINDOW, int SLOTS, int NB, class Value>
struct GemvBlock {
  typedef typename Values<Value>::Vector Sum;
  static constexpr int bits = kIndexBits<WINDOW>, in_word = 32 / bits, sums = NB == 1 ? 4 : 1, step = SLOTS ? SLOTS : 4;
  const Gemv& r;
  const int slots;
  Values<Value> values;
  const uint32_t* indices;
  const float* x[NB];
  Sum sum[NB][sums] = {};

  GemvBlock(const Gemv& r, int64_t block, int64_t batch) : r(r), slots(SLOTS ? SLOTS : r.slots) {
    values.at = (const Value*)r.values + block * Values<Value>::size(r.windows * slots);
    indices = r.indices + block * words_of(r.windows, slots, in_word) * kLanes;
    for (int b = 0; b < NB; b++) x[b] = (const float*)r.x + (batch + b) * r.x_stride;
  }

  Int next_word() {
    const Int word = *(const IntInMemory*)indices;
    indices += kLanes;
    return word;
  }

  // One window, whose first slots find their indices in `index`. `first` is its first slot, counted within the block or
  // from any even slot; `turn` the sum that it starts with.
  inline __attribute__((always_inline)) void window(int64_t at, Int& index, int64_t first, int turn) {
    Window<WINDOW> inputs[NB];
    for (int b = 0; b < NB; b++) inputs[b] = Window<WINDOW>::at(x[b] + at * WINDOW);
    for (int s = 0; s < (SLOTS ? SLOTS : slots); s += step)
      unrolled<step>([&](auto i) {
        if (!SLOTS && s + i >= slots) return;
        if (s + i && (s + i) % in_word == 0) index = next_word();
        if (NB == 1) ask_ahead(values.at, turn + i);
        const Sum value = values.next(first + s + i);
        unrolled<NB>([&](auto b) {
          Sum& total = sum[b][(turn + i) % sums];
          total = multiply_add(value, inputs[b].pick(index), total);
        });
        index >>= bits;
      });
  }

  void run(int64_t block, int64_t batch) {
    constexpr int unrolled = SLOTS && SLOTS < in_word ? in_word / SLOTS : 1;
    const int together = slots < in_word ? in_word / slots : 1;  // windows whose indices share a word
    int64_t at = 0;
    for (; SLOTS && at + unrolled <= r.windows; at += unrolled) {
      Int index = next_word();
#pragma GCC unroll 16
      for (int i = 0; i < unrolled; i++) window(at + i, index, i * SLOTS, i * SLOTS);
    }
    while (at < r.windows) {
      Int index = next_word();
      for (int i = 0; i < together && at < r.windows; i++, at++) window(at, index, at * slots, 0);
    }
    for (int b = 0; b < NB; b++) {
      for (int i = 1; i < sums; i++) sum[b][0] += sum[b][i];
      finish(r, block, batch + b, sum[b][0]);
    }
  }
};

template <int WINDOW, int SLOTS, int NB, class Value>
inline void gemv_block(const Gemv& r, int64_t block, int64_t batch) {
  GemvBlock<WINDOW, SLOTS, NB, Value>(r, block, batch).run(block, batch);
}

template <int WINDOW, int SLOTS, class Value>
void gemv_of(const Gemv& r, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; block++) {
    int64_t b = 0;
    for (; b + kGemvBatch <= r.batch; b += kGemvBatch) gemv_block<WINDOW, SLOTS, kGemvBatch, Value>(r, block, b);
    for (; b < r.batch; b++) gemv_block<WINDOW, SLOTS, 1, Value>(r, block, b);
  }
}

template <int WINDOW, class Value>
void gemv_of_any_slots(const Gemv& r, int64_t first, int64_t last) {
  if constexpr (kSlotsUnrolled) {
    if (r.slots == 1) return gemv_of<WINDOW, 1, Value>(r, first, last);
    if (r.slots == 2) return gemv_of<WINDOW, 2, Value>(r, first, last);
  }
  return gemv_of<WINDOW, 0, Value>(r, first, last);
}

template <class Value>
void gemv_of_any_window(const Gemv& r, int64_t first, int64_t last) {
  switch (r.window) {
    case 4: return gemv_of_any_slots<4, Value>(r, first, last);
    case 8: return gemv_of_any_slots<8, Value>(r, first, last);
    case 16: return gemv_of_any_slots<16, Value>(r, first, last);
    default: return gemv_of_any_slots<32, Value>(r, first, last);
  }
}

void gemv(const Gemv& r, int32_t dtype, int64_t first, int64_t last) {
  if (dtype == kFloat32) return gemv_of_any_window<float>(r, first, last);
  if (dtype == kBFloat16) return gemv_of_any_window<uint16_t>(r, first, last);
  return gemv_of_any_window<int8_t>(r, first, last);
}
