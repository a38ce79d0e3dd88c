// The stem's norm, relu and max pool: window 3, stride 2, padding 1 in every direction of `Volume` whose window is 3.
#pragma once

#include "vectors.h"

BEGIN_LEVEL

// Of one direction: the input pixel that an output looks at by each tap.
struct Direction {
  Index size, window;
  Index outputs() const { return window == 1 ? size : (size + 1) / 2; }
  // The input pixel of a tap; it may lie outside.
  Index input(Index output, Index tap) const { return window == 1 ? output : 2 * output + tap - 1; }
  bool inside(Index input) const { return 0 <= input && input < size; }
};

struct Directions {
  Direction z, y, x;
  explicit Directions(const Volume &v)
      : z{v.planes, v.plane_window}, y{v.lines, v.line_window}, x{v.pixels, v.pixel_window} {}
  Index lines_out() const { return z.outputs() * y.outputs(); }
};

// A row of a matrix, and by which tap of a window it is looked at.
struct Tap {
  Index row;
  int number;
};

// As the ordinary network would have stored it: what is compared must be rounded, for rounding makes ties.
template <class E, int W> inline vector<Compute<E>, W> rounded(vector<Compute<E>, W> v) {
  if constexpr (std::is_same<E, bf16>::value) {
    bf16 stored[W];
    store<W>(stored, v);
    return load<W>(stored);
  }
  return v;
}

template <class E> struct MaxPoolBody {
  const E *x;
  Index ldx;
  const Tap *taps;
  int number;
  const Compute<E> *scale, *shift;
  E *out;
  std::uint8_t *argmax;
  template <int W> void run(Index c) const {
    using V = vector<Compute<E>, W>;
    V a = load<W>(scale + c), b = load<W>(shift + c);
    V best = V{} - 1, where{};
    for (int i = 0; i < number; ++i) {
      V s = rounded<E, W>(rectify(load<W>(x + taps[i].row * ldx + c) * a + b));
      auto better = (s > best) | (s != s); // of equal values the first; a NaN stays
      best = better ? s : best;
      where = better ? V{} + static_cast<Compute<E>>(taps[i].number) : where;
    }
    if (out)
      store<W>(out + c, best);
    else
      for (int i = 0; i < W; ++i)
        argmax[c + i] = static_cast<std::uint8_t>(where[i]);
  }
};

// out = max_pool(relu(scale·x + shift)); or, where `out` has no data, which tap that was, in `argmax` without gaps.
template <class E>
void max_pool(Matrix<E> x, const Volume &v, Index channels, const Compute<E> *scale, const Compute<E> *shift,
              Matrix<E> out, std::uint8_t *argmax, int threads) {
  Directions d(v);
  Index lines = v.images * d.lines_out();
  int chunks = chunks_for(lines, lines * d.x.outputs() * channels * v.plane_window * v.line_window * v.pixel_window, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(lines, chunk, chunks);
    Tap taps[27];
    for (Index line = range.begin; line < range.end; ++line) {
      Index oy = line % d.y.outputs(), oz = line / d.y.outputs() % d.z.outputs(), image = line / d.lines_out();
      for (Index ox = 0; ox < d.x.outputs(); ++ox) {
        int number = 0, tap = 0;
        for (Index tz = 0; tz < v.plane_window; ++tz)
          for (Index ty = 0; ty < v.line_window; ++ty)
            for (Index tx = 0; tx < v.pixel_window; ++tx, ++tap) {
              Index z = d.z.input(oz, tz), y = d.y.input(oy, ty), p = d.x.input(ox, tx);
              if (d.z.inside(z) && d.y.inside(y) && d.x.inside(p))
                taps[number++] = {((image * v.planes + z) * v.lines + y) * v.pixels + p, tap};
            }
        Index row = line * d.x.outputs() + ox;
        for_channels<widest<E>()>(0, channels,
                                  MaxPoolBody<E>{x.data, x.ld, taps, number, scale, shift,
                                                 out.data ? out.data + row * out.ld : nullptr,
                                                 argmax ? argmax + row * channels : nullptr});
      }
    }
  });
}

// The windows that a pixel lies in, at most two in each direction.
struct Windows {
  int number = 0;
  Tap taps[8];
};

