// NEON with fused multiply-add: every 64-bit ARM.
#define VECTOR_BYTES 16
#define ISA_NAME "neon"
#define ISA_TABLE kNeon
#include <arm_neon.h>

#include "isa.h"

namespace openwork {
namespace {

constexpr int kGemvBatch = 4;
inline Float fma(Float a, Float b, Float c) { return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
bool supported() { return true; }

}  // namespace
}  // namespace openwork

#include "windows.inl"

#include "isa.inl"
