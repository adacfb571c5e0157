// The one table of instruction sets, best first, and the functions on whole weights that the library exports.
#include <atomic>
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

// body(part, first, last) on `parts` parts of all groups of a weight: the same parts whatever the threads.
template <class Body>
static int32_t each_part(const Groups& g, int64_t parts, const Body& body) {
  const int64_t groups = all_groups(g);
  return status_of([&] {
    parallel_for(parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; part++) body(part, part * groups / parts, (part + 1) * groups / parts);
    });
    return kDone;
  });
}

// body(first, last) on some of the groups [from, to) of a file's weight, `from` a multiple of 8, and so is each `first`.
template <class Body>
static int32_t each_eight(const Compressed& c, int64_t from, int64_t to, const Body& body) {
  return status_of([&] {
    parallel_for((to - from + 7) / 8, 1 + kGrain / (8 * c.m), [&](int64_t first, int64_t last) {
      body(from + first * 8, from + last * 8 < to ? from + last * 8 : to);
    });
    return kDone;
  });
}

}  // namespace openwork

using namespace openwork;

// The version of this interface; the loader refuses another.
OPENWORK_API int32_t openwork_abi() { return 7; }

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

// counts: (parts, 3); sums: (parts, 2).
OPENWORK_API int32_t openwork_count_groups(const Kernels* kernels, const Groups* g, int32_t bytes, uint64_t counted,
                                           const void* weight, int64_t parts, int64_t* counts) {
  return each_part(*g, parts, [=](int64_t part, int64_t first, int64_t last) {
    kernels->count_groups(*g, bytes, counted, weight, first, last, counts + 3 * part);
  });
}

OPENWORK_API int32_t openwork_retained(const Kernels* kernels, const Groups* g, int32_t dtype, const void* weight,
                                       int64_t parts, double* sums) {
  return each_part(*g, parts, [=](int64_t part, int64_t first, int64_t last) {
    kernels->retained(*g, dtype, weight, first, last, sums + 2 * part);
  });
}

OPENWORK_API int32_t openwork_compress(const Kernels* kernels, const Compressed* c, int64_t* crowded) {
  std::atomic<int64_t> sum{0};
  const int32_t status = each_eight(*c, 0, c->rows * ((c->length + c->m - 1) / c->m), [&](int64_t first, int64_t last) {
    sum += kernels->compress(*c, first, last);
  });
  *crowded = sum;
  return status;
}

OPENWORK_API int32_t openwork_slots(const Kernels* kernels, const Slots* s, int64_t* crowded) {
  std::atomic<int64_t> sum{0};
  const int32_t status = status_of([&] {
    parallel_for(s->rows, 1 + kGrain / s->length, [&](int64_t first, int64_t last) { sum += kernels->slots(*s, first, last); });
    return kDone;
  });
  *crowded = sum;
  return status;
}

OPENWORK_API int32_t openwork_expand(const Kernels* kernels, const Compressed* c, int64_t from, int64_t to, int32_t* sound) {
  std::atomic<bool> all{true};
  const int32_t status = each_eight(*c, from, to, [&](int64_t first, int64_t last) {
    if (!kernels->expand(*c, first, last)) all = false;
  });
  *sound = all;
  return status;
}

// Float operations done by `rounds` rounds of the fastest loop there is, on the calling thread. result: one vector.
OPENWORK_API int64_t openwork_peak(const Kernels* kernels, int64_t rounds, float* result) { return kernels->peak(rounds, result); }

// The sizes of the structs, by number, for a test of the mirror in Python; 0 past the last.
OPENWORK_API int64_t openwork_size_of(int32_t which) {
  const int64_t sizes[] = {sizeof(Groups), sizeof(GemmWeight), sizeof(GemmLinear), sizeof(GemmConv2d),
                           sizeof(Gemv),   sizeof(DotProduct), sizeof(Pixels),     sizeof(Compressed), sizeof(Slots),
                           sizeof(Requantize)};
  return which < 10 ? sizes[which] : 0;
}