template <class E> struct MaxPoolBackwardBody {
  const E *grad_out;
  Index ldgrad;
  const std::uint8_t *argmax;
  Index channels;
  const Windows *windows; // of each row
  const E *x;
  Index ldx;
  E *grad_x;
  Index ldg;
  Index rows;
  const Compute<E> *scale, *shift, *mean;
  Compute<E> *first, *second;
  template <int W> void run(Index c) const {
    using V = vector<Compute<E>, W>;
    typedef std::uint8_t Bytes __attribute__((vector_size(W)));
    V a = load<W>(scale + c), b = load<W>(shift + c), m = load<W>(mean + c);
    V s1 = load<W>(first + c), s2 = load<W>(second + c);
    for (Index r = 0; r < rows; ++r) {
      V g{};
      for (int i = 0; i < windows[r].number; ++i) {
        Tap window = windows[r].taps[i];
        Bytes bytes;
        std::memcpy(&bytes, argmax + window.row * channels + c, sizeof bytes);
        auto here = __builtin_convertvector(bytes == static_cast<std::uint8_t>(window.number), decltype(g == g));
        g += here ? load<W>(grad_out + window.row * ldgrad + c) : V{};
      }
      V value = load<W>(x + r * ldx + c);
      g = where_positive(rounded<E, W>(value * a + b), g);
      store<W>(grad_x + r * ldg + c, a * g);
      s1 += g;
      s2 += g * (value - m);
    }
    store<W>(first + c, s1), store<W>(second + c, s2);
  }
};

// g = the gradients of the windows whose maximum a pixel is; then grad_x = scale·g, and sums as in `accumulate`.
template <class E>
void max_pool_backward(Matrix<E> grad_out, const std::uint8_t *argmax, Matrix<E> x, const Volume &v, Index channels,
                       const Compute<E> *scale, const Compute<E> *shift, const Compute<E> *mean, Matrix<E> grad_x,
                       double *sums, int threads) {
  Directions d(v);
  Index lines = v.images * v.planes * v.lines;
  int chunks = chunks_for(lines, lines * v.pixels * channels, threads);
  std::vector<Sums<Compute<E>>> parts(chunks, Sums<Compute<E>>(channels));
  // Of a direction, the outputs that look at an input: in pairs of output and tap, at most two of them.
  auto looking = [](const Direction &direction, Index input, Index (*found)[2]) {
    int number = 0;
    for (Index tap = direction.window - 1; tap >= 0; --tap) {
      Index twice = direction.window == 1 ? 2 * input : input + 1 - tap;
      if (twice % 2 == 0 && twice >= 0 && twice / 2 < direction.outputs())
        found[number][0] = twice / 2, found[number][1] = tap, ++number;
    }
    return number;
  };
  for_chunks(chunks, [&](int chunk) {
    Range range(lines, chunk, chunks);
    Sums<Compute<E>> &part = parts[chunk];
    Index zs[2][2], ys[2][2], xs[2][2];
    for (Index line = range.begin; line < range.end; ++line) {
      Index y = line % v.lines, z = line / v.lines % v.planes, image = line / v.lines / v.planes;
      int nz = looking(d.z, z, zs), ny = looking(d.y, y, ys);
      for (Index begin = 0; begin < v.pixels; begin += kTile) {
        Index n = v.pixels - begin < kTile ? v.pixels - begin : kTile;
        Windows windows[kTile];
        for (Index p = 0; p < n; ++p) {
          int nx = looking(d.x, begin + p, xs);
          for (int i = 0; i < nz; ++i)
            for (int j = 0; j < ny; ++j)
              for (int k = 0; k < nx; ++k) {
                Index tap = (zs[i][1] * v.line_window + ys[j][1]) * v.pixel_window + xs[k][1];
                Index to = ((image * d.z.outputs() + zs[i][0]) * d.y.outputs() + ys[j][0]) * d.x.outputs() + xs[k][0];
                windows[p].taps[windows[p].number++] = {to, static_cast<int>(tap)};
              }
        }
        Index row = line * v.pixels + begin;
        for_channels<widest<E>()>(0, channels,
                                  MaxPoolBackwardBody<E>{grad_out.data, grad_out.ld, argmax, channels, windows,
                                                         x.data + row * x.ld, x.ld, grad_x.data + row * grad_x.ld,
                                                         grad_x.ld, n, scale, shift, mean, part.first(),
                                                         part.second()});
        part.added(n);
      }
    }
    part.flush();
  });
  add_up(parts, sums);
}

END_LEVEL
