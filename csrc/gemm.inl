// Matmuls whose lanes are columns of the input: rows of X^T, tokens or pixels side by side.
//
// For each kept weight: broadcast it, multiply-add with `vectors` vectors of columns at the input that its offset names.
// No permutation, any pattern. A tile of K is small enough that its inputs stay in the first-level cache while all
// outputs pass over them. A load of an offset waits for the cache, and the loads of inputs for it: so each offset is
// loaded one product ahead, which took the kernel from 70 % to 80 % of peak on Zen 1 (2:4, 8 vectors of 8).

constexpr int kGemmVectors = 8;

inline float value_at(const float* values, int64_t j) { return values[j]; }
inline float value_at(const uint16_t* values, int64_t j) { return from_bfloat16(values[j]); }

inline Float activated(Float v, Activation activation) {
  return activation == kRelu ? v < Float{} ? Float{} : v : v;  // NaN passes
}

// R outputs at once: where vectors are few, sums of one output alone would wait for one another.
template <int R, int V, class Value>
inline __attribute__((always_inline)) void outputs_at_once(const GemmTile& p, int64_t o) {
  const Value* values = (const Value*)p.values + o * p.nnz;
  const uint16_t* offsets = p.offsets + o * p.nnz;
  Float sum[R][V];
  int64_t next[R];
  unrolled<R>([&](auto r) {
    const Float start = broadcast(p.bias ? p.bias[o + r] : 0.0f);
    const float* from = p.from + (o + r) * p.stride;
    unrolled<V>([&](auto v) { sum[r][v] = p.from ? load(from + v * kLanes) : start; });
    next[r] = offsets[r * p.nnz];
  });
  for (int64_t j = 0; j < p.nnz; j++)
    unrolled<R>([&](auto r) {
      const float* x = (const float*)(p.x + next[r]);
      int64_t coming = offsets[r * p.nnz + j + 1];  // one past the end is allocated
#ifndef __clang__
      asm volatile("" : "+r"(coming));  // gcc would move the load to where it is used
#endif
      next[r] = coming;
      const Float value = broadcast(value_at(values, r * p.nnz + j));
      unrolled<V>([&](auto v) { sum[r][v] = fma(value, load(x + v * kLanes), sum[r][v]); });
    });
  unrolled<R>([&](auto r) {
    float* to = p.to + (o + r) * p.stride;
    unrolled<V>([&](auto v) { store(to + v * kLanes, activated(sum[r][v], p.activation)); });
  });
}

template <int V, class Value>
void gemm_of(const GemmTile p) {  // by value: a store of sums could change what a reference reads
  constexpr int R = V <= 2 ? 4 : V <= 4 ? 2 : 1;
  int64_t o = 0;
  for (; o + R <= p.rows; o += R) outputs_at_once<R, V, Value>(p, o);
  for (; R > 1 && o < p.rows; o++) outputs_at_once<1, V, Value>(p, o);
}

// int8: inputs are int16, weights pairs of int16. Unpacking two rows of inputs makes pairs, within pieces of 16 bytes, so
// the sums of one vector of inputs are in two vectors, whose pieces take turns in memory.
template <bool STORE>
inline void move_sums(Int& low, Int& high, int32_t* at) {
  for (int p = 0; p < VECTOR_BYTES / 16; p++) {
    char *first = (char*)&low + 16 * p, *second = (char*)&high + 16 * p, *memory = (char*)at + 32 * p;
    __builtin_memcpy(STORE ? memory : first, STORE ? first : memory, 16);
    __builtin_memcpy(STORE ? memory + 16 : second, STORE ? second : memory + 16, 16);
  }
}

template <int V>
void gemm_of_pairs(const GemmTile p) {
  const int32_t* values = (const int32_t*)p.values;
  const uint16_t* offsets = p.offsets;
  for (int64_t o = 0; o < p.rows; o++, values += p.nnz / 2, offsets += p.nnz) {
    Int low[V] = {}, high[V] = {};
    int32_t* from = (int32_t*)p.from + o * p.stride;
    if (p.from) unrolled<V>([&](auto v) { move_sums<false>(low[v], high[v], from + v * 2 * kLanes); });
    for (int64_t j = 0; j < p.nnz; j += 2) {
      const int16_t *a = (const int16_t*)(p.x + offsets[j]), *b = (const int16_t*)(p.x + offsets[j + 1]);
      const Short pair = (Short)(Int{} + values[j / 2]);
      unrolled<V>([&](auto v) {
        const Short first = *(const ShortInMemory*)(a + v * 2 * kLanes), second = *(const ShortInMemory*)(b + v * 2 * kLanes);
        low[v] = dot_pairs(low[v], shuffled<kLow, int16_t, VECTOR_BYTES>(first, second), pair);
        high[v] = dot_pairs(high[v], shuffled<kHigh, int16_t, VECTOR_BYTES>(first, second), pair);
      });
    }
    int32_t* to = (int32_t*)p.to + o * p.stride;
    unrolled<V>([&](auto v) { move_sums<true>(low[v], high[v], to + v * 2 * kLanes); });
  }
}

