// A stem in evaluation: a convolution, norm, relu and max pool, a few lines at a time, so that what the convolution makes,
// the largest tensor of a network, stays in the cache.
//
// The convolution has a wide window, with any stride, over an image of few channels, in whatever memory format. Lines of
// the image are copied to a scratch, channels-last and with zeros around them. There, what a line of the window reads are
// neighbours, for pixel after pixel of the result a stride apart: rows of a product, which overlap.
#pragma once

#include "max_pool.h"
#include "norms.h"
#include "pointwise.h"

BEGIN_LEVEL

class StemOfImage {
  static constexpr Index kPooled = 4; // lines that are pooled at a time
  const Stem &s;
  const Buffer<float> b; // the packed weight
  Index wide, line_size; // of a line in the scratch: pixels, values
  std::vector<Index> offsets;
  std::vector<float> inverse, scale, shift;

  Index depth() const { return s.window_width * s.channels; }
  const float *floats(const void *data) const { return static_cast<const float *>(data); }

  // Copies a line of the image, or zeros where there is none, and zeros beside it.
  void copy_line(const float *image, Index line, float *to) const {
    Index first = -s.horizontal_padding, begin = s.horizontal_padding < wide ? s.horizontal_padding : wide;
    Index end = first + wide > s.width ? s.width - first : wide;
    if (line < 0 || line >= s.height || begin >= end)
      begin = end = wide;
    std::memset(to, 0, begin * s.channels * sizeof(float));
    for (Index channel = 0; begin < end && channel < s.channels; ++channel) {
      const float *from = image + channel * s.channel_stride + line * s.line_stride + first * s.pixel_stride;
      for (Index i = begin; i < end; ++i)
        to[i * s.channels + channel] = from[i * s.pixel_stride];
    }
    std::memset(to + end * s.channels, 0, (wide - end) * s.channels * sizeof(float));
  }

  // Some lines of the convolution.
  void convolve(const float *image, Index line, Index lines, float *scratch, float *made) const {
    for (Index y = 0; y < (lines - 1) * s.vertical_stride + s.window_height; ++y)
      copy_line(image, line * s.vertical_stride - s.vertical_padding + y, scratch + y * line_size);
    for (Index i = 0; i < lines; ++i) {
      Matrix<float> to{made + i * s.pixels * s.outputs, s.outputs};
      const float *from = scratch + i * s.vertical_stride * line_size;
      Product<float> product{from,      s.horizontal_stride * s.channels, depth(),       b.data(),
                             s.outputs, s.window_height,                  offsets.data()};
      product.run(0, vectors_of(s.outputs), tiles_of(s.pixels), [](const Tile &) {},
                  [&](const Tile &tile) { store_tile(tile, to); });
    }
  }

  // A line of the pool, from the lines of the convolution around `line` that there are; they begin with number `first`.
  void pool(const float *made, Index first, Index line, float *out, Index ldo) const {
    Index begin = line > 0 ? line - 1 : 0, end = line + 2 < s.lines ? line + 2 : s.lines;
    for (Index x = 0; x < (s.pixels + 1) / 2; ++x, out += ldo) {
      Tap taps[9];
      int number = 0;
      for (Index y = begin; y < end; ++y)
        for (Index p = x ? 2 * x - 1 : 0; p < 2 * x + 2 && p < s.pixels; ++p, ++number)
          taps[number] = {(y - first) * s.pixels + p, number};
      for_channels<kW>(0, s.outputs,
                       MaxPoolBody<float>{made, s.outputs, taps, number, scale.data(), shift.data(), out, nullptr});
    }
  }

public:
  StemOfImage(const Stem &s, int threads)
      : s(s), b(packed<float>(floats(s.weight), s.window_height, depth(), depth(), 1, s.outputs,
                              s.window_height * depth(), threads)),
        wide((s.pixels - 1) * s.horizontal_stride + s.window_width), line_size(wide * s.channels), inverse(s.outputs),
        scale(s.outputs), shift(s.outputs) {
    for (Index y = 0; y < s.window_height; ++y)
      offsets.push_back(y * line_size);
    fold_norm(floats(s.mean), floats(s.variance), floats(s.norm_weight), floats(s.norm_bias), s.eps, s.outputs,
              inverse.data(), scale.data(), shift.data());
  }

  void run(Matrix<float> out, int threads) const {
    Index pooled = (s.lines + 1) / 2, all = s.images * pooled, row = s.pixels * s.outputs;
    int chunks = chunks_for(all, all * row, threads);
    for_chunks(chunks, [&](int chunk) {
      Buffer<float> scratch((2 * kPooled * s.vertical_stride + s.window_height) * line_size);
      Buffer<float> made((2 * kPooled + 1) * row);
      Range range(all, chunk, chunks);
      for (Index i = range.begin, n; i < range.end; i += n) {
        Index image = i / pooled, line = i % pooled;
        n = pooled - line < range.end - i ? pooled - line : range.end - i;
        n = n < kPooled ? n : kPooled;
        Index first = line ? 2 * line - 1 : 0, stop = 2 * (line + n) < s.lines ? 2 * (line + n) : s.lines, there = 0;
        if (line && i > range.begin) { // the last line of those before, which began with the first, or one earlier
          std::memcpy(made.data(), made.data() + (2 * kPooled - (line == kPooled)) * row, row * sizeof(float));
          there = 1;
        }
        const float *x = floats(s.x) + image * s.image_stride;
        convolve(x, first + there, stop - first - there, scratch.data(), made.data() + there * row);
        for (Index k = 0; k < n; ++k)
          pool(made.data(), first, 2 * (line + k), out.data + (i + k) * ((s.pixels + 1) / 2) * out.ld, out.ld);
      }
    });
  }
};

// False, and nothing of use is done, where a weight is not finite, for it is multiplied by the zeros around the image too.
inline bool evaluate_stem(const Stem &s, Matrix<float> out, int threads) {
  Index taps = s.window_height * s.window_width * s.channels;
  if (!is_finite(Matrix<const float>{static_cast<const float *>(s.weight), taps}, s.outputs, taps, 1))
    return false;
  StemOfImage(s, threads).run(out, threads);
  return true;
}

END_LEVEL
