// AVX2 with FMA: Haswell, Zen and later. Flags: -mavx2 -mfma.
#define VECTOR_BYTES 32
#define ISA_NAME "avx2"
#define ISA_TABLE kAvx2
#include <immintrin.h>

#include "isa.h"

namespace openwork {
namespace {

constexpr int kGemvBatch = 4;
constexpr bool kSlotsUnrolled = true;

inline Float fma(Float a, Float b, Float c) { return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

inline Int dot_pairs(Int sum, Short a, Short b) { return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// What `gemv` needs: inputs of one window in registers, from which indices pick one per lane.
template <int WINDOW> struct Window;

template <> struct Window<4> {  // the low two bits of an index count: four inputs in both halves
  __m256 x;
  static Window at(const float* x) { return {_mm256_broadcast_ps((const __m128*)x)}; }
  Float pick(Int index) const { return (Float)_mm256_permutevar_ps(x, (__m256i)index); }
};

template <> struct Window<8> {  // the low three bits
  __m256 x;
  static Window at(const float* x) { return {_mm256_loadu_ps(x)}; }
  Float pick(Int index) const { return (Float)_mm256_permutevar8x32_ps(x, (__m256i)index); }
};

template <> struct Window<16> {  // bit 3 chooses between two permutations: moved to the sign, which a blend looks at
  Window<8> low, high;
  static Window at(const float* x) { return {Window<8>::at(x), Window<8>::at(x + 8)}; }
  Float pick(Int index) const {
    return (Float)_mm256_blendv_ps((__m256)low.pick(index), (__m256)high.pick(index), (__m256)(index << 28));
  }
};

template <> struct Window<32> {
  Window<16> low, high;
  static Window at(const float* x) { return {Window<16>::at(x), Window<16>::at(x + 16)}; }
  Float pick(Int index) const {
    return (Float)_mm256_blendv_ps((__m256)low.pick(index), (__m256)high.pick(index), (__m256)(index << 27));
  }
};

}  // namespace
}  // namespace openwork

#include "isa.inl"
