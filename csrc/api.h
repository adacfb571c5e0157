// The structs that Python fills (openwork/kernels/native.py mirrors them, and a test compares their sizes).
#pragma once

#include "kernels.h"

#define OPENWORK_API extern "C" __attribute__((visibility("default")))

namespace openwork {

extern const Kernels* kernels;  // of the instruction set in use

// How the weight of a product lies in memory for the panel kernel: tiles of inputs, in each of them all outputs.
// `tile` inputs (channels) make a tile and the last tile is what is left; `taps` = kernel positions of a convolution.
// A tile holds, for each output, tile / m * n * taps values, rounded up to even for int8 (with a zero), and as many offsets:
// bytes in the packed input of a linear layer, positions channel * taps + tap of a convolution.
struct PanelWeight {
  const void* values;   // float32, bfloat16; int16 for int8
  const void* offsets;  // uint16, one more than there are values
  const float* scales;  // int8: (O) else null
  const float* bias;    // (O) or null
  Dtype dtype;
  int32_t n, m, tile, taps;
  int64_t K, O;         // inputs (channels of one group), outputs
};

struct LinearCall {
  PanelWeight weight;
  const float* x;  // (B, K), rows x_stride apart
  float* y;        // (B, O), rows y_stride apart
  void* scratch;   // openwork_linear_scratch bytes
  int64_t B, x_stride, y_stride;
  Activation activation;
};

struct ConvCall {
  PanelWeight weight;  // K channels of one group, O outputs of all groups
  const float* x;      // (N, C, H, W)
  float* y;            // (N, O, outH, outW)
  void* scratch;       // openwork_conv_scratch bytes
  int64_t N, H, W, outH, outW;
  int32_t groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, kernel_h, kernel_w;
  int32_t channels_last;  // of x and y
  int64_t plane, row;     // floats between channels and between rows of the prepared input, as the offsets assume
  Activation activation;
};

}  // namespace openwork
