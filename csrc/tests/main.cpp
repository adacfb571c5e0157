// Runs every kernel of every instruction set of this machine on random cases, for `check SECONDS [SEED [ISA]]`; at least
// a fixed number of cases. The first failure ends it, and says the seed that repeats it: `check 0 SEED ISA`.
#include <signal.h>
#include <time.h>

#include <string>

#include "tests.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace openwork_tests {
namespace {

struct Test {
  const char* name;
  void (*run)(const Kernels& kernels, Random& random);
  int least;  // cases
};

const Test kTests[] = {{"masks", test_masks, 300},     {"transpose", test_transpose, 60},
                       {"compress", test_compress, 400}, {"counts", test_counts, 300},
                       {"retained", test_retained, 200},
                       {"gemm", test_gemm, 300},       {"gemv", test_gemv, 300},
                       {"linear", test_linear, 150},   {"dot_product", test_dot_product, 400},
                       {"quantize", test_quantize, 100}, {"convolution", test_conv, 400},
                       {"bytes", test_bytes, 400},     {"there_and_back", test_there_and_back, 100},
                       {"onnxruntime", test_onnxruntime, 400}};

bool runs(const Test& test, const Kernels& kernels) {  // here: not every processor has dot products
  for (const auto run : {test_dot_product, test_quantize, test_bytes, test_there_and_back})
    if (test.run == run) return kernels.dot_product;
  return true;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// As torch's: pieces of at least `grain`, here one after the other.
int32_t pieces(int64_t first, int64_t last, int64_t grain, openwork::RangeBody body, void* context) {
  const int64_t step = grain > (last - first) / 3 + 1 ? grain : (last - first) / 3 + 1;
  for (int64_t at = first; at < last; at += step) body(at, at + step < last ? at + step : last, context);
  return 0;
}

void one_case(const Test& test, const Kernels& kernels, uint64_t seed) {
  current.kind = test.name, current.seed = seed;
  Random random{seed};
  openwork_use_threads(random.one_in(2) ? pieces : nullptr);
  test.run(kernels, random);
}

long run_isa(const char* name, uint64_t first_seed, double seconds) {
  const Kernels& kernels = *openwork_kernels(name);
  current.isa = name;
  const double end = now() + seconds;
  long cases = 0;
  for (uint64_t seed = first_seed, round = 0; round == 0 || now() < end; round++, seed += 10000)
    for (const Test& test : kTests)
      for (int i = 0; runs(test, kernels) && i < (round ? test.least / 10 : test.least); i++, cases++) one_case(test, kernels, seed + uint64_t(i));
  return cases;
}

void repeat(uint64_t seed, const char* name) {
  const Kernels& kernels = *openwork_kernels(name);
  current.isa = name;
  for (const Test& test : kTests)
    if (runs(test, kernels)) one_case(test, kernels, seed);
}

#ifdef __SANITIZE_ADDRESS__
void watch_crashes() { __sanitizer_set_death_callback(say_where); }
#else
void crashed(int) {
  say_where();
  _exit(1);
}
void watch_crashes() {
  for (int each : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) signal(each, crashed);
}
#endif

}  // namespace
}  // namespace openwork_tests

int main(int argc, char** argv) {
  using namespace openwork_tests;
  watch_crashes();
  const double seconds = argc > 1 ? atof(argv[1]) : 0;
  const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
  if (argc > 3) {
    repeat(seed, argv[3]);
    return 0;
  }
  int count = 0;
  while (openwork_isa(count)) count++;
  for (int i = 0; i < count; i++)
    printf("%-12s %ld cases\n", openwork_isa(i), run_isa(openwork_isa(i), seed, seconds / count)), fflush(stdout);
  return 0;
}
