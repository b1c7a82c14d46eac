// Element types of the logits: codes, widths, and conversions to and from fp32.
//
// 16-bit logits are exact inputs: widening loses nothing. Narrowing rounds to nearest even, once.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "macros.h"

namespace qk {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

QK_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

QK_HOST_DEVICE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

QK_HOST_DEVICE float widen(float x) { return x; }

QK_HOST_DEVICE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// The half-precision formulas serve single numbers and vectors of lanes: U is an unsigned 32-bit integer (or a vector
// of them), F the matching fp32 type.
template <class F, class U>
QK_HOST_DEVICE F reinterpret_as(U u) {
  static_assert(sizeof(F) == sizeof(U), "same bits");
  F f;
  memcpy(&f, &u, sizeof f);
  return f;
}

template <class F, class U>
QK_HOST_DEVICE F half_to_float(U bits) {
  const U sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  // Exponent and mantissa in place; the product moves the bias from 15 to 127 and normalises subnormals.
  const U finite = reinterpret_as<U>(reinterpret_as<F>(magnitude) * 0x1p112f);
  const U value = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : finite;
  return reinterpret_as<F>(value | sign);
}

template <class F, class U>
QK_HOST_DEVICE U float_to_half(F x) {
  const U u = reinterpret_as<U>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu, none = u - u;
  const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Subnormal: adding 0.5 puts the last kept bit at the end of the fp32 mantissa, so the addition rounds.
  const U subnormal = reinterpret_as<U>(reinterpret_as<F>(magnitude) + 0.5f) - 0x3f000000u;
  U half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? none + 0x7c00u : half;  // rounds to 65536 or more
  half = magnitude > 0x7f800000u ? none + 0x7e00u : half;   // NaN
  return half | sign;
}

QK_HOST_DEVICE float widen(Float16 x) { return half_to_float<float>(static_cast<uint32_t>(x.bits)); }

// Calls f with a null pointer of the element type of that code.
template <class F>
inline void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<const float*>(nullptr));
    case DType::kBFloat16: return f(static_cast<const BFloat16*>(nullptr));
    case DType::kFloat16: return f(static_cast<const Float16*>(nullptr));
  }
}

template <class P>
using Pointee = std::remove_const_t<std::remove_pointer_t<P>>;

template <class T>
T narrow(float x);

template <>
QK_HOST_DEVICE float narrow<float>(float x) {
  return x;
}

template <>
QK_HOST_DEVICE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

template <>
QK_HOST_DEVICE Float16 narrow<Float16>(float x) {
  return {static_cast<uint16_t>(float_to_half<float, uint32_t>(x))};
}

}  // namespace qk
