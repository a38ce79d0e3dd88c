// What Python finds in this library: whole norm–relu–convolutions, and the passes between PyTorch's convolutions, in a
// table for each level of instructions and each type. There is no Python and no PyTorch in it: a plain shared library,
// called through ctypes, which runs on the OpenMP runtime that PyTorch has already started.

#include "interface.h"
#include "threads.h"

#if defined(__x86_64__)
#define X86 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#else
#define X86 0
#endif
#if X86 && (defined(__clang__) || __GNUC__ >= 10) // as in `avx512_bf16.cpp`
#define X86_PAIRS 1
#else
#define X86_PAIRS 0
#endif
#if X86 && (defined(__clang__) || __GNUC__ >= 11) // as in `amx.cpp`
#define X86_TILES 1
#else
#define X86_TILES 0
#endif
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

OpenMP openmp;

namespace baseline {
extern const Kernels float32, float64, bfloat16;
}
#if X86
namespace avx2 {
extern const Kernels float32, float64, bfloat16;
}
namespace avx512 {
extern const Kernels float32, float64, bfloat16;
}
namespace avx512_bf16 {
extern const Kernels bfloat16;
}
namespace amx {
extern const Kernels bfloat16;
}
#endif

namespace {

enum Instructions { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

#if X86
bool has_bf16() { // older compilers know no name for it
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

// Whether processor and system have AMX tiles for bfloat16, and this process may use them: Linux saves their registers
// only for a process that has asked for it.
bool has_amx() {
  unsigned a, b, c, d, saved_low, saved_high;
  constexpr unsigned kOsXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kTileState = 3u << 17;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave))
    return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile))
    return false;
  __asm__("xgetbv" : "=a"(saved_low), "=d"(saved_high) : "c"(0));
  if ((saved_low & kTileState) != kTileState)
    return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

} // namespace

// The best level of `Instructions` that this processor has; what the system refuses, it has not got.
EXPORT int ed_processor_instructions() {
#if X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return !has_bf16() ? kAvx512 : has_amx() ? kAmx : kAvx512Bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kAvx2;
#endif
  return kBaseline;
}

// The best level that this processor has and this library knows.
EXPORT int ed_best_instructions() {
  int known = X86_TILES ? kAmx : X86_PAIRS ? kAvx512Bf16 : X86 ? kAvx512 : kBaseline, there = ed_processor_instructions();
  return known < there ? known : there;
}

// The bytes of all structures that Python describes too: in another version of these sources they come to another number.
EXPORT int ed_interface_bytes() {
  return sizeof(Rows) + sizeof(Affine) + sizeof(Volume) + sizeof(Convolution) + sizeof(Reader) + sizeof(Layers) +
         sizeof(LayersBackward) + sizeof(Evaluation) + sizeof(Stem) + sizeof(Kernels);
}

// Take the functions of a running OpenMP; all null: one thread.
EXPORT void ed_use_openmp(void *parallel, void *thread, void *team) {
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.thread = reinterpret_cast<decltype(openmp.thread)>(thread);
  openmp.team = reinterpret_cast<decltype(openmp.team)>(team);
}

// The functions of a level, which must not be better than the best and the processor's, for activations of a type: 0 for
// float32, 1 for float64, 2 for bfloat16.
EXPORT const Kernels *ed_kernels(int level, int type) {
#define TABLES(level) {&level::float32, &level::float64, &level::bfloat16}
#if X86
  static const Kernels *const tables[][3] = {TABLES(baseline), TABLES(avx2), TABLES(avx512)};
#if X86_TILES
  if (level == kAmx && type == 2)
    return &amx::bfloat16;
#endif
#if X86_PAIRS
  if (level >= kAvx512Bf16 && type == 2)
    return &avx512_bf16::bfloat16;
#endif
  return tables[level < kAvx512 ? level : kAvx512][type];
#else
  (void)level; // there is one
  static const Kernels *const tables[3] = TABLES(baseline);
  return tables[type];
#endif
}
