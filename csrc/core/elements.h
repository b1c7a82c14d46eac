// Element types of the logits: codes, widths, and conversions to and from fp32.
//
// 16-bit logits are exact inputs: widening loses nothing. Narrowing rounds to nearest even, once.
#pragma once

#include <cstdint>
#include <cstring>

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

QK_HOST_DEVICE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // Exponent and mantissa in place; the product moves the bias from 15 to 127 and normalises subnormals.
  const float value = magnitude >= (0x7c00u << 13) ? float_of(magnitude | 0x7f800000u)
                                                   : float_of(magnitude) * 0x1p112f;
  return float_of(bits_of(value) | sign);
}

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
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts the last kept bit at the end of the fp32 mantissa, so the addition rounds.
    const float shifted = float_of(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

}  // namespace qk
