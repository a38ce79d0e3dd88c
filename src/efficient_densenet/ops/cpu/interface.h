// What Python passes to the kernels, and the table of functions that it calls. `library.py` mirrors all of it.
//
// There is one table for each level of instructions and each type of activations. The mathematics is in
// ../protocol.py: `scale` and `shift` are a folded norm's, `sums` are Σg and Σg·(x − mean) with g the gradient at the
// rectifier's input, and `threads` is how many may work on a call. What is one per channel is in the type of
// computation: double for double activations, float for others.
#pragma once

#include <cstdint>

using Index = std::int64_t;

// Activations: rows of channels, `ld` values apart.
struct Rows {
  void *data;
  Index ld;
};

// A norm of given statistics, one value for each channel.
struct Affine {
  const void *mean, *scale, *shift;
};

// Images of pixels in lines in planes, and the window of a pool over them; sizes of missing dimensions are 1.
struct Volume {
  Index images, planes, lines, pixels;
  Index plane_window, line_window, pixel_window;
};

// Images of lines of pixels, and a window over them of 1 or 3 in both directions, padded by half; the channels of its
// weight, and the weight's strides for them and from tap to tap, in whatever memory format.
struct Convolution {
  Index images, height, width, window;
  Index outputs, inputs, output_stride, input_stride, tap_stride;
};

// One norm–relu–convolution of the layers of a dense block.
struct Reader {
  Convolution convolution;
  const void *weight, *norm_weight, *norm_bias;
  const void *mean, *variance; // constants to use in place of the batch's statistics, or null
  double eps;
  Index first;      // the first channel that it reads, among those of `Layers::means`
  void *bottleneck; // its output, without gaps, or null: it makes features
  void *grad_weight; // in the backward pass; null: not wanted
};

// Consecutive layers of a dense block on one buffer.
struct Layers {
  Rows features;
  Index width; // channels before the first layer
  const Reader *readers;
  Index count, per_layer; // of readers: `per_layer` is 2 where each layer has a bottleneck
  void *means, *variances; // of the features, and behind them of the bottleneck outputs
  void *inverse, *scale, *shift; // of the folded norms, one after the other
};

// What the backward pass of layers reads and writes besides.
struct LayersBackward {
  Rows grad;            // of the features
  Index start;          // layers before this one are left out
  int made_again;       // whether bottleneck outputs have to be made first
  void *grad_bottleneck; // scratch for the gradient of one bottleneck output
  Index used;           // features before this one have statistics that norms use
  const void *values;   // how many values per channel those are of
  void *constant, *slope;          // what flows through the statistics of each channel so far, or null: nothing does
  void *grad_norm_weight, *grad_norm_bias; // one after the other, as the folded norms
};

// A dense block whose norms all have constants, and what follows it.
struct Evaluation {
  Rows x;              // the block's input; no data: the features begin with it already
  Layers layers;       // without vectors, and the readers without bottleneck outputs
  const Reader *end;   // of all features: the transition's, behind its pool, or the head's, without outputs; or null
  Volume pool;         // of the transition
  void *scratch;       // for the largest bottleneck output, and for what the pool makes
  Rows out;            // of the transition or the head
};

// A stem whose norm has constants: images in whatever memory format, a convolution of them by a channels-last weight, its
// norm and a max pool of window 3, stride 2 and padding 1.
struct Stem {
  Index images, channels, height, width;
  Index image_stride, channel_stride, line_stride, pixel_stride;
  Index window_height, window_width, vertical_stride, horizontal_stride, vertical_padding, horizontal_padding;
  Index lines, pixels, outputs; // what the convolution makes
  const void *x, *weight, *norm_weight, *norm_bias, *mean, *variance;
  double eps;
};

