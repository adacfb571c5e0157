// GEMM and convolution with a compressed weight: bring the input into the form that the kernel reads, cut the work into tasks
// that threads share, bring the result into the form that the caller reads. Nothing here depends on the instruction set.
#include <atomic>
#include <cstring>

#include "api.h"
#include "memory.h"
#include "threads.h"

namespace openwork {
namespace {

constexpr int64_t kMostColumns = 128;  // of any instruction set
// Bytes behind the last tile of inputs: what an offset, of 16 bits, can reach at most. So a damaged weight, whoever changed it
// and when, reads nobody else's memory. What it computes is not returned: offsets are looked at in the first panel of columns.
constexpr int64_t kReach = (1 << 16) + kMostColumns * 4;

int64_t gemm_columns(const Kernels& k) { return int64_t(k.lanes) * k.gemm_vectors; }
int64_t bytes_of_input(const GemmWeight& w) { return w.dtype == kInt8 ? 2 : 4; }

// Products of one output in a tile that begins at input k.
int64_t nnz_of(const GemmWeight& w, int64_t k) {
  const int64_t nnz = lesser(w.tile, up(w.K, w.m) - k) / w.m * w.n;
  return w.dtype == kInt8 ? up(nnz, 2) : nnz;
}

// Outputs [first, last) of some columns, all tiles. `inputs(k)` gives the columns of the tile that begins at input k. `damaged`,
// if not null, is set where an offset is not that of an input of its tile.
template <class Inputs>
void outputs_of(const Kernels& kernels, const GemmWeight& w, int64_t first, int64_t last, int64_t vectors, float* sum,
                Activation activation, std::atomic<bool>* damaged, const Inputs& inputs) {
  const int64_t columns = gemm_columns(kernels), row = columns * bytes_of_input(w), value_bytes = w.dtype == kFloat32 ? 4 : 2;
  int64_t before = 0;
  for (int64_t k = 0; k < w.K; k += w.tile) {
    const int64_t nnz = nnz_of(w, k), at = before + first * nnz;
    GemmTile p{};
    p.values = (const char*)w.values + at * value_bytes;
    p.offsets = (const uint16_t*)w.offsets + at;
    p.rows = last - first;
    p.nnz = nnz;
    p.x = inputs(k);
    p.from = k ? sum : nullptr;
    p.bias = w.bias && w.dtype != kInt8 ? w.bias + first : nullptr;
    p.to = sum;
    p.stride = columns;
    p.vectors = int32_t(vectors);
    p.activation = k + w.tile >= w.K ? activation : kNone;
    const int64_t last_row = (lesser(w.tile, up(w.K, w.m) - k) - 1) * row;
    if (damaged && !kernels.rows_within(p.offsets, p.rows * nnz, uint16_t(last_row), uint16_t(row))) damaged->store(true);
    kernels.gemm(p, w.dtype);
    before += w.O * nnz;
  }
}

float activated(float value, Activation activation) { return activation == kRelu && value < 0 ? 0 : value; }

// int32 sums to floats, in place: the scale of each column of the input and of each output.
void rescale(const GemmWeight& w, int64_t first, int64_t last, float* sum, int64_t columns, int64_t count,
             const float* column_scales, Activation activation) {
  for (int64_t o = first; o < last; o++, sum += columns)
    for (int64_t c = 0; c < count; c++) {
      int32_t whole;
      std::memcpy(&whole, sum + c, 4);
      const float scale = column_scales[c] * w.scales[o];
      sum[c] = activated(float(whole) * scale + (w.bias ? w.bias[o] : 0), activation);
    }
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

Scratch scratch_of(const GemmLinear& call) { return {(float*)call.scratch, (char*)call.scratch + up(call.B * 4, 64)}; }

void pack_panel(const Kernels& kernels, const GemmLinear& call, int64_t first, int64_t count, char* to, const float* scales) {
  const int64_t columns = gemm_columns(kernels), K = call.weight.K, rest = up(K, call.weight.m) - K;
  const int64_t used = up(count, 2 * kernels.lanes), width = lesser(used, columns);
  const float* x = call.x + first * call.x_stride;
  std::memset(to + K * columns * bytes_of_input(call.weight), 0, rest * columns * bytes_of_input(call.weight));
  if (call.weight.dtype != kInt8) {
    float* panel = (float*)to;
    kernels.transpose(x, call.x_stride, count, K, panel, columns);
    for (int64_t k = 0; count < width && k < K; k++) std::memset(panel + k * columns + count, 0, (width - count) * 4);
    return;
  }
  int16_t* panel = (int16_t*)to;
  constexpr int64_t some = 16;
  float* part = memory<1>(some * columns);
  for (int64_t k = 0; k < K; k += some) {
    const int64_t inputs = lesser(some, K - k);
    kernels.transpose(x + k, call.x_stride, count, inputs, part, columns);
    for (int64_t i = 0; i < inputs; i++) {
      int16_t* to = panel + (k + i) * columns;
      for (int64_t c = 0; c < count; c++) to[c] = int16_t(nearest(part[i * columns + c], scales[first + c]));
      for (int64_t c = count; c < width; c++) to[c] = 0;
    }
  }
}

Status linear(const Kernels& kernels, const GemmLinear& call) {
  const GemmWeight& w = call.weight;
  std::atomic<bool> damaged{false};
  const int64_t columns = gemm_columns(kernels), panels = parts(call.B, columns);
  const int64_t panel_bytes = up(w.K, w.m) * columns * bytes_of_input(w);
  const Scratch scratch = scratch_of(call);
  if (w.dtype == kInt8)
    parallel_for(call.B, 1 + 16384 / w.K, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; b++) scratch.scales[b] = scale_for(kernels.largest(call.x + b * call.x_stride, w.K));
    });
  parallel_for(panels, 1 + 16384 / (w.K * columns), [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++)
      pack_panel(kernels, call, p * columns, lesser(columns, call.B - p * columns), scratch.inputs + p * panel_bytes, scratch.scales);
  });
  const int64_t block = outputs_of_task(w.O, panels), blocks = parts(w.O, block);
  parallel_for(panels * blocks, 1, [&](int64_t first, int64_t last) {
    float* sum = memory<0>(block * columns);
    for (int64_t task = first; task < last; task++) {
      const int64_t b = task / blocks * columns, count = lesser(columns, call.B - b);
      const int64_t o = task % blocks * block, end = lesser(o + block, w.O);
      const int64_t step = w.dtype == kInt8 ? 2 : 1, vectors = up(parts(count, kernels.lanes), step);
      const char* x = scratch.inputs + task / blocks * panel_bytes;
      const auto inputs = [=](int64_t k) { return x + k * columns * bytes_of_input(w); };
      outputs_of(kernels, w, o, end, vectors, sum, call.activation, b ? nullptr : &damaged, inputs);
      if (w.dtype == kInt8) rescale(w, o, end, sum, columns, count, scratch.scales + b, call.activation);
      kernels.transpose(sum, columns, end - o, count, call.y + b * call.y_stride + o, call.y_stride);
    }
  });
  return damaged ? kDamaged : kDone;
}

