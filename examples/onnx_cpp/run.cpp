// Runs an ONNX file of `openwork export --to onnxruntime` from C++, on inputs of ones: neither Python nor torch.
//
//   g++ -std=c++17 run.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o run
//   LD_LIBRARY_PATH=ONNXRUNTIME/lib ./run net.onnx libopenwork_ort.so
//
// ONNXRUNTIME is an unpacked release of ONNX Runtime for C++. The second argument is a copy of the file of which
// `python -c "import openwork; print(openwork.onnxruntime_library())"` gives the path.
#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <vector>

static int run(const char* file, const char* library) {
  Ort::Env env;
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  options.RegisterCustomOpsLibrary(library);
  Ort::Session session(env, file, options);

  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  size_t size = 1;
  for (int64_t& length : shape) size *= size_t(length = length < 0 ? 1 : length);  // a dim that may vary
  std::vector<float> x(size, 1.0f);
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value input = Ort::Value::CreateTensor<float>(memory, x.data(), size, shape.data(), shape.size());

  Ort::AllocatorWithDefaultOptions allocator;
  const auto in = session.GetInputNameAllocated(0, allocator), out = session.GetOutputNameAllocated(0, allocator);
  const char *inputs[] = {in.get()}, *outputs[] = {out.get()};
  const std::vector<Ort::Value> found = session.Run(Ort::RunOptions{}, inputs, &input, 1, outputs, 1);

  const size_t count = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
  for (size_t i = 0; i < count; i++) std::printf("%.9g\n", double(found[0].GetTensorData<float>()[i]));
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run FILE.onnx libopenwork_ort.so\n");
    return 2;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const Ort::Exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