template <int V>
void gemm_at(const GemmTile& p, int32_t dtype) {
  if (dtype == kFloat32) return gemm_of<V, float>(p);
  if (dtype == kBFloat16) return gemm_of<V, uint16_t>(p);
  if constexpr (V % 2 == 0) return gemm_of_pairs<V / 2>(p);
}

void gemm(const GemmTile& p, int32_t dtype) {
  switch (p.vectors) {
    case 1: return gemm_at<1>(p, dtype);
    case 2: return gemm_at<2>(p, dtype);
    case 3: return gemm_at<3>(p, dtype);
    case 4: return gemm_at<4>(p, dtype);
    case 5: return gemm_at<5>(p, dtype);
    case 6: return gemm_at<6>(p, dtype);
    case 7: return gemm_at<7>(p, dtype);
    default: return gemm_at<8>(p, dtype);
  }
}

// Reading the offsets once more costs 5 to 10 % of up to 16 rows, 3 to 6 % of 64 and nothing that shows of 512 (2:4 and 1:16,
// AVX2 and AVX-512). Looking at each beside its product cost 10 to 40 % of few rows.
bool rows_within(const uint16_t* offsets, int64_t count, uint16_t last, uint16_t row) {
  uint16_t most = 0, bits = 0;
  for (int64_t i = 0; i < count; i++) {
    most = most > offsets[i] ? most : offsets[i];
    bits |= offsets[i];
  }
  return most <= last && !(bits & (row - 1));
}

// to[c][r] = from[r][c]. Blocks of 16 x 16 read and write whole cache lines: rows are often a power of two apart, and
// then only a few lines of as many rows stay in the cache.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  typedef typename Vector<int32_t, 16>::type V;
  constexpr int64_t block = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += block)
    for (int64_t c0 = 0; c0 < columns; c0 += block) {
      const int64_t r1 = r0 + block < rows ? r0 + block : rows, c1 = c0 + block < columns ? c0 + block : columns;
      int64_t c = c0;
      for (; c + 4 <= c1; c += 4) {
        int64_t r = r0;
        for (; r + 4 <= r1; r += 4) {
          V v[4];
          for (int i = 0; i < 4; i++) __builtin_memcpy(&v[i], from + (r + i) * from_stride + c, 16);
          separate<4, int32_t, 16>(v, 4);
          for (int i = 0; i < 4; i++) __builtin_memcpy(to + (c + i) * to_stride + r, &v[i], 16);
        }
        for (; r < r1; r++)
          for (int i = 0; i < 4; i++) to[(c + i) * to_stride + r] = from[r * from_stride + c + i];
      }
      for (; c < c1; c++)
        for (int64_t r = r0; r < r1; r++) to[c * to_stride + r] = from[r * from_stride + c];
    }
}

int32_t largest(const float* x, int64_t count) {
  int32_t most = 0;  // magnitudes order as their bits do
  for (int64_t i = 0; i < count; i++) {
    const int32_t magnitude = int32_t(bits_of(x[i]) & 0x7fffffff);
    most = most > magnitude ? most : magnitude;
  }
  return most;
}

// Multiply-adds that depend on nothing but themselves: what this core can do at most. Returns how many float operations.
int64_t peak(int64_t rounds, float* result) {
  constexpr int chains = 12;
  Float sum[chains];
  unrolled<chains>([&](auto i) { sum[i] = broadcast(float(i)); });
  const Float factor = broadcast(result[0]);
  for (int64_t round = 0; round < rounds; round++) unrolled<chains>([&](auto i) { sum[i] = fma(sum[i], factor, factor); });
  unrolled<chains>([&](auto i) { store(result, load(result) + sum[i]); });
  return rounds * chains * kLanes * 2;
}
