// The kernels for a CPU: whole norm–relu–convolutions, and the passes between PyTorch's convolutions. Each reads what it
// needs once and writes what it must once.
//
// The mathematics is in ../reference.py; the headers hold the loops, compiled here for several instruction sets, of which
// `ed_start` takes the best that the processor has. There is no Python and no PyTorch in this file: a plain shared
// library, called through ctypes, which runs on the OpenMP runtime that PyTorch has already started.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define X86 0
#endif
// Whether the compiler knows the instructions for pairs of bfloat16.
#if X86 && (defined(__clang__) || __GNUC__ >= 10)
#define X86_PAIRS 1
#else
#define X86_PAIRS 0
#endif

using Index = std::int64_t;

struct bf16 {
  std::uint16_t bits;
};
struct pair {
  bf16 first, second;
};

// A matrix of channels-last values: rows `ld` values apart.
template <class E> struct Matrix {
  E *data;
  Index ld;
};

// Images of pixels in lines in planes, and the window of a pool over them; sizes of missing dimensions are 1.
struct Volume {
  Index images, planes, lines, pixels;
  Index plane_window, line_window, pixel_window;
  Index planes_out() const { return planes / plane_window; }
  Index lines_out() const { return lines / line_window; }
  Index pixels_out() const { return pixels / pixel_window; }
  Index window() const { return plane_window * line_window * pixel_window; }
};

// Images of lines of pixels, and the window of a convolution over them: 1 or 3 in both directions, padded by half.
struct Grid {
  Index images, height, width, window;
  Index rows() const { return images * height * width; }
};

// The weight (out, in, taps) of a convolution, in whatever memory format.
template <class E> struct Weight {
  const E *data;
  Index out, in, taps, out_stride, in_stride, tap_stride;
};

// What a backward pass has done: infinite or undefined values are not for every kernel.
enum Backward { kNothingDone = 0, kNoWeight = 1, kDone = 2 }; // kNoWeight: all but the gradient of the weight

// ---- threads ----------------------------------------------------------------------------------------------------

struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*team)() = nullptr;
} openmp;

// Calls `work(chunk)` for every chunk, on the threads of PyTorch. Which thread takes a chunk changes no result.
template <class Work> void for_chunks(int chunks, const Work &work) {
  if (chunks <= 1 || !openmp.parallel) {
    for (int chunk = 0; chunk < chunks; ++chunk)
      work(chunk);
    return;
  }
  struct Call {
    const Work &work;
    int chunks;
  } call{work, chunks};
  openmp.parallel(
      [](void *data) {
        auto &call = *static_cast<Call *>(data);
        for (int chunk = openmp.thread(); chunk < call.chunks; chunk += openmp.team())
          call.work(chunk);
      },
      &call, static_cast<unsigned>(chunks), 0);
}

// The part of `n` things that belongs to a chunk.
struct Range {
  Index begin, end;
  Range(Index n, int chunk, int chunks) : begin(n * chunk / chunks), end(n * (chunk + 1) / chunks) {}
  Index size() const { return end - begin; }
};

// Too little work is not worth waking a thread for.
int chunks_for(Index things, Index values, int threads) {
  Index most = values / 16384;
  if (most > things)
    most = things;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

// The type in which values are computed: single precision, or double for doubles.
template <class E> struct ComputeType {
  using type = float;
};
template <> struct ComputeType<double> {
  using type = double;
};
template <class E> using Compute = typename ComputeType<E>::type;

// Rows that are summed up in the type of computation before they go to double precision.
constexpr Index kRowsPerSum = 32;
// Rows that share what is loaded for a group of channels.
constexpr Index kTile = 8;

// ---- the loops, once for each instruction set -------------------------------------------------------------------

#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN(instructions) PRAGMA(clang attribute push(__attribute__((target(instructions))), apply_to = function))
#define END PRAGMA(clang attribute pop)
#else
#define BEGIN(instructions) PRAGMA(GCC push_options) PRAGMA(GCC target(instructions))
#define END PRAGMA(GCC pop_options)
#endif
#define PAIRS 0 // whether there are instructions for pairs of bfloat16

namespace baseline {
constexpr int kVectorBytes = 16, kRegisters = X86 ? 16 : 32;
#include "loops.h"
#include "max_pool.h"
#include "mean.h"
#if !X86
#include "convolve.h"
#endif
} // namespace baseline

#if X86
BEGIN("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32, kRegisters = 16;
#include "loops.h"
#include "max_pool.h"
#include "mean.h"
#include "convolve.h"
} // namespace avx2
END
BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
constexpr int kVectorBytes = 64, kRegisters = 32;
#include "loops.h"
#include "max_pool.h"
#include "mean.h"
#include "convolve.h"
} // namespace avx512
END
#endif

