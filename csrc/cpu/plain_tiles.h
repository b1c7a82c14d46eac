// The tile instructions of AMX that the GEMM uses, in plain code: for tests on processors that lack them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../core/elements.h"

namespace qk {

// Tiles of 16 rows of 64 bytes.
struct PlainTile {
  static constexpr int64_t kRows = 16, kRowBytes = 64;

  void zero() { std::memset(entries, 0, sizeof entries); }
  void load(const void* from, int64_t stride) {
    for (int64_t i = 0; i < kRows; ++i) std::memcpy(entries[i], static_cast<const char*>(from) + i * stride, kRowBytes);
  }
  void store(void* to, int64_t stride) const {
    for (int64_t i = 0; i < kRows; ++i) std::memcpy(static_cast<char*>(to) + i * stride, entries[i], kRowBytes);
  }

  // TDPBF16PS with this tile as its result, as Intel's manual has it: even and odd terms are added up apart from each
  // other; roundings to nearest even, subnormal inputs and results count as 0.
  void add_products(const PlainTile& left, const PlainTile& right) {
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t j = 0; j < 16; ++j) {
        float sums[2] = {0, 0};
        for (int64_t pair = 0; pair < 16; ++pair)
          for (int odd = 0; odd < 2; ++odd)
            sums[odd] = add_product(sums[odd], part(left.entries[i][pair], odd), part(right.entries[pair][j], odd));
        entries[i][j] = bits_of(flush(flush(float_of(entries[i][j])) + flush(sums[0] + sums[1])));
      }
  }

  uint32_t entries[kRows][16];

 private:
  static float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }
  // A fused multiplication and addition. Products of bf16 are exact in fp32 unless they are subnormal.
  static float add_product(float sum, float a, float b) {
    const float product = a * b;
    if (std::fabs(product) >= std::numeric_limits<float>::min()) return flush(sum + product);
    return flush(std::fma(a, b, sum));
  }
  static float part(uint32_t pair, int odd) { return flush(float_of(odd ? pair & 0xffff0000u : pair << 16)); }
};

}  // namespace qk
