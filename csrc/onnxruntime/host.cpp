#include <atomic>
#include <thread>

#include "host.h"
#include "threads.h"

namespace openwork {
namespace ort {
namespace {

struct Host {
  const Table* table;
  const KernelContext* context;
  std::atomic<bool>* seen_threads;
};
thread_local Host host = {};

struct Work {
  int64_t count, pieces;
  RangeBody body;
  void* context;
  std::thread::id caller;
  std::atomic<bool> failed, elsewhere;
};

void run_piece(void* user, size_t i) {
  Work& work = *(Work*)user;
  if (std::this_thread::get_id() != work.caller) work.elsewhere.store(true, std::memory_order_relaxed);
  const int64_t piece = int64_t(i);
  try {
    work.body(piece * work.count / work.pieces, (piece + 1) * work.count / work.pieces, work.context);
  } catch (...) {  // the kernels raise nothing but that there is no memory
    work.failed.store(true, std::memory_order_relaxed);
  }
}

int32_t on_onnxruntime(int64_t first, int64_t last, int64_t grain, RangeBody body, void* context) {
  const int64_t count = last - first;
  if (!host.table) {  // a thread of the pool: what it was given is small enough
    body(first, last, context);
    return 0;
  }
  Work work{count, lesser(parts(count, grain), 4 * processors()), body, context, std::this_thread::get_id(), {false}, {false}};
  Status* status = KernelContext_ParallelFor::call(host.table, host.context, run_piece, size_t(work.pieces), 0, &work);
  if (work.elsewhere) host.seen_threads->store(true, std::memory_order_relaxed);
  if (status) ReleaseStatus::call(host.table, status);
  return status || work.failed;
}

// Before anything runs, since it is when the library is loaded.
__attribute__((constructor)) void use_threads_of_onnxruntime() { parallel_for_of_host = on_onnxruntime; }

}  // namespace

Threads::Threads(const Table* table, const KernelContext* context, std::atomic<bool>* seen_threads) {
  host = {table, context, seen_threads};
}
Threads::~Threads() { host = {}; }

int64_t processors() {
  static const int64_t count = std::thread::hardware_concurrency();
  return count > 1 ? count : 1;
}

Tensor tensor_of(const Table* table, const Value* value) {
  Tensor tensor;
  tensor.value = value;
  ShapeInfo* info = nullptr;
  check(GetTensorTypeAndShape::call(table, value, &info));
  size_t dims = 0;
  Status* status = GetTensorElementType::call(table, info, &tensor.type);
  if (!status) status = GetDimensionsCount::call(table, info, &dims);
  if (!status) tensor.shape.resize(dims);
  if (!status) status = GetDimensions::call(table, info, tensor.shape.data(), dims);
  ReleaseTensorTypeAndShapeInfo::call(table, info);
  if (!status) status = GetTensorMutableData::call(table, (Value*)value, (void**)&tensor.data);
  check(status);
  return tensor;
}

Tensor input_of(const Table* table, const KernelContext* context, size_t index) {
  const Value* value = nullptr;
  check(KernelContext_GetInput::call(table, context, index, &value));
  return tensor_of(table, value);
}

void* output_of(const Table* table, KernelContext* context, const std::vector<int64_t>& shape, size_t index) {
  Value* value = nullptr;
  void* data = nullptr;
  check(KernelContext_GetOutput::call(table, context, index, shape.data(), shape.size(), &value));
  check(GetTensorMutableData::call(table, value, &data));
  return data;
}

int64_t Node::number(const char* name) const {
  int64_t value = 0;
  check(KernelInfoGetAttribute_int64::call(table, info, name, &value));
  return value;
}

float Node::real(const char* name) const {
  float value = 0;
  check(KernelInfoGetAttribute_float::call(table, info, name, &value));
  return value;
}

std::vector<int64_t> Node::numbers(const char* name, size_t count) const {
  std::vector<int64_t> values(count);
  size_t found = count;
  check(KernelInfoGetAttributeArray_int64::call(table, info, name, values.data(), &found));
  if (found != count) throw Refused(std::string(name) + " has " + std::to_string(found) + " numbers; needed " + std::to_string(count));
  return values;
}

bool Node::has_input(size_t index) const {
  size_t count = 0, size = 0;
  check(KernelInfo_GetInputCount::call(table, info, &count));
  if (index >= count) return false;
  check(KernelInfo_GetInputName::call(table, info, index, nullptr, &size));
  return size > 1;  // an input that is left out has an empty name
}

Tensor Node::constant(size_t index, const char* name) const {
  int is_constant = 0;
  const Value* value = nullptr;
  if (has_input(index)) check(KernelInfoGetConstantInput_tensor::call(table, info, index, &is_constant, &value));
  if (!is_constant || !value) throw Refused(std::string(name) + " has to be a constant initializer");
  return tensor_of(table, value);
}

std::vector<int64_t> Node::input_shape(size_t index) const {
  TypeInfo* type = nullptr;
  check(KernelInfo_GetInputTypeInfo::call(table, info, index, &type));
  std::vector<int64_t> shape;
  const ShapeInfo* tensor = nullptr;
  size_t dims = 0;
  Status* status = CastTypeInfoToTensorInfo::call(table, type, &tensor);
  if (!status && tensor) status = GetDimensionsCount::call(table, tensor, &dims);
  if (!status) shape.resize(dims);
  if (!status && dims) status = GetDimensions::call(table, tensor, shape.data(), dims);
  ReleaseTypeInfo::call(table, type);
  check(status);
  return shape;
}

}  // namespace ort
}  // namespace openwork
