// AVX-512 F, BW, DQ, VL: Skylake-X and later.
#define VECTOR_BYTES 64
#ifndef ISA_NAME
#define ISA_NAME "avx512"
#define ISA_TABLE kAvx512
#endif
#include <immintrin.h>

#include "isa.h"

namespace openwork {
namespace {

constexpr int kGemvBatch = 8;
constexpr bool kSlotsUnrolled = true;

inline Float fma(Float a, Float b, Float c) { return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

inline Int dot_pairs(Int sum, Short a, Short b) {
#ifdef __AVX512VNNI__
  return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

bool supported() {
#ifdef __AVX512VNNI__
  if (!__builtin_cpu_supports("avx512vnni")) return false;
#endif
#ifdef HAS_DOT_PRODUCT
  if (!__builtin_cpu_supports("avx512vbmi")) return false;
#endif
#ifdef __AVX512BF16__
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Inputs of one window in registers, from which indices pick one per lane. The instructions ignore higher bits.
template <int WINDOW> struct Window;

template <> struct Window<4> {
  __m512 x;
  static Window at(const float* x) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(x))}; }
  Float pick(Int index) const { return (Float)_mm512_permutevar_ps(x, (__m512i)index); }
};

template <> struct Window<8> {
  __m512 x;  // twice the same, so that bit 3 does not matter
  static Window at(const float* x) { return {_mm512_broadcast_f32x8(_mm256_loadu_ps(x))}; }
  Float pick(Int index) const { return (Float)_mm512_permutexvar_ps((__m512i)index, x); }
};

template <> struct Window<16> {
  __m512 x;
  static Window at(const float* x) { return {_mm512_loadu_ps(x)}; }
  Float pick(Int index) const { return (Float)_mm512_permutexvar_ps((__m512i)index, x); }
};

template <> struct Window<32> {
  __m512 low, high;
  static Window at(const float* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)}; }
  Float pick(Int index) const { return (Float)_mm512_permutex2var_ps(low, (__m512i)index, high); }
};

#ifdef HAS_DOT_PRODUCT
// What `dot_product` needs: inputs picked by number, of which only as many bits count as there are inputs; sums of products.
inline Int pick_pairs(Int x, Int index) { return (Int)_mm512_permutexvar_epi16((__m512i)index, (__m512i)x); }
inline Int pick_quads(Int x, Int index) { return (Int)_mm512_permutexvar_epi8((__m512i)index, (__m512i)x); }
inline Float add_pairs(Float sum, Int x, Int value) {
#ifdef __AVX512BF16__
  return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)value);
#else
  const Int upper = Int{} + int32_t(0xffff0000);
  return fma((Float)(x & upper), (Float)(value & upper), fma((Float)(x << 16), (Float)(value << 16), sum));
#endif
}
typedef uint8_t Byte __attribute__((vector_size(16)));  // one for each lane
inline Byte low_bytes(Int numbers) { return (Byte)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)numbers); }
inline Int widened(Byte bytes) { return (Int)_mm512_cvtepu8_epi32((__m128i)bytes); }
inline Int add_quads(Int sum, Int x, Int value) {  // x unsigned, value signed
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)value);
}
#endif

}  // namespace
}  // namespace openwork

#include "isa.inl"
