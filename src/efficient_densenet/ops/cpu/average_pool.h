// The prologue with an average pool behind it, which runs in front of a transition's 1×1 convolution: forward and backward.
#pragma once

#include "loops.h"

BEGIN_LEVEL

// The windows of an average pool.
inline Index planes_out(const Volume &v) { return v.planes / v.plane_window; }
inline Index lines_out(const Volume &v) { return v.lines / v.line_window; }
inline Index pixels_out(const Volume &v) { return v.pixels / v.pixel_window; }
inline Index pixels_of_window(const Volume &v) { return v.plane_window * v.line_window * v.pixel_window; }

// Calls work(row of the output, row of the window's first pixel) for the lines of the output in a chunk.
template <class Work> void for_windows(const Volume &v, int chunk, int chunks, const Work &work) {
  Range range(v.images * planes_out(v) * lines_out(v), chunk, chunks);
  for (Index line = range.begin; line < range.end; ++line) {
    Index y = line % lines_out(v), z = line / lines_out(v) % planes_out(v), n = line / lines_out(v) / planes_out(v);
    Index first = ((n * v.planes + z * v.plane_window) * v.lines + y * v.line_window) * v.pixels;
    for (Index x = 0; x < pixels_out(v); ++x)
      work(line * pixels_out(v) + x, first + x * v.pixel_window);
  }
}

// The rows of a window, relative to its first.
inline std::vector<Index> window_rows(const Volume &v) {
  std::vector<Index> rows;
  for (Index z = 0; z < v.plane_window; ++z)
    for (Index y = 0; y < v.line_window; ++y)
      for (Index x = 0; x < v.pixel_window; ++x)
        rows.push_back((z * v.lines + y) * v.pixels + x);
  return rows;
}

template <class E> struct ProloguePoolBody {
  const E *x;
  Index ldx;
  const std::vector<Index> &window;
  const Compute<E> *scale, *shift;
  E *out;
  template <int W> void run(Index c) const {
    auto a = load<W>(scale + c), b = load<W>(shift + c);
    vector<Compute<E>, W> sum{};
    for (Index row : window)
      sum += rectify(load<W>(x + row * ldx + c) * a + b);
    store<W>(out + c, sum * (Compute<E>(1) / window.size()));
  }
};

template <class E>
void prologue_pool(Matrix<E> x, const Volume &v, Index channels, const Compute<E> *scale, const Compute<E> *shift,
                   E *out, int threads) {
  std::vector<Index> window = window_rows(v);
  Index lines = v.images * planes_out(v) * lines_out(v);
  int chunks = chunks_for(lines, lines * pixels_out(v) * channels * pixels_of_window(v), threads);
  for_chunks(chunks, [&](int chunk) {
    for_windows(v, chunk, chunks, [&](Index to, Index from) {
      for_channels<widest<E>()>(
          0, channels,
          ProloguePoolBody<E>{x.data + from * x.ld, x.ld, window, scale, shift, out + to * channels});
    });
  });
}

template <bool kAdd, class E>
void accumulate_pool(const E *g, Matrix<E> x, const Volume &v, Index channels, const Compute<E> *scale,
                     const Compute<E> *shift, const Compute<E> *mean, Matrix<E> grad_x, double *sums, int threads) {
  std::vector<Index> window = window_rows(v);
  Compute<E> share = Compute<E>(1) / window.size();
  Index lines = v.images * planes_out(v) * lines_out(v);
  int chunks = chunks_for(lines, lines * pixels_out(v) * channels * pixels_of_window(v), threads);
  std::vector<Sums<Compute<E>>> parts(chunks, Sums<Compute<E>>(channels));
  for_chunks(chunks, [&](int chunk) {
    Sums<Compute<E>> &part = parts[chunk];
    for_windows(v, chunk, chunks, [&](Index to, Index from) {
      for (Index row : window)
        for_channels<widest<E>()>(0, channels,
                                  AccumulateBody<E, kAdd>{g + to * channels, 0, x.data + (from + row) * x.ld, x.ld,
                                                          grad_x.data + (from + row) * grad_x.ld, grad_x.ld, 1, scale,
                                                          shift, mean, part.first(), part.second(), share});
      part.added(pixels_of_window(v));
    });
    part.flush();
  });
  add_up(parts, sums);
}

END_LEVEL
