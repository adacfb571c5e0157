// The one table of instruction sets, best first, and the functions on masks that the library exports.
#include <cstring>

#include "api.h"
#include "threads.h"

namespace openwork {

#if defined(__x86_64__)
extern const Kernels kAvx512BFloat16, kAvx512Vbmi, kAvx512Vnni, kAvx512, kAvx2, kScalar;
static const Kernels* const kVariants[] = {&kAvx512BFloat16, &kAvx512Vbmi, &kAvx512Vnni, &kAvx512, &kAvx2, &kScalar};
#elif defined(__aarch64__)
extern const Kernels kNeon, kScalar;
static const Kernels* const kVariants[] = {&kNeon, &kScalar};
#else
extern const Kernels kScalar;
static const Kernels* const kVariants[] = {&kScalar};
#endif

ParallelFor parallel_for_of_host = nullptr;  // set once, when the library is loaded

constexpr int64_t kGrain = 32768;  // weights a thread is worth waking for

static int64_t all_groups(const Groups& g) { return g.outer * groups_of(g); }
static int64_t grain(const Groups& g) { return 1 + kGrain / (int64_t(g.m) * g.inner); }

// body(first, last) on the groups of a weight.
template <class Body>
static int32_t each_group(const Groups& g, const Body& body) {
  return status_of([&] {
    parallel_for(all_groups(g), grain(g), body);
    return kDone;
  });
}

}  // namespace openwork

using namespace openwork;

// The version of this interface; the loader refuses another.
OPENWORK_API int32_t openwork_abi() { return 5; }

OPENWORK_API void openwork_use_threads(ParallelFor parallel_for) { parallel_for_of_host = parallel_for; }

// The kernels of an instruction set of this machine by name, or of the best for null; null where it has none of the name.
// They never change.
OPENWORK_API const Kernels* openwork_kernels(const char* name) {
  for (const Kernels* each : kVariants)
    if (each->supported() && (!name || !strcmp(name, each->name))) return each;
  return nullptr;
}

// The names of the instruction sets that the library has and that this machine can run, by rank; null at the end.
OPENWORK_API const char* openwork_isa(int32_t rank) {
  for (const Kernels* each : kVariants)
    if (each->supported() && rank-- == 0) return each->name;
  return nullptr;
}

OPENWORK_API const char* openwork_name(const Kernels* kernels) { return kernels->name; }
OPENWORK_API int32_t openwork_lanes(const Kernels* kernels) { return kernels->lanes; }
OPENWORK_API int32_t openwork_gemm_columns(const Kernels* kernels) { return kernels->lanes * kernels->gemm_vectors; }
OPENWORK_API int32_t openwork_has_dot_product(const Kernels* kernels) { return kernels->dot_product != nullptr; }

OPENWORK_API int32_t openwork_keep(const Kernels* kernels, const Groups* g, int32_t dtype, const void* weight, uint8_t* keep) {
  return each_group(*g, [=](int64_t first, int64_t last) { kernels->keep(*g, dtype, weight, keep, first, last); });
}

OPENWORK_API int32_t openwork_prune(const Kernels* kernels, const Groups* g, int32_t dtype, const void* weight, void* out) {
  return each_group(*g, [=](int64_t first, int64_t last) { kernels->prune(*g, dtype, weight, out, first, last); });
}

OPENWORK_API int32_t openwork_decay(const Kernels* kernels, const Groups* g, int32_t dtype, const void* weight,
                                    const void* gradient, void* out, float rate) {
  return each_group(
      *g, [=](int64_t first, int64_t last) { kernels->decay(*g, dtype, weight, gradient, out, rate, first, last); });
}

// Float operations done by `rounds` rounds of the fastest loop there is, on the calling thread. result: one vector.
OPENWORK_API int64_t openwork_peak(const Kernels* kernels, int64_t rounds, float* result) { return kernels->peak(rounds, result); }

// The sizes of the structs, by number, for a test of the mirror in Python; 0 past the last.
OPENWORK_API int64_t openwork_size_of(int32_t which) {
  const int64_t sizes[] = {sizeof(Groups), sizeof(GemmWeight), sizeof(GemmLinear), sizeof(GemmConv2d),
                           sizeof(Gemv),   sizeof(DotProduct), sizeof(Pixels)};
  return which < 7 ? sizes[which] : 0;
}
