// Whether the AMX tile instructions for bf16 can be used.
#pragma once

#include <string>

namespace qk {

// Why not; empty if they can. The first call asks the operating system for permission, once for the whole process: the
// registers of the tiles (8 KiB per thread) are not saved and restored without it.
const std::string& amx_unavailable();

}  // namespace qk
