// The tests: each call makes one random case from the seed in `random`, and ends the program where it fails.
#pragma once

#include "../api.h"
#include "../threads.h"
#include "guarded.h"

OPENWORK_API const char* openwork_use_isa(const char* name);
OPENWORK_API const char* openwork_isa(int32_t rank);
OPENWORK_API void openwork_use_threads(openwork::ParallelFor parallel_for);
OPENWORK_API int64_t openwork_gemm_linear_scratch(const openwork::GemmLinear* call);
OPENWORK_API void openwork_gemm_linear(const openwork::GemmLinear* call);
OPENWORK_API int64_t openwork_gemm_conv2d_scratch(const openwork::GemmConv2d* call);
OPENWORK_API void openwork_gemm_conv2d(const openwork::GemmConv2d* call);
OPENWORK_API void openwork_gemv(const openwork::Gemv* gemv, int32_t dtype);
OPENWORK_API void openwork_dot_product(const openwork::DotProduct* dot_product, int32_t dtype, int64_t threads);
OPENWORK_API int64_t openwork_dot_product_scratch(const openwork::DotProduct* dot_product, int64_t threads);
OPENWORK_API void openwork_quantize(const float* x, int64_t N, int64_t count, uint8_t* to, float* scales, int32_t* bits);

namespace openwork_tests {

using openwork::Groups;
using openwork::Kernels;

void test_masks(const Kernels& kernels, Random& random);
void test_transpose(const Kernels& kernels, Random& random);
void test_gemm(const Kernels& kernels, Random& random);
void test_gemv(const Kernels& kernels, Random& random);
void test_dot_product(const Kernels& kernels, Random& random);
void test_quantize(const Kernels& kernels, Random& random);
void test_linear(const Kernels& kernels, Random& random);
void test_conv(const Kernels& kernels, Random& random);

}  // namespace openwork_tests
