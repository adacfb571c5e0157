// In place of instruction sets that the machine lacks, whose files need not be compiled to test the others.
#include "../kernels.h"

namespace openwork {
namespace {

constexpr Kernels absent(const char* name) {
  Kernels none{};
  none.name = name, none.supported = [] { return false; };
  return none;
}

}  // namespace

#ifdef NO_AVX2
extern const Kernels kAvx2;
const Kernels kAvx2 = absent("avx2");
#endif
#ifdef NO_AVX512
extern const Kernels kAvx512, kAvx512Vnni;
const Kernels kAvx512 = absent("avx512"), kAvx512Vnni = absent("avx512vnni");
#endif
#ifdef NO_AVX512VBMI
extern const Kernels kAvx512Vbmi;
const Kernels kAvx512Vbmi = absent("avx512vbmi");
#endif
#ifdef NO_AVX512BF16
extern const Kernels kAvx512BFloat16;
const Kernels kAvx512BFloat16 = absent("avx512bf16");
#endif

}  // namespace openwork
