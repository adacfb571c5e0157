// How a kernel talks with ONNX Runtime: errors, attributes, tensors, threads.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "abi.h"
#include "weight.h"

namespace openwork {
namespace ort {

// What ONNX Runtime answered, on its way back to it.
struct Failed {
  Status* status;
};
inline void check(Status* status) {
  if (status) throw Failed{status};
}

// Runs `body`, and gives what it raises as a status: no exception leaves the library.
template <class Body>
Status* status_of(const Table* table, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const Refused& refused) {
    return CreateStatus::call(table, kInvalidArgument, ("openwork: " + std::string(refused.what())).c_str());
  } catch (const std::bad_alloc&) {
    return CreateStatus::call(table, kFail, "openwork: no memory");
  } catch (...) {
    return CreateStatus::call(table, kFail, "openwork: an error inside of the library; please report it");
  }
}

struct Tensor {
  const Value* value = nullptr;
  int type = 0;
  std::vector<int64_t> shape;
  const void* data = nullptr;
  int64_t size() const {
    int64_t product = 1;
    for (int64_t length : shape) product *= length;
    return product;
  }
};
Tensor tensor_of(const Table* table, const Value* value);
Tensor input_of(const Table* table, const KernelContext* context, size_t index);
void* output_of(const Table* table, KernelContext* context, const std::vector<int64_t>& shape, size_t index = 0);

// A node while its kernel is made.
struct Node {
  const Table* table;
  const KernelInfo* info;
  int64_t number(const char* name) const;
  float real(const char* name) const;
  std::vector<int64_t> numbers(const char* name, size_t count) const;
  bool has_input(size_t index) const;
  Tensor constant(size_t index, const char* name) const;  // raises Refused where it is none
  std::vector<int64_t> input_shape(size_t index) const;   // negative: any; empty: not known
};

// Inside of its life the kernels of this thread run on the threads of `context`. `seen_threads` is set once a second one helped.
class Threads {
 public:
  Threads(const Table* table, const KernelContext* context, std::atomic<bool>* seen_threads);
  ~Threads();
  Threads(const Threads&) = delete;
};
int64_t processors();

}  // namespace ort
}  // namespace openwork