// ---- convolution ----
//
// The columns are the output pixels of all images, in order; the inputs are numbered kernel position by kernel position,
// channels within. A tile of inputs for one panel of pixels is gathered from shifted rows of the images. What that costs,
// the outputs share: where there are enough panels for all threads, or one thread, each gathers for itself, tile by tile;
// else all gather first, unless that would come back from memory.
constexpr int64_t kGatheredFirst = 4 << 20;  // bytes, at most

bool few_panels(const GemmConv2d& c, int64_t panels) { return panels < 2 * c.threads; }
int64_t gathered_first(const Kernels& kernels, const GemmConv2d& c, int64_t panels) {
  const int64_t bytes = panels * up(c.weight.K, c.weight.m) * gemm_columns(kernels) * bytes_of_input(c.weight);
  return c.threads > 1 && few_panels(c, panels) && bytes <= kGatheredFirst ? bytes : 0;
}

// Neighbouring pixels of one row of one output image, and where the first of them begins in the input.
struct Run {
  int64_t count, image, y, x;
};

int64_t runs_of(const GemmConv2d& c, int64_t q, int64_t count, Run* runs) {
  const int64_t pixels = c.outH * c.outW, size = c.groups * c.channels * c.H * c.W;
  int64_t found = 0;
  for (int64_t at = 0; at < count; at += runs[found++].count) {
    const int64_t pixel = (q + at) % pixels, column = pixel % c.outW;
    runs[found] = {lesser(c.outW - column, count - at), (q + at) / pixels * size,
                   pixel / c.outW * c.stride_h - c.pad_h, column * c.stride_w - c.pad_w};
  }
  return found;
}

