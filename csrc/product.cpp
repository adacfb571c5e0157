// Products with a compressed weight: bring the input into the form that the kernels read, cut the work into tasks that
// threads share, bring the result into the form that the caller reads. Nothing here depends on the instruction set.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "api.h"
#include "threads.h"

namespace openwork {
namespace {

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts(int64_t value, int64_t step) { return (value + step - 1) / step; }

// Memory of one thread that grows and stays: partial sums.
float* sums(size_t floats) {
  struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.data = (float*)std::aligned_alloc(64, up(int64_t(floats * 4), 64));
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = floats;
  }
  return buffer.data;
}

int64_t columns_of_panel() { return int64_t(kernels->lanes) * kernels->panel_vectors; }
int64_t bytes_of_input(const PanelWeight& w) { return w.dtype == kInt8 ? 2 : 4; }

// Products of one output in a tile that begins at input k.
int64_t nnz_of(const PanelWeight& w, int64_t k) {
  const int64_t inputs = lesser(w.tile, up(w.K, w.m) - k), nnz = inputs / w.m * w.n * w.taps;
  return w.dtype == kInt8 ? up(nnz, 2) : nnz;
}

// Outputs [first, last) for the columns that x points at, all tiles; the sums go to `to`. `tile_bytes` lies between the
// inputs of two tiles, `wide` says whether offsets are int32.
void outputs_of(const PanelWeight& w, const void* offsets, bool wide, int64_t first, int64_t last, const char* x, int64_t tile_bytes, int64_t vectors,
                float* partial, float* to, int64_t to_stride, Activation activation) {
  const int64_t columns = columns_of_panel(), value_bytes = w.dtype == kFloat32 ? 4 : 2, offset_bytes = wide ? 4 : 2;
  int64_t before = 0;
  for (int64_t k = 0; k < w.K; k += w.tile, x += tile_bytes) {
    const int64_t nnz = nnz_of(w, k), at = before + first * nnz;
    const bool final = k + w.tile >= w.K;
    Panel p{};
    p.values = (const char*)w.values + at * value_bytes;
    p.offsets = (const char*)offsets + at * offset_bytes;
    p.rows = last - first;
    p.nnz = nnz;
    p.x = x;
    p.from = k ? partial : nullptr;
    p.from_stride = columns;
    p.bias = w.bias && w.dtype != kInt8 ? w.bias + first : nullptr;
    p.to = final ? to : partial;
    p.to_stride = final ? to_stride : columns;
    p.vectors = int32_t(vectors);
    p.activation = final ? activation : kNone;
    kernels->panel(p, w.dtype, wide);
    before += w.O * nnz;
  }
}

float activated(float value, Activation activation) { return activation == kRelu && value < 0 ? 0 : value; }

// int32 sums to floats, in place: the scales of the input (one a column, or one for all) and of the output.
void rescale(const PanelWeight& w, int64_t first, int64_t last, float* sum, int64_t count, const float* column_scales,
             bool one_scale, Activation activation) {
  for (int64_t o = first; o < last; o++, sum += columns_of_panel())
    for (int64_t c = 0; c < count; c++) {
      int32_t whole;
      std::memcpy(&whole, sum + c, 4);
      const float scale = column_scales[one_scale ? 0 : c] * w.scales[o];
      sum[c] = activated(float(whole) * scale + (w.bias ? w.bias[o] : 0), activation);
    }
}

float scale_of(const float* x, int64_t count, float largest = 0) {
  for (int64_t i = 0; i < count; i++) largest = std::fmax(largest, std::fabs(x[i]));
  return largest;
}

// Nearest whole number, ties to even, of |value / scale| <= 127: adding 1.5 * 2^23 leaves no room for a fraction.
int16_t quantized(float value, float scale) {
  const float large = 12582912.0f;
  return int16_t((value / scale + large) - large);
}

// Enough tasks for the threads to share evenly, none so small that it only fetches its inputs.
int64_t outputs_of_task(int64_t outputs, int64_t others) {
  int64_t block = 256;
  while (block > 32 && others * parts(outputs, block) < 16) block /= 2;
  return block;
}

struct Scratch {
  float* scales;
  char* inputs;
};

// ---- linear ----

Scratch scratch_of(const LinearCall& call) { return {(float*)call.scratch, (char*)call.scratch + up(call.B * 4, 64)}; }

void pack_panel(const LinearCall& call, int64_t first, int64_t count, char* to, const float* scales) {
  const int64_t columns = columns_of_panel(), K = call.weight.K, rest = up(K, call.weight.m) - K;
  const int64_t used = up(count, 2 * kernels->lanes), width = lesser(used, columns);
  const float* x = call.x + first * call.x_stride;
  std::memset(to + K * columns * bytes_of_input(call.weight), 0, rest * columns * bytes_of_input(call.weight));
  if (call.weight.dtype != kInt8) {
    float* panel = (float*)to;
    kernels->transpose(x, call.x_stride, count, K, panel, columns);
    for (int64_t k = 0; count < width && k < K; k++) std::memset(panel + k * columns + count, 0, (width - count) * 4);
    return;
  }
  int16_t* panel = (int16_t*)to;
  constexpr int64_t some = 16;
  float* part = sums(some * columns);
  for (int64_t k = 0; k < K; k += some) {
    const int64_t inputs = lesser(some, K - k);
    kernels->transpose(x + k, call.x_stride, count, inputs, part, columns);
    for (int64_t i = 0; i < inputs; i++) {
      int16_t* to = panel + (k + i) * columns;
      for (int64_t c = 0; c < count; c++) to[c] = quantized(part[i * columns + c], scales[first + c]);
      for (int64_t c = count; c < width; c++) to[c] = 0;
    }
  }
}

void linear(const LinearCall& call) {
  const PanelWeight& w = call.weight;
  const int64_t columns = columns_of_panel(), panels = parts(call.B, columns);
  const int64_t panel_bytes = up(w.K, w.m) * columns * bytes_of_input(w);
  const Scratch scratch = scratch_of(call);
  if (w.dtype == kInt8)
    parallel_for(call.B, 1 + 16384 / w.K, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; b++) {
        const float largest = scale_of(call.x + b * call.x_stride, w.K);
        scratch.scales[b] = largest > 0 ? largest / 127 : 1;
      }
    });
  parallel_for(panels, 1 + 16384 / (w.K * columns), [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++)
      pack_panel(call, p * columns, lesser(columns, call.B - p * columns), scratch.inputs + p * panel_bytes, scratch.scales);
  });
  const int64_t block = outputs_of_task(w.O, panels), blocks = parts(w.O, block);
  parallel_for(panels * blocks, 1, [&](int64_t first, int64_t last) {
    float* sum = sums(block * columns);
    for (int64_t task = first; task < last; task++) {
      const int64_t b = task / blocks * columns, count = lesser(columns, call.B - b);
      const int64_t o = task % blocks * block, end = lesser(o + block, w.O);
      const int64_t step = w.dtype == kInt8 ? 2 : 1, vectors = up(parts(count, kernels->lanes), step);
      const char* x = scratch.inputs + task / blocks * panel_bytes;
      outputs_of(w, w.offsets, false, o, end, x, w.tile * columns * bytes_of_input(w), vectors, sum, sum, columns, call.activation);
      if (w.dtype == kInt8) rescale(w, o, end, sum, count, scratch.scales + b, false, call.activation);
      kernels->transpose(sum, columns, end - o, count, call.y + b * call.y_stride + o, call.y_stride);
    }
  });
}

