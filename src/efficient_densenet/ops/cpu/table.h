// The functions of one level in a table for each type of activations: from what Python passes to the loops.
#pragma once

#include "average_pool.h"
#include "loops.h"
#include "max_pool.h"
#include "mean.h"
#include "norms.h"
#if CONVOLUTIONS
#include "layers.h"
#endif
#if CONVOLUTIONS && !PAIRS
#include "stem.h"
#endif

BEGIN_LEVEL

template <class E> struct Functions : Passed<E> {
  using Passed<E>::matrix, Passed<E>::vector;

  static void fold_norm(const void *mean, const void *variance, const void *weight, const void *bias, double eps,
                        Index channels, void *inverse, void *scale, void *shift) {
    LEVEL::fold_norm(vector(mean), vector(variance), vector(weight), vector(bias), eps, channels, vector(inverse),
                     vector(scale), vector(shift));
  }
  static void prologue(Rows x, Index rows, Index channels, Affine norm, void *out, int threads) {
    LEVEL::prologue(matrix(x), rows, channels, vector(norm.scale), vector(norm.shift), static_cast<E *>(out), threads);
  }
  static void prologue_pool(Rows x, const Volume *volume, Index channels, Affine norm, void *out, int threads) {
    LEVEL::prologue_pool(matrix(x), *volume, channels, vector(norm.scale), vector(norm.shift), static_cast<E *>(out),
                         threads);
  }
  static void copy_moments(Rows x, Index rows, Index channels, Rows out, double *moments, Index before, int threads) {
    LEVEL::copy_moments(matrix(x), rows, channels, matrix(out), moments, before, threads);
  }
  static void accumulate(const void *g, Rows x, Index rows, Index channels, Affine norm, Rows grad_x, int add,
                         double *sums, int threads) {
    auto run = add ? LEVEL::accumulate<true, E> : LEVEL::accumulate<false, E>;
    run(static_cast<const E *>(g), matrix(x), rows, channels, vector(norm.scale), vector(norm.shift), vector(norm.mean),
        matrix(grad_x), sums, threads);
  }
  static void accumulate_pool(const void *g, Rows x, const Volume *volume, Index channels, Affine norm, Rows grad_x,
                              int add, double *sums, int threads) {
    auto run = add ? LEVEL::accumulate_pool<true, E> : LEVEL::accumulate_pool<false, E>;
    run(static_cast<const E *>(g), matrix(x), *volume, channels, vector(norm.scale), vector(norm.shift),
        vector(norm.mean), matrix(grad_x), sums, threads);
  }
  static void max_pool(Rows x, const Volume *volume, Index channels, Affine norm, Rows out, std::uint8_t *argmax,
                       int threads) {
    LEVEL::max_pool(matrix(x), *volume, channels, vector(norm.scale), vector(norm.shift), matrix(out), argmax, threads);
  }
  static void max_pool_backward(Rows grad, const std::uint8_t *argmax, Rows x, const Volume *volume, Index channels,
                                Affine norm, Rows grad_x, double *sums, int threads) {
    LEVEL::max_pool_backward(matrix(grad), argmax, matrix(x), *volume, channels, vector(norm.scale), vector(norm.shift),
                             vector(norm.mean), matrix(grad_x), sums, threads);
  }
  static void mean(Rows x, Index images, Index pixels, Index channels, Affine norm, Rows out, int threads) {
    LEVEL::mean(matrix(x), images, pixels, channels, vector(norm.scale), vector(norm.shift), matrix(out), threads);
  }
  static void mean_backward(Rows grad, Rows x, Index images, Index pixels, Index channels, Affine norm, Rows grad_x,
                            double *sums, int threads) {
    LEVEL::mean_backward(matrix(grad), matrix(x), images, pixels, channels, vector(norm.scale), vector(norm.shift),
                         vector(norm.mean), matrix(grad_x), sums, threads);
  }
  static void finish(Rows grad, Rows x, Index rows, Index channels, const void *mean, const void *constant,
                     const void *slope, Rows out, int threads) {
    LEVEL::finish(matrix(grad), Flow<E>{matrix(x), vector(mean), vector(constant), vector(slope)}, rows, channels,
                  matrix(out), threads);
  }

#if CONVOLUTIONS
  static int suits(Index height, Index width) { return LEVEL::suits<E>(height, width); }
  static int convolve(Rows x, const Convolution *c, const void *weight, Affine norm, Rows out, double *moments,
                      int threads) {
    return LEVEL::convolve(matrix(x), grid_of(*c), weight_of<E>(*c, weight), vector(norm.scale), vector(norm.shift),
                           matrix(out), moments, threads);
  }
  static int convolve_backward(Rows grad, Rows x, const Convolution *c, const void *weight, Affine norm, Rows grad_x,
                               int add, void *grad_weight, double *sums, int threads) {
    auto run = add ? LEVEL::convolve_backward<true, E> : LEVEL::convolve_backward<false, E>;
    return run(matrix(grad), {}, matrix(x), grid_of(*c), weight_of<E>(*c, weight), vector(norm.scale),
               vector(norm.shift), vector(norm.mean), matrix(grad_x), static_cast<E *>(grad_weight), sums, threads);
  }
  static int run_layers(const Layers *layers, int fold, int measure, int threads) {
    return Block<E>(*layers, threads).forward(fold != 0, measure != 0);
  }
  static int run_layers_backward(const Layers *layers, const LayersBackward *operands, int threads) {
    return Block<E>(*layers, threads).backward(*operands);
  }
  static int evaluate(const Evaluation *evaluation, int threads) { return Block<E>::evaluate(*evaluation, threads); }
#endif
};

#if CONVOLUTIONS && !PAIRS
inline int evaluate_stem(const Stem *stem, Rows out, int threads) {
  return evaluate_stem(*stem, Passed<float>::matrix(out), threads);
}
#endif

// Convolutions of doubles, and of levels where none was measured to be faster, are PyTorch's.
template <class E> constexpr Kernels table() {
  using F = Functions<E>;
  Kernels kernels{};
  kernels.fold_norm = F::fold_norm;
  kernels.prologue = F::prologue, kernels.prologue_pool = F::prologue_pool;
  kernels.copy_moments = F::copy_moments;
  kernels.accumulate = F::accumulate, kernels.accumulate_pool = F::accumulate_pool;
  kernels.max_pool = F::max_pool, kernels.max_pool_backward = F::max_pool_backward;
  kernels.mean = F::mean, kernels.mean_backward = F::mean_backward;
  kernels.finish = F::finish;
#if CONVOLUTIONS
  if constexpr (!std::is_same<E, double>::value) {
    kernels.suits = F::suits, kernels.convolve = F::convolve, kernels.convolve_backward = F::convolve_backward;
    kernels.run_layers = F::run_layers, kernels.run_layers_backward = F::run_layers_backward;
    kernels.evaluate = F::evaluate;
  }
#endif
#if CONVOLUTIONS && !PAIRS
  if constexpr (std::is_same<E, float>::value)
    kernels.evaluate_stem = evaluate_stem;
#endif
  return kernels;
}

#if !PAIRS // a level for bfloat16 alone
extern const Kernels float32, float64;
const Kernels float32 = table<float>(), float64 = table<double>();
#endif
extern const Kernels bfloat16;
const Kernels bfloat16 = table<bf16>();

END_LEVEL
