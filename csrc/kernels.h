// What every instruction set provides, and what the library exports. No torch headers: a C ABI, loaded with ctypes.
//
//   O = outputs, K = reduction, B = rows of input (tokens, pixels), N:M = pattern, G = K / M groups
//
// One translation unit an instruction set (scalar.cpp, avx2.cpp, ...), compiled with its own flags, includes the
// kernels (*.inl) into an anonymous namespace and fills one table. dispatch.cpp chooses a table at run time.
// The .inl files use nothing from std:: that is inline, and functions here are static: of copies with one name the linker
// could keep the one that a newer CPU compiled.
#pragma once

#include <cstddef>
#include <cstdint>

namespace openwork {

// A weight as three nested dims in memory: groups of M run along `length`, their members `inner` elements apart.
// Linear (O, K): {O, K, 1}. Conv2d (O, C, R, S): {O, C, R * S}; channels_last: {O * R * S, C, 1}.
struct Groups {
  int64_t outer, length, inner;
  int32_t n, m;
};

static inline int64_t groups_of(const Groups& g) { return (g.length + g.m - 1) / g.m; }  // for each index of `outer`

// Where group number `group` of all begins. Its members and columns are one stretch of memory.
static inline int64_t start_of(const Groups& g, int64_t group) {
  return (group / groups_of(g) * g.length + group % groups_of(g) * g.m) * g.inner;
}

constexpr float kSmallest = 1.17549435e-38f;  // below it floats lose digits

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };
enum Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2 };  // kGelu: dot products of bytes alone

// One K-tile of a matmul whose lanes are columns of the input ("gemm"): `rows` outputs with `nnz` products each.
// Product j of an output adds values[j] * x[offsets[j] ...] (bytes) to `vectors` vectors of columns.
struct GemmTile {
  const void* values;       // (rows, nnz), the dtype of the weight; int8: (rows, nnz / 2) pairs of int16
  const uint16_t* offsets;  // (rows, nnz) and one more
  int64_t rows, nnz;
  const char* x;
  const float* from;  // partial sums to continue, or null: start at `bias`
  const float* bias;  // (rows) or null
  float* to;
  int64_t stride;  // floats between the sums of two outputs, in `from` and in `to`
  int32_t vectors;
  Activation activation;  // applied to what is written
};

// A matmul whose lanes are outputs ("gemv"): for each slot of a window of inputs, lanes of weights meet inputs that a
// permutation picks. `blocks` blocks of `lanes` outputs; K padded to whole windows.
struct Gemv {
  const void* values;       // (blocks, slots, lanes); bfloat16: (blocks, slots / 2 rounded up, lanes, 2)
  const uint32_t* indices;  // (blocks, words, lanes): the indices of `slots_per_word` slots in each word, low bits first
  int64_t windows, blocks;
  int32_t window, slots;    // slots a window
  const void* x;            // (batch, x_stride) float; int8: int32 with zero upper halves
  int64_t x_stride;
  const float* bias;        // (outputs) or null
  void* y;                  // (batch, y_stride) float; int8: int32 sums
  int64_t y_stride, outputs, batch;
  Activation activation;
};

// Gemv that are the output pixels of all images, their inputs numbered kernel position by kernel position, channels
// within: pieces of the images, which have their channels last.
struct Pixels {
  int64_t channels, H, W, outH, outW;
  int32_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, kernel_w;
};

// How sums of products with bytes become outputs, without a look at the inputs ("requantization"). A byte q stands for
// (q - zero) * scale. In this order, each line rounded once, to float32:
//
//   y  = sum * scales[o] + bias[o]          (the scale of the inputs is in `scales`)
//   y += residual                           or, of bytes, y = (residual - residual_zero) * residual_scale + y
//   y  = activation(y)
//   q  = y * y_inverse + y_zero             to the nearest whole number, ties to even, of 0 to 255; NaN gives 0
struct Requantize {
  const int32_t* sums;   // (outputs): all weights of each
  const void* residual;  // (batch, y_stride) bytes or floats, or null
  int32_t zero, residual_zero, y_zero;
  int32_t residual_is_float, y_is_float;
  float residual_scale, y_inverse;
};

// A matmul whose lanes are outputs and whose inputs are as short as the weights ("dot_product"): in each 32 bits of a vector
// two bfloat16, or four int8, of one output meet the inputs that a permutation picks from a window of one vector. Their
// products are added up as one: a step. K padded to whole windows.
struct DotProduct {
  const void* values;      // (blocks, windows, steps, lanes, 4 bytes): two bfloat16 or four int8 of a lane
  const uint8_t* indices;  // bfloat16: (blocks, windows, steps / 2 rounded up, lanes, 2, 2), the last those of two steps;
                           // int8: (blocks, windows, steps, lanes, 4)
  int64_t windows, blocks;
  const void* x;           // (batch, K) bfloat16, float for int8, rows x_stride apart; of pixels (N, H, W, channels),
  int64_t x_stride, K;     // bfloat16, or whole numbers plus 128 for int8; bytes where `requantize` is given
  const Pixels* pixels;    // or null
  char* packed;            // (batch, windows, vector): x in groups of rows, see `pack`; from row `packed_from` on
  int64_t packed_from;
  const float* bias;       // (outputs) or null
  const float* scales;     // int8: (outputs), and those of the inputs: (batch), of pixels (N)
  float* x_scales;
  void* y;                 // (batch, y_stride) bfloat16; int8: float
  int64_t y_stride, outputs, batch;
  int32_t steps;           // a window
  Activation activation;
  const Requantize* requantize;  // or null: int8 with a scale for each row or image, which is in x_scales
};