// ---- convolution ----
//
// The input is padded and, where the stride is not 1, sorted into stride_h x stride_w phases, so that neighbouring
// outputs of one row read neighbouring inputs whatever the kernel position. Outputs are numbered along the rows of that
// prepared input: a few at the end of each row are computed and dropped.

struct Prepared {
  int64_t phases, rows, row, plane, image;  // floats, but `rows`
  bool in_place;
};

Prepared prepared(const ConvCall& c) {
  Prepared p{};
  p.phases = int64_t(c.stride_h) * c.stride_w;
  p.rows = parts(c.H + 2 * c.pad_h, c.stride_h);
  p.row = c.row;
  p.plane = c.plane;
  p.image = up(c.weight.K, c.weight.m) * c.groups * c.plane;
  // The last panel is moved back so that it reads no further than the input: there must be room for it.
  const bool room = c.H * c.W >= columns_of_panel() || c.H * c.W % kernels->lanes == 0;
  p.in_place = room && c.plane == c.H * c.W && c.row == c.W && p.phases == 1 && !c.pad_h && !c.pad_w &&
               !c.channels_last && c.weight.dtype != kInt8 && c.weight.K % c.weight.m == 0;
  return p;
}

// What lies in the scratch: one scale for each image (int8), the offset of each position in a tile, the offset of each
// weight and one more, the prepared input unless it is used in place.
struct ConvScratch {
  float* scales;
  int32_t *table, *offsets;
  char* inputs;
  int64_t weights, bytes;
};

