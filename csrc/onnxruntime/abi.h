// What ONNX Runtime's C interface is to this library: the entries that it calls, by their place in the table `OrtApi`, and the
// struct by which an operator is registered. Both only ever grow at the end, and `GetApi(version)` gives null where the
// runtime is older: so no header of ONNX Runtime is needed. The places are those that ONNX Runtime itself asserts in
// onnxruntime/core/session/onnxruntime_c_api.cc, "Size of version N API cannot change".
#pragma once

#include <cstddef>
#include <cstdint>

namespace openwork {
namespace ort {

constexpr uint32_t kVersion = 17;  // of the interface: ONNX Runtime 1.17 brought ParallelFor, the newest entry here

struct Table;  // OrtApi
struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Value;
struct TypeInfo;
struct ShapeInfo;  // OrtTensorTypeAndShapeInfo
struct CustomOp;

struct ApiBase {
  const Table* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// The function at place INDEX of the table.
template <int INDEX, class Result, class... Arguments>
struct Entry {
  static Result call(const Table* table, Arguments... arguments) {
    typedef Result (*Function)(Arguments...);
    return ((const Function*)table)[INDEX](arguments...);
  }
};

// Since version 1.
typedef Entry<0, Status*, int, const char*> CreateStatus;
typedef Entry<26, Status*, const char*, Domain**> CreateCustomOpDomain;
typedef Entry<27, Status*, Domain*, const CustomOp*> CustomOpDomain_Add;
typedef Entry<28, Status*, SessionOptions*, Domain*> AddCustomOpDomain;
typedef Entry<51, Status*, Value*, void**> GetTensorMutableData;
typedef Entry<55, Status*, const TypeInfo*, const ShapeInfo**> CastTypeInfoToTensorInfo;
typedef Entry<60, Status*, const ShapeInfo*, int*> GetTensorElementType;
typedef Entry<61, Status*, const ShapeInfo*, size_t*> GetDimensionsCount;
typedef Entry<62, Status*, const ShapeInfo*, int64_t*, size_t> GetDimensions;
typedef Entry<65, Status*, const Value*, ShapeInfo**> GetTensorTypeAndShape;
typedef Entry<85, Status*, const KernelInfo*, const char*, float*> KernelInfoGetAttribute_float;
typedef Entry<86, Status*, const KernelInfo*, const char*, int64_t*> KernelInfoGetAttribute_int64;
typedef Entry<90, Status*, const KernelContext*, size_t, const Value**> KernelContext_GetInput;
typedef Entry<91, Status*, KernelContext*, size_t, const int64_t*, size_t, Value**> KernelContext_GetOutput;
typedef Entry<93, void, Status*> ReleaseStatus;
typedef Entry<98, void, TypeInfo*> ReleaseTypeInfo;
typedef Entry<99, void, ShapeInfo*> ReleaseTensorTypeAndShapeInfo;
// Since version 8.
typedef Entry<163, Status*, const KernelInfo*, const char*, int64_t*, size_t*> KernelInfoGetAttributeArray_int64;
// Since version 14.
typedef Entry<230, Status*, const KernelInfo*, size_t*> KernelInfo_GetInputCount;
typedef Entry<231, Status*, const KernelInfo*, size_t*> KernelInfo_GetOutputCount;
typedef Entry<232, Status*, const KernelInfo*, size_t, char*, size_t*> KernelInfo_GetInputName;
typedef Entry<234, Status*, const KernelInfo*, size_t, TypeInfo**> KernelInfo_GetInputTypeInfo;
// Since version 15.
typedef Entry<249, Status*, const KernelInfo*, size_t, int*, const Value**> KernelInfoGetConstantInput_tensor;
// Since version 17. body(user, i) for i in [0, total), `batch` calls at a time or 0.
typedef Entry<274, Status*, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*> KernelContext_ParallelFor;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kAnyType = 0, kFloat = 1, kUint8 = 2, kSigned8 = 3 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// OrtCustomOp. ONNX Runtime calls nothing that is newer than `version`.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Table*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Table*, const KernelInfo*, void** kernel);  // since version 16
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);  // since version 17
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);  // since version 18: not called
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace ort
}  // namespace openwork
