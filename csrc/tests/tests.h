// The tests: each call makes one random case from the seed in `random`, and ends the program where it fails.
#pragma once

#include "../api.h"
#include "../threads.h"
#include "guarded.h"

OPENWORK_API const char* openwork_use_isa(const char* name);
OPENWORK_API const char* openwork_isa(int32_t rank);
OPENWORK_API void openwork_use_threads(openwork::ParallelFor parallel_for);
OPENWORK_API int64_t openwork_linear_scratch(const openwork::LinearCall* call);
OPENWORK_API void openwork_linear(const openwork::LinearCall* call);
OPENWORK_API int64_t openwork_conv_scratch(const openwork::ConvCall* call);
OPENWORK_API void openwork_conv(const openwork::ConvCall* call);
OPENWORK_API void openwork_rows(const openwork::Rows* rows, int32_t dtype);
OPENWORK_API void openwork_dots(const openwork::Dots* dots, int32_t dtype, int64_t threads);
OPENWORK_API int64_t openwork_dots_scratch(const openwork::Dots* dots, int64_t threads);
OPENWORK_API void openwork_quantize(const float* x, int64_t N, int64_t count, uint8_t* to, float* scales, int32_t* bits);

namespace openwork_tests {

using openwork::Groups;
using openwork::Kernels;

void test_masks(const Kernels& kernels, Random& random);
void test_transpose(const Kernels& kernels, Random& random);
void test_panel(const Kernels& kernels, Random& random);
void test_rows(const Kernels& kernels, Random& random);
void test_dots(const Kernels& kernels, Random& random);
void test_quantize(const Kernels& kernels, Random& random);
void test_linear(const Kernels& kernels, Random& random);
void test_conv(const Kernels& kernels, Random& random);

}  // namespace openwork_tests
