// CUDA's conversions between numbers and their bits, with torch's half and bfloat16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

template <typename To, typename From>
To emulated_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulated_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
inline double __longlong_as_double(long long v) { return emulated_bits<double>(v); }
inline double __hiloint2double(int high, int low) {
  return emulated_bits<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline int __double2hiint(double v) { return static_cast<int>(emulated_bits<uint64_t>(v) >> 32); }
inline int __double2loint(double v) { return static_cast<int>(emulated_bits<uint64_t>(v)); }

using __half = torch::headeronly::Half;
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  torch::headeronly::BFloat16 x, y;
};
inline __half __ushort_as_half(unsigned short v) { return emulated_bits<__half>(v); }
inline float __half2float(__half v) { return static_cast<float>(v); }
inline __half2 __floats2half2_rn(float a, float b) { return {static_cast<__half>(a), static_cast<__half>(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {static_cast<torch::headeronly::BFloat16>(a), static_cast<torch::headeronly::BFloat16>(b)};
}
