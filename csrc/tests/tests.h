// The tests: each call makes one random case from the seed in `random`, and ends the program where it fails.
#pragma once

#include "../api.h"
#include "../threads.h"
#include "guarded.h"

using openwork::Kernels;

OPENWORK_API const Kernels* openwork_kernels(const char* name);
OPENWORK_API const char* openwork_isa(int32_t rank);
OPENWORK_API void openwork_use_threads(openwork::ParallelFor parallel_for);
OPENWORK_API int64_t openwork_gemm_linear_scratch(const Kernels*, const openwork::GemmLinear* call);
OPENWORK_API int32_t openwork_gemm_linear(const Kernels*, const openwork::GemmLinear* call);
OPENWORK_API int64_t openwork_gemm_conv2d_scratch(const Kernels*, const openwork::GemmConv2d* call);
OPENWORK_API int32_t openwork_gemm_conv2d(const Kernels*, const openwork::GemmConv2d* call);
OPENWORK_API int32_t openwork_gemv(const Kernels*, const openwork::Gemv* gemv, int32_t dtype);
OPENWORK_API int32_t openwork_dot_product(const Kernels*, const openwork::DotProduct* d, int32_t dtype, int64_t threads);
OPENWORK_API int64_t openwork_dot_product_scratch(const Kernels*, const openwork::DotProduct* d, int64_t threads);
OPENWORK_API int32_t openwork_quantize(const Kernels*, const float* x, int64_t N, int64_t count, uint8_t* to, float* scales,
                                       int32_t* bits);
OPENWORK_API int32_t openwork_to_bytes(const Kernels*, const float* x, int64_t count, float inverse, int32_t zero, uint8_t* to);
OPENWORK_API int32_t openwork_from_bytes(const Kernels*, const uint8_t* x, int64_t count, float scale, int32_t zero, float* to);

namespace openwork_tests {

using openwork::Compressed;
using openwork::Groups;

Groups random_groups(Random& random);

void test_masks(const Kernels& kernels, Random& random);
void test_compress(const Kernels& kernels, Random& random);
void test_counts(const Kernels& kernels, Random& random);
void test_retained(const Kernels& kernels, Random& random);
void test_transpose(const Kernels& kernels, Random& random);
void test_gemm(const Kernels& kernels, Random& random);
void test_gemv(const Kernels& kernels, Random& random);
void test_dot_product(const Kernels& kernels, Random& random);
void test_bytes(const Kernels& kernels, Random& random);
void test_there_and_back(const Kernels& kernels, Random& random);
void test_quantize(const Kernels& kernels, Random& random);
void test_linear(const Kernels& kernels, Random& random);
void test_conv(const Kernels& kernels, Random& random);
void test_onnxruntime(const Kernels& kernels, Random& random);

}  // namespace openwork_tests
