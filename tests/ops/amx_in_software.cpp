// The tile registers of AMX in software, for processors that have none: there, their instructions are illegal, and this
// handler of the signal carries them out as Intel's architecture manual (volume 2) describes them. What the processor
// would refuse ends the program with a message. It knows nothing of the kernels: only of registers and memory.

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <xmmintrin.h>

// Where the program is linked to this library, all that it allocates is not a number at first: nothing may be made of what
// lies behind the rows of a tile.
extern "C" void *aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept {
  void *memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) ? nullptr : std::memset(memory, 0xff, bytes);
}

namespace {

constexpr int kRegisters = 8, kRows = 16, kRowBytes = 64;

// What LDTILECFG reads and STTILECFG writes.
struct Configuration {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64, "the manual's layout");

thread_local Configuration configuration; // all zero: not set up
thread_local std::uint8_t registers[kRegisters][kRows][kRowBytes];
std::atomic<long> products{0}, set_up{0}; // products carried out; threads whose registers are set up

[[noreturn]] void refuse(const char *why) {
  std::fprintf(stderr, "AMX in software: %s\n", why);
  std::abort();
}

bool is_set_up() { return configuration.palette != 0; }

// The registers as the manual calls them: what is read must be set up.
struct Tile {
  std::uint8_t (&row)[kRows][kRowBytes];
  int rows, row_bytes;
  explicit Tile(int i) : row(registers[i & 7]), rows(configuration.rows[i & 7]), row_bytes(configuration.row_bytes[i & 7]) {
    if (!is_set_up())
      refuse("a register is used before LDTILECFG");
    if (i >= kRegisters)
      refuse("there are eight registers");
    if (!rows || !row_bytes)
      refuse("a register is used that has no rows");
  }
  template <class T> T get(int r, int i) const {
    T x;
    std::memcpy(&x, row[r] + i * sizeof x, sizeof x);
    return x;
  }
};

void release() {
  set_up -= is_set_up();
  std::memset(&configuration, 0, sizeof configuration);
  std::memset(registers, 0, sizeof registers);
}

void load_configuration(const void *from) {
  Configuration c;
  std::memcpy(&c, from, sizeof c);
  if (c.palette > 1)
    refuse("there are palettes 0 and 1");
  release();
  if (!c.palette)
    return;
  for (std::uint8_t byte : c.reserved)
    if (byte)
      refuse("a reserved byte is not zero");
  if (c.start_row)
    refuse("a start in the middle of a register is not modelled");
  for (int i = 0; i < 16; ++i) {
    if (c.row_bytes[i] > kRowBytes || c.rows[i] > kRows)
      refuse("a register has 16 rows of 64 bytes");
    if (!c.row_bytes[i] != !c.rows[i] || (i >= kRegisters && c.rows[i]))
      refuse("rows without bytes, bytes without rows, or more than eight registers");
  }
  configuration = c;
  ++set_up;
}

float widened(std::uint16_t bits) {
  std::uint32_t wide = std::uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// TDPBF16PS: sums of even and of odd elements by fused operations, then both to the result; rounded to nearest even,
// denormal values taken and given as zero, whatever the thread's own settings are.
__attribute__((target("fma"))) void add_product(int to, int left, int right) {
  if (to == left || to == right || left == right)
    refuse("the three registers of a product must differ");
  Tile sum(to), a(left), b(right);
  if (a.row_bytes % 4 || b.row_bytes % 4 || sum.row_bytes % 4)
    refuse("rows of a product consist of words");
  if (sum.rows != a.rows || sum.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows)
    refuse("the sizes of a product do not fit");
  unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0); // nothing trapped, to nearest even, denormals are zero and are flushed to zero
  for (int m = 0; m < sum.rows; ++m) {
    float even[kRowBytes / 4] = {}, odd[kRowBytes / 4] = {};
    for (int k = 0; k < a.row_bytes / 4; ++k)
      for (int n = 0; n < sum.row_bytes / 4; ++n) {
        using Bits = std::uint16_t;
        even[n] = __builtin_fmaf(widened(a.get<Bits>(m, 2 * k)), widened(b.get<Bits>(k, 2 * n)), even[n]);
        odd[n] = __builtin_fmaf(widened(a.get<Bits>(m, 2 * k + 1)), widened(b.get<Bits>(k, 2 * n + 1)), odd[n]);
      }
    for (int n = 0; n < sum.row_bytes / 4; ++n) {
      float result = sum.get<float>(m, n) + (even[n] + odd[n]);
      std::memcpy(sum.row[m] + n * 4, &result, 4);
    }
    std::memset(sum.row[m] + sum.row_bytes, 0, kRowBytes - sum.row_bytes);
  }
  std::memset(sum.row[sum.rows], 0, (kRows - sum.rows) * kRowBytes);
  _mm_setcsr(before);
  ++products;
}

void load(int to, const std::uint8_t *memory, std::int64_t stride) {
  Tile tile(to);
  std::memset(tile.row, 0, sizeof tile.row);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.row[r], memory + r * stride, tile.row_bytes);
}