struct Kernels {
  // Whether the kernel for a 3×3 window is faster than PyTorch's for images of this size.
  int (*suits)(Index height, Index width);
  // out = convolution(relu(scale·x + shift)); with `moments` also the mean and the biased variance of `out`. Returns 0,
  // and nothing of use is done, where with a window of 3 a result is not finite.
  int (*convolve)(Rows x, const Convolution *, const void *weight, Affine, Rows out, double *moments, int threads);
  // Its backward pass: grad_x (+)= scale·g, the sums, and the gradient of the weight, in its memory format, unless that
  // is null. Returns 0, and nothing of use is done, where with a window of 3 a gradient or a weight is not finite.
  int (*convolve_backward)(Rows grad, Rows x, const Convolution *, const void *weight, Affine, Rows grad_x, int add,
                           void *grad_weight, double *sums, int threads);
  // The layers in their order: with `fold` norms are folded, with `measure` the statistics of what the layers make are
  // written. Returns how many layers were done before one that `convolve` leaves to PyTorch.
  int (*run_layers)(const Layers *, int fold, int measure, int threads);
  // Their backward pass, from the last to the first. When a layer's turn comes, what flows through the statistics of its
  // features is subtracted from their gradient already. Returns how many layers were done.
  int (*run_layers_backward)(const Layers *, const LayersBackward *, int threads);
  // The whole of it. Returns 0, and nothing of use is done, where `convolve` leaves a layer to PyTorch.
  int (*evaluate)(const Evaluation *, int threads);
  // out = max_pool(relu(norm(convolution(x)))). Returns 0, and nothing of use is done, where a weight is not finite.
  int (*evaluate_stem)(const Stem *, Rows out, int threads);
  // inverse = 1/sqrt(variance + eps), scale = weight·inverse, shift = bias − mean·scale.
  void (*fold_norm)(const void *mean, const void *variance, const void *weight, const void *bias, double eps,
                    Index channels, void *inverse, void *scale, void *shift);
  // out = relu(scale·x + shift), without gaps; or average_pool of that.
  void (*prologue)(Rows x, Index rows, Index channels, Affine, void *out, int threads);
  void (*prologue_pool)(Rows x, const Volume *, Index channels, Affine, void *out, int threads);
  // out = x (nowhere if null); with `moments`, (2, channels), they become the mean and the biased variance of these rows
  // and of `before` rows of which they are that already.
  void (*copy_moments)(Rows x, Index rows, Index channels, Rows out, double *moments, Index before, int threads);
  // grad_x (+)= scale·g, and the sums, where `g` without gaps is the gradient of what `prologue` made; or of what
  // `prologue_pool` made: pixels outside whole windows are not touched.
  void (*accumulate)(const void *g, Rows x, Index rows, Index channels, Affine, Rows grad_x, int add, double *sums,
                     int threads);
  void (*accumulate_pool)(const void *g, Rows x, const Volume *, Index channels, Affine, Rows grad_x, int add,
                          double *sums, int threads);
  // out = max_pool(relu(scale·x + shift)), window 3, stride 2, padding 1; or, if `out` is null, which tap it was.
  void (*max_pool)(Rows x, const Volume *, Index channels, Affine, Rows out, std::uint8_t *argmax, int threads);
  // Its backward pass from the argmax: grad_x = scale·g, and the sums.
  void (*max_pool_backward)(Rows grad, const std::uint8_t *argmax, Rows x, const Volume *, Index channels, Affine,
                            Rows grad_x, double *sums, int threads);
  // out (images, channels) = the mean over all pixels of relu(scale·x + shift).
  void (*mean)(Rows x, Index images, Index pixels, Index channels, Affine, Rows out, int threads);
  // Its backward pass: grad_x = scale·g, and the sums.
  void (*mean_backward)(Rows grad, Rows x, Index images, Index pixels, Index channels, Affine, Rows grad_x,
                        double *sums, int threads);
  // out = grad − constant − slope·(x − mean).
  void (*finish)(Rows grad, Rows x, Index rows, Index channels, const void *mean, const void *constant,
                 const void *slope, Rows out, int threads);
};