// Gemv of inputs that share what is loaded of the weight: groups of nearly the same size. Group g begins at row
// g * batch / groups.
constexpr int kDotProductBatch = 12;
static inline int64_t dot_product_groups(const DotProduct& d) { return (d.batch + kDotProductBatch - 1) / kDotProductBatch; }

// A weight as files hold it, one row of `length` weights after another, a last group filled up with zeros: of each group its
// n slots, and a code that says where they are (compress.inl).
struct Compressed {
  void* weight;  // (rows, length); null where it is only checked
  void* values;  // (rows, groups in a row, n)
  uint8_t* indices;
  int64_t rows, length;
  int32_t n, m, bytes;  // bytes: of one weight
  int32_t pruned_as;    // the dtype of a weight that is pruned on the way; kAsItIs where it is not
};
constexpr int32_t kAsItIs = -1;

// The slots of a weight as kernels hold them: tile by tile, in each row by row, the last group filled up with zeros. A slot
// has a value and the place of its input in the tile, times `step`.
struct Slots {
  const void* weight;  // (rows, length)
  void* values;
  uint16_t* offsets;
  int64_t rows, length, tile;  // tile: inputs, a multiple of m
  uint64_t counted;            // the bits of a weight that make it other than 0
  int32_t n, m, bytes, step, even;  // even: a row of a tile is filled up to an even number
};

// What the whole numbers of -127 to 127 that stand for some inputs are multiplied with, by the bits of the largest
// magnitude. NaN where an input is; 1 where there is nothing but zeros, or next to nothing.
static inline float scale_for(int32_t largest) {
  float value;
  __builtin_memcpy(&value, &largest, 4);
  return value / 127 < kSmallest ? 1 : value / 127;
}

// The nearest whole number, ties to even, of |value / scale| <= 127, in the low bits: adding 1.5 * 2^23 leaves no room for
// a fraction. Of what is not a number it is any.
static inline int32_t nearest(float value, float scale) {
  const float shifted = value / scale + 12582912.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  return bits;
}

// How many words hold the indices of all slots of one lane: a word holds whole windows, or a window whole words.
static inline int64_t words_of(int64_t windows, int64_t slots, int64_t in_word) {
  if (slots > in_word) return windows * ((slots + in_word - 1) / in_word);
  const int64_t together = in_word / slots;
  return (windows + together - 1) / together;
}

// How a file says which N of M are stored (docs/format.md): by one bit each where that is shorter, else by N indices.
static inline int width_of(int m) { return m > 1 ? 32 - __builtin_clz(uint32_t(m - 1)) : 0; }  // bits of one index
static inline bool uses_bitmask(int n, int m) { return m < n * width_of(m); }
static inline int code_bits(int n, int m) { return uses_bitmask(n, m) ? m : n * width_of(m); }

struct Kernels {
  const char* name;
  int32_t lanes;          // float32 in a vector
  int32_t gemm_vectors;  // most vectors of columns that `gemm` takes at once
  // Groups [first, last) of a weight, counted as outer * (length / m, rounded up). Any dtype but int8.
  void (*keep)(const Groups&, int32_t dtype, const void* weight, uint8_t* keep, int64_t first, int64_t last);
  void (*prune)(const Groups&, int32_t dtype, const void* weight, void* out, int64_t first, int64_t last);
  void (*decay)(const Groups&, int32_t dtype, const void* weight, const void* gradient, void* out, float rate,
                int64_t first, int64_t last);
  // What is told of groups [first, last), see counts.inl.
  void (*count_groups)(const Groups&, int32_t bytes, uint64_t counted, const void* weight, int64_t first, int64_t last, int64_t* to);
  void (*retained)(const Groups&, int32_t dtype, const void* weight, int64_t first, int64_t last, double* sums);
  // Groups [first, last) of a file's weight, `first` a multiple of 8: how many hold too many; whether they keep every rule.
  int64_t (*compress)(const Compressed&, int64_t first, int64_t last);
  int64_t (*slots)(const Slots&, int64_t first, int64_t last);  // rows: how many groups hold too many
  bool (*expand)(const Compressed&, int64_t first, int64_t last);
  void (*gemm)(const GemmTile&, int32_t dtype);  // float32, bfloat16, int8
  // Whether offsets are multiples of `row`, a power of two, and none is above `last`.
  bool (*rows_within)(const uint16_t* offsets, int64_t count, uint16_t last, uint16_t row);
  void (*gemv)(const Gemv&, int32_t dtype, int64_t first, int64_t last);  // blocks
  // bfloat16, int8; null where the processor has no such instructions. Packs groups [from, to), then multiplies them with
  // blocks [first, last).
  void (*pack)(const DotProduct&, int32_t dtype, int64_t from, int64_t to);
  void (*dot_product)(const DotProduct&, int32_t dtype, int64_t first, int64_t last, int64_t from, int64_t to);
  void (*quantize)(const float* x, int64_t count, float scale, uint8_t* to);  // whole numbers plus 128
  void (*to_bytes)(const float* x, int64_t count, float inverse, int32_t zero, uint8_t* to);  // as `Requantize` does
  void (*from_bytes)(const uint8_t* x, int64_t count, float scale, int32_t zero, float* to);
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);
  int32_t (*largest)(const float* x, int64_t count);  // the bits of the largest magnitude, NaN above all
  int64_t (*peak)(int64_t rounds, float* result);  // for benchmarks; result: one vector
  bool (*supported)();
};

}  // namespace openwork