// The pixels of one run in one channel, at one kernel position, which shifts them by (y, x).
template <class Input>
void gather_run(const GemmConv2d& c, const Run& run, const Input* plane, int64_t y, int64_t x, Input* to) {
  y += run.y, x += run.x;
  if (y < 0 || y >= c.H) return void(std::memset(to, 0, run.count * sizeof(Input)));
  const Input* from = plane + y * c.W;
  int64_t i = 0;
  for (; i < run.count && x < 0; i++, x += c.stride_w) to[i] = 0;
  if (c.stride_w == 1) {
    const int64_t stop = lesser(run.count, i + (x < c.W ? c.W - x : 0));
    for (; i + 8 <= stop; i += 8, x += 8) std::memcpy(to + i, from + x, 8 * sizeof(Input));
    for (; i < stop; i++, x++) to[i] = from[x];
  }
  for (; i < run.count && x < c.W; i++, x += c.stride_w) to[i] = from[x];
  for (; i < run.count; i++) to[i] = 0;
}

// Inputs [k, end) of group g for the pixels of some runs, `count` in all.
template <class Input>
void gather(const Kernels& kernels, const GemmConv2d& c, int64_t g, int64_t k, int64_t end, const Run* runs, int64_t count,
            Input* to) {
  const int64_t columns = gemm_columns(kernels), padded = up(c.channels, c.weight.m);
  const int64_t width = lesser(up(count, 2 * kernels.lanes), columns);
  int64_t channel = k % padded, column = k / padded % c.kernel_w, row = k / padded / c.kernel_w;
  for (; k < end; k++, to += columns) {
    const Input* plane = (const Input*)c.x + (g * c.channels + channel) * c.H * c.W;
    const int64_t filled = channel < c.channels ? count : 0;
    const Run* run = runs;
    for (int64_t at = 0; at < filled; at += run++->count)
      gather_run(c, *run, plane + run->image, row * c.dilation_h, column * c.dilation_w, to + at);
    std::memset(to + filled, 0, (width - filled) * sizeof(Input));
    if (++channel < padded) continue;
    channel = 0;
    if (++column == c.kernel_w) column = 0, row++;
  }
}

// Pixels [q, q + count) of outputs [o, end) from `sum` to y.
void scatter(const GemmConv2d& c, int64_t o, int64_t end, int64_t q, int64_t count, const float* sum, int64_t columns) {
  const int64_t pixels = c.outH * c.outW;
  for (int64_t at = 0; at < count;) {
    const int64_t n = (q + at) / pixels, pixel = (q + at) % pixels, some = lesser(pixels - pixel, count - at);
    float* to = c.y + (n * c.weight.O + o) * pixels + pixel;
    for (int64_t i = 0; i < end - o; i++) std::memcpy(to + i * pixels, sum + at + i * columns, some * 4);
    at += some;
  }
}

