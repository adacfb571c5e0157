// AVX-512 with VNNI, VBMI and BF16: Zen 4, Sapphire Rapids and later. Sums of products of pairs and quads of short numbers.
#define ISA_NAME "avx512bf16"
#define ISA_TABLE kAvx512BFloat16
#ifdef TOO_NEW  // for the compiler: setup.py
#include "kernels.h"
namespace openwork {
extern const Kernels ISA_TABLE;
static bool never() { return false; }
static constexpr Kernels absent() {
  Kernels none{};
  none.name = ISA_NAME, none.supported = never;
  return none;
}
const Kernels ISA_TABLE = absent();
}  // namespace openwork
#else
#define HAS_DOT_PRODUCT
#include "avx512.cpp"
#endif