#if X86_PAIRS
#undef PAIRS
#define PAIRS 1
BEGIN("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512_bf16 {
constexpr int kVectorBytes = 64, kRegisters = 32;
#include "loops.h"
#include "max_pool.h"
#include "mean.h"
#include "convolve.h"
} // namespace avx512_bf16
END
#endif

// ---- what Python calls ------------------------------------------------------------------------------------------

namespace {

enum Instructions { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
enum Type { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2 };

int instructions = kBaseline;

#if X86_PAIRS
// Whether processor and system have AMX tiles for bfloat16. No kernel here uses them; PyTorch's convolutions do.
bool has_amx() {
  unsigned a, b, c, d, saved_low, saved_high;
  constexpr unsigned kOsXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kTileState = 3u << 17;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave))
    return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile))
    return false;
  __asm__("xgetbv" : "=a"(saved_low), "=d"(saved_high) : "c"(0));
  return (saved_low & kTileState) == kTileState;
}
#endif

int best_instructions() {
#if X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
#if X86_PAIRS
    return !__builtin_cpu_supports("avx512bf16") ? kAvx512 : has_amx() ? kAmx : kAvx512Bf16;
#else
    return kAvx512;
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kAvx2;
#endif
  return kBaseline;
}

} // namespace

#if X86
#define FOR_TYPE(E, function, ...)                                                                                     \
  (instructions >= kAvx512  ? avx512::function<E>(__VA_ARGS__)                                                         \
   : instructions == kAvx2 ? avx2::function<E>(__VA_ARGS__)                                                            \
                           : baseline::function<E>(__VA_ARGS__))
#else
#define FOR_TYPE(E, function, ...) baseline::function<E>(__VA_ARGS__)
#endif
#if X86_PAIRS
#define FOR_BF16(E, function, ...)                                                                                     \
  (instructions >= kAvx512Bf16 ? avx512_bf16::function<E>(__VA_ARGS__) : FOR_TYPE(E, function, __VA_ARGS__))
#else
#define FOR_BF16 FOR_TYPE
#endif

// `E` is the element type in the arguments of the call.
#define DISPATCH(type, function, ...)                                                                                  \
  switch (type) {                                                                                                      \
  case kFloat32: {                                                                                                     \
    using E = float;                                                                                                   \
    FOR_TYPE(E, function, __VA_ARGS__);                                                                                \
    break;                                                                                                             \
  }                                                                                                                    \
  case kFloat64: {                                                                                                     \
    using E = double;                                                                                                  \
    FOR_TYPE(E, function, __VA_ARGS__);                                                                                \
    break;                                                                                                             \
  }                                                                                                                    \
  default: {                                                                                                           \
    using E = bf16;                                                                                                    \
    FOR_BF16(E, function, __VA_ARGS__);                                                                                \
  }                                                                                                                    \
  }

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

template <class E> static Matrix<E> matrix(void *data, Index ld) { return {static_cast<E *>(data), ld}; }
template <class E> static const Compute<E> *constants(const void *data) {
  return static_cast<const Compute<E> *>(data);
}

// Take the functions of a running OpenMP (all null: one thread) and instructions no better than `limit`; tells which.
EXPORT int ed_start(void *parallel, void *thread, void *team, int limit) {
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.thread = reinterpret_cast<decltype(openmp.thread)>(thread);
  openmp.team = reinterpret_cast<decltype(openmp.team)>(team);
  int best = best_instructions();
  instructions = best < limit ? best : limit;
  return instructions;
}

static Grid grid_of(const Index *sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3]}; }
template <class E> static Weight<E> weight_of(const void *data, const Index *sizes) {
  return {static_cast<const E *>(data), sizes[4], sizes[5], sizes[3] * sizes[3], sizes[6], sizes[7], sizes[8]};
}

