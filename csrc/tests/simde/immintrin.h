// In place of the compiler's header where a machine without AVX-512 tests avx512.cpp and what includes it: the intrinsics
// by SIMDe (libsimde-dev), in plain C. Found first with -I.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512/broadcast.h>
#include <simde/x86/avx512/dpbf16.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/dpwssd.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/madd.h>
#include <simde/x86/avx512/permutex2var.h>
#include <simde/x86/avx512/permutexvar.h>

// What SIMDe 0.7.4 lacks, and what it defines with the arguments of another.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
inline __m512 _mm512_permutevar_ps(__m512 a, __m512i index) {  // vpermilps: low two bits, within 16 bytes
  simde__m512_private from = simde__m512_to_private(a), to;
  const simde__m512i_private at = simde__m512i_to_private(index);
  for (int l = 0; l < 16; l++) to.f32[l] = from.f32[l / 4 * 4 + (at.i32[l] & 3)];
  return simde__m512_from_private(to);
}
#undef _mm512_maskz_cvtepi32_epi8
#undef _mm512_cvtepu8_epi32
inline __m128i _mm512_maskz_cvtepi32_epi8(uint16_t, __m512i numbers) {  // the mask has every lane
  const simde__m512i_private from = simde__m512i_to_private(numbers);
  simde__m128i_private to;
  for (int l = 0; l < 16; l++) to.u8[l] = uint8_t(from.i32[l]);
  return simde__m128i_from_private(to);
}
inline __m512i _mm512_cvtepu8_epi32(__m128i bytes) {
  const simde__m128i_private from = simde__m128i_to_private(bytes);
  simde__m512i_private to;
  for (int l = 0; l < 16; l++) to.i32[l] = from.u8[l];
  return simde__m512i_from_private(to);
}

#define __builtin_cpu_supports(feature) true
