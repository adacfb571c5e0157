// Memory in which one byte too far is a crash, and random numbers that a seed repeats.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace openwork_tests {

struct Random {  // splitmix64
  uint64_t state;

  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t from(int64_t first, int64_t last) { return first + int64_t(next() % uint64_t(last - first + 1)); }
  bool one_in(int64_t count) { return next() % uint64_t(count) == 0; }
  float real() { return float(from(-1000000, 1000000)) / 1e6f; }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[next() % choices.size()];
  }
};

// `count` values between two pages that may not be touched: flush with the page behind or, as often, with the one before.
// AddressSanitizer watches the other end too. What nobody wrote is 0xa5 in every byte.
template <class T>
class Guarded {
 public:
  Guarded(Random& random, int64_t count, size_t alignment = alignof(T)) : count_(count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(count) * sizeof(T);
    inside_ = (bytes + page - 1) / page * page;
    all_ = inside_ + 2 * page;
    memory_ = (char*)mmap(nullptr, all_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    start_ = memory_ + page;
    if (memory_ == MAP_FAILED || (inside_ && mprotect(start_, inside_, PROT_READ | PROT_WRITE))) {
      perror("no memory for a test");
      exit(2);
    }
    memset(start_, 0xa5, inside_);
    const size_t before = random.one_in(2) ? 0 : (inside_ - bytes) / alignment * alignment;
    data_ = (T*)(start_ + before);
    ASAN_POISON_MEMORY_REGION(start_, before);
    ASAN_POISON_MEMORY_REGION(start_ + before + bytes, inside_ - bytes - before);
  }
  Guarded(const Guarded&) = delete;
  Guarded(Guarded&& other) noexcept
      : memory_(other.memory_), start_(other.start_), data_(other.data_), inside_(other.inside_), all_(other.all_), count_(other.count_) {
    other.memory_ = nullptr;
  }
  ~Guarded() {
    if (!memory_) return;
    ASAN_UNPOISON_MEMORY_REGION(start_, inside_);
    munmap(memory_, all_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }

 private:
  char *memory_, *start_;
  T* data_;
  size_t inside_, all_;
  int64_t count_;
};

// What a failure names: with it, `check 0 SEED` runs the same case again.
struct Case {
  const char *isa = "", *kind = "";
  uint64_t seed = 0;
};
inline Case current;

inline void say_where() {
  fprintf(stderr, "in %s on %s, seed %llu\n", current.kind, current.isa, (unsigned long long)current.seed);
}

template <class... A>
[[noreturn]] void fail(const char* format, A... arguments) {
  fprintf(stderr, format, arguments...);
  fputs(": ", stderr);
  say_where();
  exit(1);
}

}  // namespace openwork_tests