#if X86
#define FLOAT_PRODUCT(call) (instructions >= kAvx512 ? avx512::call : avx2::call)
#else
#define FLOAT_PRODUCT(call) baseline::call
#endif
#if X86_PAIRS
#define BF16_PRODUCT(call) (instructions >= kAvx512Bf16 ? avx512_bf16::call : FLOAT_PRODUCT(call))
#else
#define BF16_PRODUCT FLOAT_PRODUCT
#endif
#define DISPATCH_PRODUCT(type, call)                                                                                   \
  if (type == kFloat32) {                                                                                              \
    using E = float;                                                                                                   \
    return FLOAT_PRODUCT(call);                                                                                        \
  } else {                                                                                                             \
    using E = bf16;                                                                                                    \
    return BF16_PRODUCT(call);                                                                                         \
  }

// Whether the kernel for a 3×3 window is faster than PyTorch's for images of this size.
EXPORT int ed_suits(int type, Index height, Index width) {
  return (type == kBfloat16 && instructions >= kAvx512Bf16) || FLOAT_PRODUCT(suits_winograd(height, width));
}

// out = convolution(relu(scale·x + shift)); with `moments` also the mean and the biased variance of `out`. Returns 0, and
// nothing of use is done, where with a window of 3 a result is not finite.
// `sizes`: images, height, width, window; output and input channels of the weight, and its strides for them and for taps.
EXPORT int ed_convolve(int type, void *x, Index ldx, const Index *sizes, const void *weight, const float *scale,
                        const float *shift, void *out, Index ldo, double *moments, int threads) {
  DISPATCH_PRODUCT(type, convolve<E>(matrix<E>(x, ldx), grid_of(sizes), weight_of<E>(weight, sizes), scale, shift,
                                     matrix<E>(out, ldo), moments, threads))
}

// Its backward pass: grad_x (+)= scale·g, with g the gradient at the rectifier's input; sums as in `ed_accumulate`; and
// the gradient of the weight, in its memory format, unless that is null. Returns a `Backward`.
EXPORT int ed_convolve_backward(int type, void *grad, Index ldgrad, void *x, Index ldx, const Index *sizes,
                                 const void *weight, const float *scale, const float *shift, const float *mean,
                                 void *grad_x, Index ldg, int add, void *grad_weight, double *sums, int threads) {
#define BACKWARD(kAdd)                                                                                                 \
  DISPATCH_PRODUCT(type, convolve_backward<kAdd>(matrix<E>(grad, ldgrad), matrix<E>(x, ldx), grid_of(sizes),           \
                                                 weight_of<E>(weight, sizes), scale, shift, mean,                      \
                                                 matrix<E>(grad_x, ldg), static_cast<E *>(grad_weight), sums, threads))
  if (add)
    BACKWARD(true)
  else
    BACKWARD(false)
#undef BACKWARD
}

// inverse = 1/sqrt(variance + eps), scale = weight·inverse, shift = bias − mean·scale; all in float32, or for
// activations in float64 in that.
EXPORT void ed_fold_norm(int type, const void *mean, const void *variance, const void *weight, const void *bias,
                         double eps, Index channels, void *inverse, void *scale, void *shift) {
  DISPATCH(type, fold_norm, constants<E>(mean), constants<E>(variance), constants<E>(weight), constants<E>(bias), eps,
           channels, static_cast<Compute<E> *>(inverse), static_cast<Compute<E> *>(scale),
           static_cast<Compute<E> *>(shift));
}

// out = relu(scale·x + shift); `out` has no gaps.
EXPORT void ed_prologue(int type, void *x, Index ldx, Index rows, Index channels, const void *scale, const void *shift,
                        void *out, int threads) {
  DISPATCH(type, prologue, matrix<E>(x, ldx), rows, channels, constants<E>(scale), constants<E>(shift),
           static_cast<E *>(out), threads);
}

// out = average_pool(relu(scale·x + shift)); `out` has no gaps; `volume` points to four sizes and three windows.
EXPORT void ed_prologue_pool(int type, void *x, Index ldx, const Index *volume, Index channels, const void *scale,
                             const void *shift, void *out, int threads) {
  Volume v{volume[0], volume[1], volume[2], volume[3], volume[4], volume[5], volume[6]};
  DISPATCH(type, prologue_pool, matrix<E>(x, ldx), v, channels, constants<E>(scale), constants<E>(shift),
           static_cast<E *>(out), threads);
}

// out = x (nowhere if null); with `moments`, (2, channels) doubles, they become the mean and the biased variance of
// these rows and of `before` rows of which they are that already.
EXPORT void ed_copy_moments(int type, void *x, Index ldx, Index rows, Index channels, void *out, Index ldo,
                            double *moments, Index before, int threads) {
  DISPATCH(type, copy_moments, matrix<E>(x, ldx), rows, channels, matrix<E>(out, ldo), moments, before, threads);
}

