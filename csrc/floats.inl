// The 16-bit floats in plain C++: to float32 and back, rounding to nearest even, as torch does it.

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

template <int DTYPE, class T>
inline float to_float(T value) {
  if (DTYPE == kFloat32) return float_of(uint32_t(value));
  const uint32_t bits = uint16_t(value);
  if (DTYPE == kBFloat16) return float_of(bits << 16);
  const uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity and NaN
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float subnormal = float(int32_t(rest)) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

template <int DTYPE>
inline auto to_bits(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if constexpr (DTYPE == kFloat32) {
    return int32_t(bits);
  } else if constexpr (DTYPE == kBFloat16) {
    if (rest > 0x7f800000) return int16_t(sign | 0x7fc0);
    return int16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    if (rest > 0x7f800000) return int16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return int16_t(sign | 0x7c00);  // 65520 and more round to infinity
    if (rest < 0x38800000) {  // below the smallest normal: let float32 addition round at 2^-24
      const float shifted = float_of(rest) + 0.5f;
      return int16_t(sign | (bits_of(shifted) - 0x3f000000));
    }
    const uint32_t rebased = rest - (112u << 23);
    return int16_t(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
  }
}
