// The definition: runs on every CPU, in vectors of 16 bytes that the compiler lowers to what there is.
#define VECTOR_BYTES 16
#define ISA_NAME "scalar"
#define ISA_TABLE kScalar
#include "isa.h"

namespace openwork {
namespace {

constexpr int kGemvBatch = 4;
inline Float fma(Float a, Float b, Float c) { return a * b + c; }
bool supported() { return true; }

}  // namespace
}  // namespace openwork

#include "windows.inl"

#include "isa.inl"