ConvScratch scratch_of(const ConvCall& c, const Prepared& p) {
  ConvScratch s{};
  for (int64_t k = 0; k < c.weight.K; k += c.weight.tile) s.weights += nnz_of(c.weight, k) * c.weight.O;
  char* at = (char*)c.scratch;
  s.scales = (float*)at;
  s.table = (int32_t*)(at += up(c.N * 4, 64));
  s.offsets = (int32_t*)(at += up(int64_t(c.weight.tile) * c.weight.taps * 4, 64));
  s.inputs = at += up((s.weights + 1) * 4, 64);
  // Reads beyond the last output of a panel reach one panel past the last plane.
  const int64_t inputs = p.in_place ? 0 : c.N * p.image + columns_of_panel();
  s.bytes = at - (char*)c.scratch + inputs * bytes_of_input(c.weight);
  return s;
}

// From positions in a tile, channel * taps + tap, to bytes in the prepared input, which depend on the size of the image.
void resolve_offsets(const ConvCall& c, const Prepared& p, const ConvScratch& s) {
  int32_t* entry = s.table;
  for (int64_t channel = 0; channel < c.weight.tile; channel++)
    for (int64_t y = 0; y < int64_t(c.kernel_h) * c.dilation_h; y += c.dilation_h)
      for (int64_t x = 0; x < int64_t(c.kernel_w) * c.dilation_w; x += c.dilation_w) {
        const int64_t phase = y % c.stride_h * c.stride_w + x % c.stride_w;
        const int64_t at = (phase * p.rows + y / c.stride_h) * p.row + x / c.stride_w;
        *entry++ = int32_t((channel * p.plane + at) * bytes_of_input(c.weight));
      }
  const uint16_t* positions = (const uint16_t*)c.weight.offsets;
  parallel_for(s.weights + 1, 65536, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) s.offsets[i] = s.table[positions[i]];
  });
}

// One channel of one image; `scale` is 0 unless the input is quantized.
template <class Input>
void prepare_plane(const ConvCall& c, const Prepared& p, const float* x, int64_t x_row, int64_t x_column, Input* to,
                   float scale) {
  std::memset(to, 0, p.plane * sizeof(Input));
  for (int64_t h = 0; h < c.H; h++) {
    const int64_t y = h + c.pad_h;
    for (int64_t phase = 0; phase < c.stride_w; phase++) {
      Input* row = to + ((y % c.stride_h * c.stride_w + phase) * p.rows + y / c.stride_h) * p.row;
      int64_t w = (phase - c.pad_w % c.stride_w + c.stride_w) % c.stride_w;  // the first that falls into this phase
      row += (w + c.pad_w) / c.stride_w;
      const float* from = x + h * x_row + w * x_column;
      if (sizeof(Input) == 4 && c.stride_w == 1 && x_column == 1) {
        std::memcpy(row, from, c.W * sizeof(float));
        continue;
      }
      for (; w < c.W; w += c.stride_w, from += c.stride_w * x_column)
        *row++ = sizeof(Input) == 2 ? Input(quantized(*from, scale)) : Input(*from);
    }
  }
}

template <class Input>
void prepare(const ConvCall& c, const Prepared& p, const ConvScratch& s) {
  const int64_t C = c.weight.K * c.groups, padded = up(c.weight.K, c.weight.m), pixels = c.H * c.W;
  Input* inputs = (Input*)s.inputs;
  if (sizeof(Input) == 2)
    for (int64_t n = 0; n < c.N; n++) {
      const float largest = scale_of(c.x + n * C * pixels, C * pixels);
      s.scales[n] = largest > 0 ? largest / 127 : 1;
    }
  parallel_for(c.N * c.groups * padded, 1 + 16384 / p.plane, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t n = i / (c.groups * padded), g = i / padded % c.groups, k = i % padded, channel = g * c.weight.K + k;
      Input* to = inputs + n * p.image + (g * padded + k) * p.plane;
      if (k >= c.weight.K)
        std::memset(to, 0, p.plane * sizeof(Input));
      else if (c.channels_last)
        prepare_plane(c, p, c.x + n * C * pixels + channel, c.W * C, C, to, s.scales[n]);
      else
        prepare_plane(c, p, c.x + (n * C + channel) * pixels, c.W, 1, to, s.scales[n]);
    }
  });
}

