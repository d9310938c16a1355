// Numbers of a row as vectors of their accumulation dtype, for the innermost loops of norm_act on the CPU.
//
// 32 bfloat16 numbers in 64 bytes are 16 words of 32 bits. The upper half of a word is the number at an odd place,
// which needs only a mask to become a float, and the lower half the one at an even place, which needs a shift. So they
// are computed as two vectors, `Pairs`; widening 16 numbers in their order would take a second instruction.
#pragma once

#include <type_traits>

#include "normal_cdf_simd.h"
#include "simd.h"
#include "tensor_arguments.h"

namespace recontrast {
namespace {

// bfloat16 that the processor itself rounds to. Numbers below 2^-126 become zero.
struct NativeBFloat16 {
  uint16_t bits;
};
template <typename T>
constexpr bool kIsBFloat16 = std::is_same_v<T, torch::headeronly::BFloat16> || std::is_same_v<T, NativeBFloat16>;

struct Pairs {
  Float32 even, odd;  // the numbers at even and at odd places of 32
};
INLINE Pairs operator+(const Pairs& a, const Pairs& b) { return {a.even + b.even, a.odd + b.odd}; }
INLINE Pairs operator-(const Pairs& a, const Pairs& b) { return {a.even - b.even, a.odd - b.odd}; }
INLINE Pairs operator*(const Pairs& a, const Pairs& b) { return {a.even * b.even, a.odd * b.odd}; }
INLINE Pairs& operator+=(Pairs& a, const Pairs& b) { return a = a + b; }

// Numbers of type T are computed in vectors of this type.
template <typename T>
using Wide = std::conditional_t<kIsBFloat16<T>, Pairs, typename Lanes<Acc<T>>::V>;
template <typename T>
constexpr int64_t kLanes = sizeof(Wide<T>) / sizeof(Acc<T>);
constexpr int64_t kMostLanes = 32;

// Where numbers of each channel are in an array that is read with the vectors of T.
template <typename T>
int64_t place_of(int64_t c) {
  return kIsBFloat16<T> ? c / 32 * 32 + c % 2 * 16 + c % 32 / 2 : c;
}

// ---- numbers of each channel, in the order of place_of ----------------------------------------------------------

template <typename T>
INLINE Wide<T> load_wide(const Acc<T>* from) {
  if constexpr (kIsBFloat16<T>)
    return {load(from), load(from + 16)};
  else
    return load(from);
}

template <typename T>
INLINE void store_wide(Acc<T>* to, const Wide<T>& v) {
  if constexpr (kIsBFloat16<T>) {
    store(to, v.even);
    store(to + 16, v.odd);
  } else {
    store(to, v);
  }
}

template <typename T>
INLINE Wide<T> repeat(Acc<T> number) {
  if constexpr (kIsBFloat16<T>)
    return {Float32{} + number, Float32{} + number};
  else
    return Wide<T>{} + number;
}

// ---- features ---------------------------------------------------------------------------------------------------

INLINE Pairs widen_pairs(const Bits32& u) { return {bits<Float32>(u << 16), bits<Float32>(u & 0xffff0000)}; }

// Rounds to nearest, ties to even; the result is the upper half of each word.
INLINE Bits32 round_bfloat16(const Bits32& u) {
  const Bits32 nan = bits<Bits32>((u & 0x7fffffff) > 0x7f800000);
  return select(nan, u | 0x400000, u + 0x7fff + ((u >> 16) & 1));
}

INLINE Bits32 narrow_pairs(const Pairs& v) {
  return round_bfloat16(bits<Bits32>(v.even)) >> 16 | (round_bfloat16(bits<Bits32>(v.odd)) & 0xffff0000);
}

#ifdef NATIVE_BFLOAT16
// The same in two instructions. Intrinsics could not be inlined here: this function is compiled for no instruction set.
INLINE Bits32 narrow_pairs_natively(const Pairs& v) {
  typedef uint16_t Half32 __attribute__((vector_size(64)));
  Half32 h;  // all even numbers, then all odd ones
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(h) : "v"(v.even), "v"(v.odd));
  const Half32 order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return bits<Bits32>(__builtin_shuffle(h, order));
}
#endif

template <typename T>
INLINE auto narrow(const Wide<T>& v) {
#ifdef NATIVE_BFLOAT16
  if constexpr (std::is_same_v<T, NativeBFloat16>) return narrow_pairs_natively(v);
#endif
  if constexpr (kIsBFloat16<T>)
    return narrow_pairs(v);
  else if constexpr (sizeof(T) == 2)
    return narrow_half(bits<Bits32>(v));
  else
    return v;
}

template <typename T>
INLINE Wide<T> widen(const decltype(narrow<T>(Wide<T>{}))& stored) {
  if constexpr (kIsBFloat16<T>)
    return widen_pairs(stored);
  else if constexpr (sizeof(T) == 2)
    return bits<Float32>(widen_half(stored));
  else
    return stored;
}

// The first `n` numbers at `from`; the others are zero.
template <typename T>
INLINE Wide<T> read(const T* from, int64_t n = kLanes<T>) {
  decltype(narrow<T>(Wide<T>{})) stored{};
  std::memcpy(&stored, from, n * sizeof(T));
  return widen<T>(stored);
}

template <typename T>
INLINE void write(T* to, const Wide<T>& v, bool bypass_cache = false) {
  const auto stored = narrow<T>(v);
  if (bypass_cache)
    store_nontemporal(to, stored);
  else
    std::memcpy(static_cast<void*>(to), &stored, sizeof(stored));
}

template <typename T>
INLINE void write_first(T* to, const Wide<T>& v, int64_t n) {
  const auto stored = narrow<T>(v);
  std::memcpy(static_cast<void*>(to), &stored, n * sizeof(T));
}

// v rounded to type T.
template <typename T>
INLINE Wide<T> rounded(const Wide<T>& v) {
  return widen<T>(narrow<T>(v));
}

// ---- functions of numbers ---------------------------------------------------------------------------------------

// g where v is positive or NaN, else 0.
template <typename V>
INLINE V where_positive(const V& v, const V& g) {
  return v <= 0 ? V{} : g;
}
INLINE Pairs where_positive(const Pairs& v, const Pairs& g) {
  return {where_positive(v.even, g.even), where_positive(v.odd, g.odd)};
}

template <typename V>
INLINE V relu(const V& v) {
  return v < 0 ? V{} : v;  // NaN stays NaN
}
INLINE Pairs relu(const Pairs& v) { return {relu(v.even), relu(v.odd)}; }

INLINE Pairs gelu(const Pairs& v) { return {gelu(v.even), gelu(v.odd)}; }
INLINE Pairs gelu_slope(const Pairs& v) { return {gelu_slope(v.even), gelu_slope(v.odd)}; }

// Sets the numbers from place `n` on to zero.
template <typename V>
INLINE V first_lanes(V v, int64_t n) {
  for (int64_t k = n; k < static_cast<int64_t>(sizeof(V) / sizeof(v[0])); ++k) v[k] = 0;
  return v;
}
INLINE Pairs first_lanes(const Pairs& v, int64_t n) {
  return {first_lanes(v.even, (n + 1) / 2), first_lanes(v.odd, n / 2)};
}

template <typename V>
INLINE auto sum_lanes(const V& v) {
  auto total = v[0];
  for (int64_t k = 1; k < static_cast<int64_t>(sizeof(V) / sizeof(v[0])); ++k) total += v[k];
  return total;
}
INLINE float sum_lanes(const Pairs& v) { return sum_lanes<Float32>(v.even + v.odd); }

}  // namespace
}  // namespace recontrast
