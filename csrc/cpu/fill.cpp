// See fill.h.
#include "fill.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace qk {

#if defined(__x86_64__)
namespace {

constexpr size_t kLine = 64;

bool detect_clzero() {
  unsigned a, b, c, d;
  return __get_cpuid(0x80000008, &a, &b, &c, &d) && (b & 1);
}

}  // namespace

void fill_zero(void* data, size_t bytes) {
  static const bool has_clzero = detect_clzero();
  if (!has_clzero || bytes < 64 * kLine) {
    if (bytes) memset(data, 0, bytes);
    return;
  }
  char* begin = static_cast<char*>(data);
  char* end = begin + bytes;
  char* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + kLine - 1) & ~uintptr_t{kLine - 1});
  char* last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) & ~uintptr_t{kLine - 1});
  memset(begin, 0, static_cast<size_t>(first - begin));
  for (char* line = first; line < last; line += kLine) __asm__ volatile("clzero" : : "a"(line) : "memory");
  _mm_sfence();  // clzero is weakly ordered
  memset(last, 0, static_cast<size_t>(end - last));
}
#else
void fill_zero(void* data, size_t bytes) {
  if (bytes) memset(data, 0, bytes);
}
#endif

}  // namespace qk