template <class Input>
Status conv_of(const Kernels& kernels, const GemmConv2d& c) {
  const GemmWeight& w = c.weight;
  std::atomic<bool> damaged{false};
  const int64_t columns = gemm_columns(kernels), pixels = c.outH * c.outW, all = c.N * pixels, panels = parts(all, columns);
  const int64_t inputs = up(w.K, w.m), outputs = w.O / c.groups, many = c.groups * panels;
  const bool together = gathered_first(kernels, c, many);
  const int64_t share = lesser(512, parts(outputs, few_panels(c, many) ? c.threads : 1));
  const int64_t block = together ? outputs_of_task(outputs, many) : share, blocks = parts(outputs, block);
  Input* gathered = (Input*)c.scratch;
  if (together)
    parallel_for(many * parts(inputs, w.tile), 1, [&](int64_t first, int64_t last) {
      Run runs[kMostColumns];
      for (int64_t task = first; task < last; task++) {
        const int64_t k = task / many * w.tile, q = task % panels * columns, g = task % many / panels;
        const int64_t count = lesser(columns, all - q);
        runs_of(c, q, count, runs);
        Input* to = gathered + (task % many * inputs + k) * columns;
        gather(kernels, c, g, k, lesser(k + w.tile, inputs), runs, count, to);
      }
    });
  parallel_for(many * blocks, 1, [&](int64_t first, int64_t last) {
    float *sum = memory<0>(block * columns), *tile = memory<1>(w.tile * columns + kReach / 4), *scales = memory<2>(columns);
    Run runs[kMostColumns];
    for (int64_t task = first; task < last; task++) {
      const int64_t panel = task / blocks, q = panel % panels * columns, count = lesser(columns, all - q), g = panel / panels;
      const int64_t o = g * outputs + task % blocks * block, end = lesser(o + block, (g + 1) * outputs);
      const int64_t vectors = up(parts(count, kernels.lanes), w.dtype == kInt8 ? 2 : 1);
      if (!together) runs_of(c, q, count, runs);
      outputs_of(kernels, w, o, end, vectors, sum, c.activation, q ? nullptr : &damaged, [&](int64_t k) {
        if (together) return (const char*)(gathered + (panel * inputs + k) * columns);
        gather(kernels, c, g, k, lesser(k + w.tile, inputs), runs, count, (Input*)tile);
        return (const char*)tile;
      });
      for (int64_t i = 0; c.x_scales && i < count; i++) scales[i] = c.x_scales[(q + i) / pixels];
      if (w.dtype == kInt8) rescale(w, o, end, sum, columns, count, scales, c.activation);
      scatter(c, o, end, q, count, sum, columns);
    }
  });
  return damaged ? kDamaged : kDone;
}

}  // namespace
}  // namespace openwork

using namespace openwork;

OPENWORK_API int64_t openwork_gemm_linear_scratch(const Kernels* kernels, const GemmLinear* call) {
  const int64_t columns = gemm_columns(*kernels), K = up(call->weight.K, call->weight.m);
  return up(call->B * 4, 64) + parts(call->B, columns) * K * columns * bytes_of_input(call->weight) + kReach;
}

OPENWORK_API int32_t openwork_gemm_linear(const Kernels* kernels, const GemmLinear* call) {
  return status_of([&] { return linear(*kernels, *call); });
}

OPENWORK_API int64_t openwork_gemm_conv2d_scratch(const Kernels* kernels, const GemmConv2d* c) {
  const int64_t columns = gemm_columns(*kernels), panels = c->groups * parts(c->N * c->outH * c->outW, columns);
  const int64_t bytes = gathered_first(*kernels, *c, panels);
  return bytes ? bytes + kReach : 0;
}

OPENWORK_API int32_t openwork_gemm_conv2d(const Kernels* kernels, const GemmConv2d* call) {
  const bool int8 = call->weight.dtype == kInt8;
  return status_of([&] { return int8 ? conv_of<int16_t>(*kernels, *call) : conv_of<float>(*kernels, *call); });
}
