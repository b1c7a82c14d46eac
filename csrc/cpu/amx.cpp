// See amx.h.
#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace qk {
namespace {

#if defined(QK_NO_AMX)
std::string find_reason() { return "this build does not have it"; }
#elif defined(__x86_64__) && defined(__linux__)
// asm/prctl.h of Linux 5.16 and later
constexpr int kRequestPermission = 0x1023, kTileData = 18;

std::string find_reason() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBf16)) != (kTile | kBf16))
    return "the processor does not have it";
  // Palette 1 as this code needs it: 8 tiles of 1 KiB, 16 rows of 64 bytes.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || a >> 16 < 1024 || (b & 0xffff) < 64 || b >> 16 < 8 ||
      (c & 0xffff) < 16)
    return "the processor's tiles are smaller than 8 of 16 rows of 64 bytes";
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return "the operating system does not use XSAVE";
  unsigned enabled, high;
  __asm__ volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  if ((enabled >> 17 & 3) != 3) return "the operating system has not enabled it";
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return std::string("the operating system refuses it (arch_prctl: ") + std::strerror(errno) + ")";
  return "";
}
#else
std::string find_reason() { return "only x86-64 with Linux has it"; }
#endif

}  // namespace

const std::string& amx_unavailable() {
  static const std::string reason = find_reason();
  return reason;
}

}  // namespace qk