// g = 0 where scale·x + shift <= 0; grad_x (+)= scale·g; sums (2, channels) += Σg, Σg·(x − mean). `g` has no gaps.
EXPORT void ed_accumulate(int type, const void *g, void *x, Index ldx, Index rows, Index channels, const void *scale,
                          const void *shift, const void *mean, void *grad_x, Index ldg, int add, double *sums,
                          int threads) {
  DISPATCH(type, accumulate, static_cast<const E *>(g), matrix<E>(x, ldx), rows, channels, constants<E>(scale),
           constants<E>(shift), constants<E>(mean), matrix<E>(grad_x, ldg), add != 0, sums, threads);
}

// The same, where `g` is the gradient of the average pool's output; pixels outside whole windows are not touched.
EXPORT void ed_accumulate_pool(int type, const void *g, void *x, Index ldx, const Index *volume, Index channels,
                               const void *scale, const void *shift, const void *mean, void *grad_x, Index ldg, int add,
                               double *sums, int threads) {
  Volume v{volume[0], volume[1], volume[2], volume[3], volume[4], volume[5], volume[6]};
  DISPATCH(type, accumulate_pool, static_cast<const E *>(g), matrix<E>(x, ldx), v, channels, constants<E>(scale),
           constants<E>(shift), constants<E>(mean), matrix<E>(grad_x, ldg), add != 0, sums, threads);
}

// out = max_pool(relu(scale·x + shift)), window 3, stride 2, padding 1; or, if `out` is null, which tap it was, in `taken`.
EXPORT void ed_max_pool(int type, void *x, Index ldx, const Index *volume, Index channels, const void *scale,
                        const void *shift, void *out, Index ldo, std::uint8_t *taken, int threads) {
  Volume v{volume[0], volume[1], volume[2], volume[3], volume[4], volume[5], volume[6]};
  DISPATCH(type, max_pool, matrix<E>(x, ldx), v, channels, constants<E>(scale), constants<E>(shift),
           matrix<E>(out, ldo), taken, threads);
}

// Its backward pass, from what it put in `taken`: grad_x = scale·g; sums as in `ed_accumulate`.
EXPORT void ed_max_pool_backward(int type, void *grad, Index ldgrad, const std::uint8_t *taken, void *x, Index ldx,
                                 const Index *volume, Index channels, const void *scale, const void *shift,
                                 const void *mean, void *grad_x, Index ldg, double *sums, int threads) {
  Volume v{volume[0], volume[1], volume[2], volume[3], volume[4], volume[5], volume[6]};
  DISPATCH(type, max_pool_backward, matrix<E>(grad, ldgrad), taken, matrix<E>(x, ldx), v, channels,
           constants<E>(scale), constants<E>(shift), constants<E>(mean), matrix<E>(grad_x, ldg), sums, threads);
}

// out (images, channels) = the mean over all pixels of relu(scale·x + shift).
EXPORT void ed_mean(int type, void *x, Index ldx, Index images, Index pixels, Index channels, const void *scale,
                    const void *shift, void *out, Index ldo, int threads) {
  DISPATCH(type, mean, matrix<E>(x, ldx), images, pixels, channels, constants<E>(scale), constants<E>(shift),
           matrix<E>(out, ldo), threads);
}

// Its backward pass, from the gradient (images, channels): grad_x = scale·g; sums as in `ed_accumulate`.
EXPORT void ed_mean_backward(int type, void *grad, Index ldgrad, void *x, Index ldx, Index images, Index pixels,
                             Index channels, const void *scale, const void *shift, const void *mean, void *grad_x,
                             Index ldg, double *sums, int threads) {
  DISPATCH(type, mean_backward, matrix<E>(grad, ldgrad), matrix<E>(x, ldx), images, pixels, channels,
           constants<E>(scale), constants<E>(shift), constants<E>(mean), matrix<E>(grad_x, ldg), sums, threads);
}

// out = grad − constant − slope·(x − mean).
EXPORT void ed_finish(int type, void *grad, Index ldg, void *x, Index ldx, Index rows, Index channels, const void *mean,
                      const void *constant, const void *slope, void *out, Index ldo, int threads) {
  DISPATCH(type, finish, matrix<E>(grad, ldg), matrix<E>(x, ldx), rows, channels, constants<E>(mean),
           constants<E>(constant), constants<E>(slope), matrix<E>(out, ldo), threads);
}