// Columns [q, q + count) of outputs [o, end) from `sum` to y, without what lies beyond the ends of rows.
void write(const ConvCall& c, int64_t n, int64_t o, int64_t end, int64_t q, int64_t count, const float* sum) {
  const int64_t columns = columns_of_panel(), pixels = c.outH * c.outW;
  for (int64_t at = 0; at < count;) {
    const int64_t row = (q + at) / c.row, column = (q + at) % c.row;
    const int64_t some = lesser(c.outW - column, count - at);
    if (some > 0 && c.channels_last) {
      float* to = c.y + ((n * c.outH + row) * c.outW + column) * c.weight.O + o;
      kernels->transpose(sum + at, columns, end - o, some, to, c.weight.O);
    } else if (some > 0) {
      float* to = c.y + (n * c.weight.O + o) * pixels + row * c.outW + column;
      for (int64_t i = 0; i < end - o; i++) std::memcpy(to + i * pixels, sum + at + i * columns, some * 4);
    }
    at += lesser(c.row - column, count - at);
  }
}

void conv(const ConvCall& c) {
  const PanelWeight& w = c.weight;
  const Prepared p = prepared(c);
  const int64_t columns = columns_of_panel(), lanes = kernels->lanes, size = bytes_of_input(w);
  const ConvScratch scratch = scratch_of(c, p);
  const char* inputs = p.in_place ? (const char*)c.x : scratch.inputs;
  resolve_offsets(c, p, scratch);
  if (!p.in_place && w.dtype == kInt8) prepare<int16_t>(c, p, scratch);
  else if (!p.in_place) prepare<float>(c, p, scratch);
  const int64_t all = (c.outH - 1) * c.row + c.outW, panels = parts(all, columns), outputs = w.O / c.groups;
  const int64_t block = outputs_of_task(outputs, c.N * c.groups * panels), blocks = parts(outputs, block);
  // Threads that follow one another share a panel's inputs.
  parallel_for(c.N * c.groups * panels * blocks, 1, [&](int64_t first, int64_t last) {
    float* sum = sums(block * columns);
    for (int64_t task = first; task < last; task++) {
      const int64_t panel = task / blocks % panels, g = task / blocks / panels % c.groups;
      const int64_t n = task / blocks / panels / c.groups;
      const int64_t o = g * outputs + task % blocks * block, end = lesser(o + block, (g + 1) * outputs);
      int64_t q = panel * columns, count = lesser(columns, all - q);
      const int64_t vectors = up(parts(count, lanes), w.dtype == kInt8 ? 2 : 1);
      if (p.in_place && q + vectors * lanes > all) q = all - vectors * lanes, count = vectors * lanes;  // read no further
      const char* x = inputs + (n * p.image + g * up(w.K, w.m) * p.plane + q) * size;
      const bool direct = w.dtype != kInt8 && !c.channels_last && c.row == c.outW && count == vectors * lanes;
      float* to = direct ? c.y + (n * w.O + o) * c.outH * c.outW + q : sum;
      const int64_t to_stride = direct ? c.outH * c.outW : columns;
      outputs_of(w, scratch.offsets, true, o, end, x, w.tile * p.plane * size, vectors, sum, to, to_stride, c.activation);
      if (w.dtype == kInt8) rescale(w, o, end, sum, count, scratch.scales + n, true, c.activation);
      if (!direct) write(c, n, o, end, q, count, sum);
    }
  });
}

}  // namespace
}  // namespace openwork

using namespace openwork;

OPENWORK_API int64_t openwork_linear_scratch(const LinearCall* call) {
  const int64_t columns = columns_of_panel(), K = up(call->weight.K, call->weight.m);
  return up(call->B * 4, 64) + parts(call->B, columns) * K * columns * bytes_of_input(call->weight);
}

OPENWORK_API void openwork_linear(const LinearCall* call) { linear(*call); }

OPENWORK_API int64_t openwork_conv_scratch(const ConvCall* call) { return scratch_of(*call, prepared(*call)).bytes; }

OPENWORK_API void openwork_conv(const ConvCall* call) { conv(*call); }

// Products of few rows: lanes are outputs. `batch` rows of x, which is padded to whole windows.
OPENWORK_API void openwork_rows(const Rows* rows, int32_t dtype) {
  const int64_t work = rows->windows * rows->slots * kernels->lanes * rows->batch;
  parallel_for(rows->blocks, 1 + 16384 / work, [&](int64_t first, int64_t last) { kernels->rows(*rows, dtype, first, last); });
}

// The sizes of the structs, by number, for a test of the mirror in Python; 0 past the last.
OPENWORK_API int64_t openwork_size_of(int32_t which) {
  const int64_t sizes[] = {sizeof(Groups), sizeof(PanelWeight), sizeof(LinearCall), sizeof(ConvCall), sizeof(Rows)};
  return which < 5 ? sizes[which] : 0;
}
