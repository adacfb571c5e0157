// The structs that Python fills (openwork/kernels/cpu/native.py mirrors them, and a test compares their sizes), and how a call
// ends. A call is given its kernels: so it keeps them, whatever another thread chooses meanwhile.
#pragma once

#include <new>

#include "kernels.h"

#define OPENWORK_API extern "C" __attribute__((visibility("default")))

namespace openwork {

enum Status : int32_t { kDone = 0, kNoMemory = 1, kDamaged = 2 };  // kDamaged: an offset of the weight is none of its tile

// What `body` returns; no exception leaves the library.
template <class Body>
int32_t status_of(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// How the weight of a matmul lies in memory for the GEMM kernel: tiles of inputs, in each of them all outputs. `tile`
// inputs make a tile and the last tile is what is left. A tile holds, for each output, tile / m * n values, rounded up to
// even for int8 (with a zero), and as many offsets: bytes in a tile of inputs that has one row of columns for each.
struct GemmWeight {
  const void* values;       // float32, bfloat16; int16 for int8
  const uint16_t* offsets;  // one more than there are values
  const float* scales;      // int8: (O) else null
  const float* bias;        // (O) or null
  Dtype dtype;
  int32_t n, m, tile;
  int64_t K, O;  // inputs, outputs; of a convolution kernel positions * channels of one group, rounded up to M
};

struct GemmLinear {
  GemmWeight weight;
  const float* x;  // (B, K), rows x_stride apart
  float* y;        // (B, O), rows y_stride apart
  void* scratch;   // openwork_gemm_linear_scratch bytes
  int64_t B, x_stride, y_stride;
  Activation activation;
};

struct GemmConv2d {
  GemmWeight weight;     // O outputs of all groups
  const void* x;          // (N, groups * channels, H, W) float32; int8: int16
  const float* x_scales;  // int8: (N) else null
  float* y;               // (N, O, outH, outW)
  void* scratch;          // openwork_gemm_conv2d_scratch bytes
  int64_t threads;        // that will share the work
  int64_t N, channels, H, W, outH, outW;
  int32_t groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, kernel_w;
  Activation activation;
};

}  // namespace openwork