void save(int from, std::uint8_t *memory, std::int64_t stride) {
  Tile tile(from);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(memory + r * stride, tile.row[r], tile.row_bytes);
}

// An instruction with a VEX prefix of three bytes, and what it addresses.
struct Instruction {
  const std::uint8_t *code;
  const greg_t *general;
  int prefix = code[2] & 3, opcode = code[3], mode = code[4] >> 6, length = 5; // prefix: none, 66, F3, F2
  int reg = (code[4] >> 3 & 7) | (~code[1] >> 4 & 8), rm = (code[4] & 7) | (~code[1] >> 2 & 8), vvvv = ~code[2] >> 3 & 15;
  std::uint8_t *address = nullptr;
  std::int64_t stride = 0;

  bool is_of_tiles() const {
    return code[0] == 0xc4 && (code[1] & 31) == 2 && !(code[2] & 0x84) && (opcode == 0x49 || opcode == 0x4b || opcode == 0x5c);
  }
  std::int64_t value(int i) const {
    static const int places[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return general[places[i]];
  }
  // base + displacement; what is multiplied is the distance of rows, where the instruction has one.
  void find_address(bool has_stride) {
    bool has_index = (code[4] & 7) == 4;
    if (has_stride && !has_index)
      refuse("rows of a register are addressed by base and stride");
    int base = rm;
    if (has_index) {
      int sib = code[length++], index = (sib >> 3 & 7) | (~code[1] >> 3 & 8);
      base = (sib & 7) | (~code[1] >> 2 & 8);
      stride = index == 4 ? 0 : value(index) << (sib >> 6);
    }
    std::int64_t at = has_stride ? 0 : stride;
    std::int32_t distance = 0;
    if (mode == 1)
      distance = static_cast<std::int8_t>(code[length++]);
    bool without_base = mode == 0 && (base & 7) == 5;
    if (mode == 2 || without_base)
      std::memcpy(&distance, code + length, 4), length += 4;
    if (!without_base)
      at += value(base);
    else if (!has_index)
      at += reinterpret_cast<std::int64_t>(code) + length; // of the next instruction
    address = reinterpret_cast<std::uint8_t *>(at + distance);
  }
};

void handle(int, siginfo_t *, void *context) {
  greg_t *general = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
  Instruction i{reinterpret_cast<const std::uint8_t *>(general[REG_RIP]), general};
  if (!i.is_of_tiles()) {
    std::signal(SIGILL, SIG_DFL); // it is met again, and ends the program
    return;
  }
  if (i.opcode != 0x5c && i.vvvv)
    refuse("a field that must be empty is not");
  if (i.mode != 3)
    i.find_address(i.opcode == 0x4b);
  int kind = i.opcode << 4 | i.prefix << 1 | (i.mode == 3);
  if (kind == 0x490 && !i.reg) // LDTILECFG
    load_configuration(i.address);
  else if (kind == 0x492 && !i.reg) // STTILECFG
    std::memcpy(i.address, &configuration, sizeof configuration);
  else if (kind == 0x491 && !i.reg && !i.rm) // TILERELEASE
    release();
  else if (kind == 0x497 && !i.rm) // TILEZERO
    std::memset(Tile(i.reg).row, 0, sizeof registers[0]);
  else if (kind == 0x4b6 || kind == 0x4b2) // TILELOADD, TILELOADDT1
    load(i.reg, i.address, i.stride);
  else if (kind == 0x4b4) // TILESTORED
    save(i.reg, i.address, i.stride);
  else if (kind == 0x5c5) // TDPBF16PS
    add_product(i.reg, i.rm, i.vvvv);
  else
    refuse("an instruction that is not modelled");
  general[REG_RIP] += i.length;
}

__attribute__((constructor)) void start() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

} // namespace

// For tests: how many products were carried out, and how many threads have not released their registers.
extern "C" long amx_products() { return products; }
extern "C" long amx_set_up() { return set_up; }
