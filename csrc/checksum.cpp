// CRC-32 of zlib, by carry-less multiplication where the processor has it; openwork/utils/checksum.py says which one it is.
//
// 512 bits are folded onto the next 512 at once: a * x^(512 + 64) + b * x^512 is the same modulo P as a and b times these
// powers modulo P. (Gopal et al., Fast CRC Computation Using PCLMULQDQ, Intel, 2009.) What is left, 16 bytes or so, goes bit
// by bit. The powers, bits reflected and shifted by one, are computed anew in tests/kernels/test_checksum.py.
#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace openwork {
namespace {

uint32_t bit_by_bit(const uint8_t* data, int64_t count, uint32_t state) {
  for (int64_t i = 0; i < count; i++) {
    state ^= data[i];
    for (int bit = 0; bit < 8; bit++) state = state >> 1 ^ (0xedb88320u & (0u - (state & 1)));
  }
  return state;
}

#define CLMUL __attribute__((target("pclmul,sse2")))

CLMUL inline __m128i folded(__m128i sum, __m128i powers, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(sum, powers, 0x00), _mm_clmulepi64_si128(sum, powers, 0x11)), next);
}

CLMUL inline __m128i at(const uint8_t* data) { return _mm_loadu_si128((const __m128i*)data); }

// At least 64 bytes.
CLMUL uint32_t by_folding(const uint8_t* data, int64_t count, uint32_t state) {
  const __m128i by_512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);  // x^(512 - 32), x^(512 + 32)
  const __m128i by_128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);  // x^(128 - 32), x^(128 + 32)
  __m128i a = _mm_xor_si128(at(data), _mm_cvtsi32_si128(int32_t(state))), b = at(data + 16), c = at(data + 32), d = at(data + 48);
  for (data += 64, count -= 64; count >= 64; data += 64, count -= 64) {
    a = folded(a, by_512, at(data));
    b = folded(b, by_512, at(data + 16));
    c = folded(c, by_512, at(data + 32));
    d = folded(d, by_512, at(data + 48));
  }
  a = folded(folded(folded(a, by_128, b), by_128, c), by_128, d);
  for (; count >= 16; data += 16, count -= 16) a = folded(a, by_128, at(data));
  uint8_t left[16];
  _mm_storeu_si128((__m128i*)left, a);
  return bit_by_bit(data, count, bit_by_bit(left, 16, 0));
}

}  // namespace
}  // namespace openwork

OPENWORK_API int32_t openwork_has_crc32() { return __builtin_cpu_supports("pclmul") != 0; }

OPENWORK_API uint32_t openwork_crc32(const void* data, int64_t count, uint32_t before) {
  const auto* bytes = (const uint8_t*)data;
  return ~(count < 64 ? openwork::bit_by_bit(bytes, count, ~before) : openwork::by_folding(bytes, count, ~before));
}

#else  // zlib is fast where the processor has instructions for it

OPENWORK_API int32_t openwork_has_crc32() { return 0; }
OPENWORK_API uint32_t openwork_crc32(const void*, int64_t, uint32_t before) { return before; }

#endif
