// Windows and products of pairs for instruction sets that have no permutation of their own here.
namespace openwork {
namespace {

constexpr bool kSlotsUnrolled = false;  // took three quarters of the time to compile scalar.cpp

template <int WINDOW> struct Window {
  const float* x;
  static Window at(const float* x) { return {x}; }
  Float pick(Int index) const {
    Float picked;
    for (int l = 0; l < kLanes; l++) picked[l] = x[index[l] & (WINDOW - 1)];
    return picked;
  }
};

inline Int dot_pairs(Int sum, Short a, Short b) {
  const Int low = ((Int)a << 16 >> 16) * ((Int)b << 16 >> 16), high = ((Int)a >> 16) * ((Int)b >> 16);
  return sum + low + high;
}

}  // namespace
}  // namespace openwork
