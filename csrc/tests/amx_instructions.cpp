// Takes the place of cpu/amx.cpp in builds for tests (QK_TRAP_AMX): AMX counts as available, and each tile instruction,
// which a processor without them refuses, is carried out in plain code when the signal SIGILL arrives. So the compiled
// GEMM runs as it is: its encodings, addresses and tile configuration, also what the compiler made of them.
//
// A processor that has AMX refuses, too, since nobody asks the operating system for permission here. What the
// instructions have to refuse by Intel's manual (an invalid configuration, tiles that were not configured or do not fit
// one another) ends the process with a message. About 2 us per instruction.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../cpu/amx.h"
#include "../cpu/plain_tiles.h"

namespace qk {
namespace {

// The memory operand of LDTILECFG.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "as the instruction reads it");

// Of a thread.
struct State {
  bool configured;
  PlainTile tiles[8];
};
thread_local State state;

[[noreturn]] void refuse(const char* why) {
  std::fprintf(stderr, "tests/amx_instructions.cpp: %s\n", why);
  std::abort();
}

// One instruction: VEX prefix of three bytes, opcode, ModRM and what follows it.
struct Instruction {
  const uint8_t* end;      // the next instruction
  int opcode, prefix;      // prefix: 0 none, 1 66, 2 F3, 3 F2
  int reg, rm, vvvv, mod;  // of ModRM, and the third register
  uint64_t address, index;

  Instruction(const uint8_t* at, const ucontext_t& context) {
    const uint8_t one = at[1], two = at[2], modrm = at[4];
    // Map 0F38, W0, 128 bits; tiles have numbers up to 7.
    if (at[0] != 0xC4 || (one & 0x1F) != 2 || (two & 0x84) != 0) refuse("SIGILL at another instruction than AMX's");
    opcode = at[3];
    prefix = two & 3;
    vvvv = ~(two >> 3) & 15;
    mod = modrm >> 6;
    reg = (modrm >> 3 & 7) | (one & 0x80 ? 0 : 8);
    rm = (modrm & 7) | (one & 0x20 ? 0 : 8);
    at += 5;
    address = index = 0;
    if (mod == 3) {
      end = at;
      return;
    }
    int base = rm;
    if ((modrm & 7) == 4) {
      const uint8_t sib = *at++;
      base = (sib & 7) | (one & 0x20 ? 0 : 8);
      const int number = (sib >> 3 & 7) | (one & 0x40 ? 0 : 8);
      if (number != 4) index = value(context, number) << (sib >> 6);
    }
    if (mod == 0 && (base & 7) == 5) refuse("an address without a base register");
    address = value(context, base);
    if (mod == 1) address += static_cast<int8_t>(*at++);
    if (mod == 2) {
      int32_t displacement;
      std::memcpy(&displacement, at, sizeof displacement);
      address += displacement;
      at += sizeof displacement;
    }
    end = at;
  }

  static uint64_t value(const ucontext_t& context, int number) {
    static constexpr int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(context.uc_mcontext.gregs[places[number]]);
  }
};

PlainTile& tile(int number) {
  if (!state.configured) refuse("a tile is used before LDTILECFG or after TILERELEASE");
  if (number > 7) refuse("there are 8 tiles");
  return state.tiles[number];
}

// All tiles of 16 rows of 64 bytes: others have no use in the GEMM, and would be a mistake of it.
void configure(const Config& config) {
  bool valid = config.palette == 1 && config.start_row == 0;
  for (uint8_t byte : config.reserved) valid = valid && byte == 0;
  for (int i = 0; i < 16; ++i) {
    valid = valid && config.row_bytes[i] == (i < 8 ? PlainTile::kRowBytes : 0);
    valid = valid && config.rows[i] == (i < 8 ? PlainTile::kRows : 0);
  }
  if (!valid) refuse("not the configuration of 8 tiles of 16 rows of 64 bytes");
  state.configured = true;
  for (PlainTile& one : state.tiles) one.zero();
}

void execute(const Instruction& op) {
  enum { kNone, k66, kF3, kF2 };
  const bool memory = op.mod != 3;
  if (op.opcode == 0x49 && op.prefix == kNone && memory && op.reg == 0) {
    configure(*reinterpret_cast<const Config*>(op.address + op.index));
  } else if (op.opcode == 0x49 && op.prefix == kNone && !memory && op.reg == 0 && op.rm == 0) {
    state.configured = false;
  } else if (op.opcode == 0x49 && op.prefix == kF2 && !memory && op.rm == 0) {
    tile(op.reg).zero();
  } else if (op.opcode == 0x4B && op.prefix == kF2 && memory && (op.rm & 7) == 4) {
    tile(op.reg).load(reinterpret_cast<const void*>(op.address), static_cast<int64_t>(op.index));
  } else if (op.opcode == 0x4B && op.prefix == kF3 && memory && (op.rm & 7) == 4) {
    tile(op.reg).store(reinterpret_cast<void*>(op.address), static_cast<int64_t>(op.index));
  } else if (op.opcode == 0x5C && op.prefix == kF3 && !memory) {
    // TDPBF16PS result, left, right: ModRM.reg, ModRM.rm, VEX.vvvv.
    if (op.reg == op.rm || op.reg == op.vvvv || op.rm == op.vvvv) refuse("TDPBF16PS takes three tiles");
    tile(op.reg).add_products(tile(op.rm), tile(op.vvvv));
  } else {
    refuse("SIGILL at another instruction than the GEMM's");
  }
}

void handle(int, siginfo_t*, void* given) {
  ucontext_t& context = *static_cast<ucontext_t*>(given);
  greg_t& pointer = context.uc_mcontext.gregs[REG_RIP];
  const Instruction op(reinterpret_cast<const uint8_t*>(pointer), context);
  execute(op);
  pointer = reinterpret_cast<greg_t>(op.end);
}

const bool installed = [] {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  return sigaction(SIGILL, &action, nullptr) == 0;
}();

}  // namespace

const std::string& amx_unavailable() {
  static const std::string reason = installed ? "" : "the handler of SIGILL could not be installed";
  return reason;
}

}  // namespace qk
