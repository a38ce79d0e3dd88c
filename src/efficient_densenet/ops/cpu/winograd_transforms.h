// The transforms of Winograd's minimal filtering F(2×2, 3×3) (Lavin, Gray: Fast Algorithms for Convolutional Neural
// Networks, 2016). For a 2×2 tile y of the result, the 4×4 pixels d around it and the window g,
//
//   y = Aᵀ[(G g Gᵀ) ∘ (Bᵀ d B)]A,   Bᵀ = 1  0 -1  0   G =  1   0   0   Aᵀ = 1  1  1  0
//                                        0  1  1  0       ½   ½   ½        0  1 -1 -1
//                                        0 -1  1  0       ½  -½   ½
//                                        0  1  0 -1       0   0   1
//
// The gradient of the window is the transpose, Gᵀ[(A ∂y Aᵀ) ∘ (Bᵀ d B)]G. The factors ±1 and ½ keep the error of a sum in
// the size of the direct one's (tests compare both with double precision).
#pragma once

#include "units.h"

BEGIN_LEVEL

constexpr Index kPositions = 16;

// Values of a scratch: position by position, tile by tile, `stride` values for each.
struct Positions {
  Index stride, distance; // from tile to tile, from position to position
  // Positions that lie a multiple of 4096 bytes apart would fight for the same lines of the cache.
  Positions(Index tiles, Index channels) : stride(vectors_of(channels) * kW), distance(tiles * stride + kW) {}
  Index size() const { return kPositions * distance; }
};

// to = Bᵀ d B for the tiles of a unit, which lies with its border in a scratch, `stride` values from pixel to pixel.
inline void transform_input(const Units &units, const Unit &unit, const float *from, Index stride, float *to,
                            Positions at) {
  Index across = units.across, line = units.wide * stride;
  for (Index y = 0; y < unit.lines; y += 2, from += 2 * line, to += across * at.stride)
    for (Index c = 0; c < stride; c += kW) {
      Vector d[4][4]; // four columns, transformed vertically
      auto column = [&](Index pixel, Vector(&to)[4]) {
        const float *p = from + pixel * stride + c;
        Vector v0 = load<kW>(p), v1 = load<kW>(p + line), v2 = load<kW>(p + 2 * line), v3 = load<kW>(p + 3 * line);
        to[0] = v0 - v2, to[1] = v1 + v2, to[2] = v2 - v1, to[3] = v1 - v3;
      };
      column(0, d[0]);
      column(1, d[1]);
      for (Index t = 0; t < across; ++t) {
        column(2 * t + 2, d[2]);
        column(2 * t + 3, d[3]);
        float *p = to + t * at.stride + c;
        UNROLL for (int i = 0; i < 4; ++i, p += 4 * at.distance) {
          store<kW>(p, d[0][i] - d[2][i]);
          store<kW>(p + at.distance, d[1][i] + d[2][i]);
          store<kW>(p + 2 * at.distance, d[2][i] - d[1][i]);
          store<kW>(p + 3 * at.distance, d[1][i] - d[3][i]);
          d[0][i] = d[2][i], d[1][i] = d[3][i];
        }
      }
    }
}

// to = A ∂y Aᵀ for the tiles of a unit; as above.
inline void transform_gradient(const Units &units, const Unit &unit, const float *from, Index stride, float *to,
                               Positions at) {
  Index across = units.across, line = units.wide * stride;
  from += line + stride; // the first pixel inside of the border
  for (Index y = 0; y < unit.lines; y += 2, from += 2 * line, to += across * at.stride)
    for (Index c = 0; c < stride; c += kW)
      for (Index t = 0; t < across; ++t) {
        Vector rows[4][2];
        UNROLL for (int j = 0; j < 2; ++j) {
          const float *q = from + (2 * t + j) * stride + c;
          Vector upper = load<kW>(q), lower = load<kW>(q + line);
          rows[0][j] = upper, rows[1][j] = upper + lower, rows[2][j] = upper - lower, rows[3][j] = -lower;
        }
        float *p = to + t * at.stride + c;
        UNROLL for (int i = 0; i < 4; ++i, p += 4 * at.distance) {
          store<kW>(p, rows[i][0]);
          store<kW>(p + at.distance, rows[i][0] + rows[i][1]);
          store<kW>(p + 2 * at.distance, rows[i][0] - rows[i][1]);
          store<kW>(p + 3 * at.distance, -rows[i][1]);
        }
      }
}

// Calls work(first pixel's row in the unit, whether there is a column to its right, whether a line below) for each tile.
template <class Work> inline void for_each_tile(const Units &units, const Unit &unit, const Work &work) {
  for (Index y = 0; y < unit.lines; y += 2)
    for (Index x = 0; x < units.width; x += 2)
      work(y * units.width + x, x + 1 < units.width, y + 1 < unit.lines);
}

// out = Aᵀ m A for the tiles of a unit; `finite` is left as it is if all of it is.
template <class E> struct OutputTransform {
  const Units &units;
  const Unit &unit;
  const float *from;
  Positions at;
  E *out; // the unit's first row
  Index ldo;
  bool &finite;
  template <int W> void run(Index c) const {
    using V = vector<float, W>;
    const float *p = from + c;
    V other{}; // zero, unless something is not finite
    for_each_tile(units, unit, [&](Index row, bool right, bool below) {
      V m[2][4];
      UNROLL for (int j = 0; j < 4; ++j) {
        V v[4];
        UNROLL for (int i = 0; i < 4; ++i) v[i] = load<W>(p + (4 * i + j) * at.distance);
        m[0][j] = v[0] + v[1] + v[2];
        m[1][j] = v[1] - v[2] - v[3];
      }
      E *to = out + row * ldo + c;
      UNROLL for (int i = 0; i < 2; ++i) {
        V left = m[i][0] + m[i][1] + m[i][2], next = m[i][1] - m[i][2] - m[i][3];
        other += (left - left) + (next - next);
        if (i && !below)
          break;
        store<W>(to + i * units.width * ldo, left);
        if (right)
          store<W>(to + (i * units.width + 1) * ldo, next);
      }
      p += at.stride;
    });
    for (int i = 0; i < W; ++i)
      if (other[i] != 0)
        finite = false;
  }
};

// G g Gᵀ of windows, a vector for each tap; store(position, values) takes them.
template <class Store> inline void transform_windows(const Vector (&g)[9], const Store &store) {
  Vector rows[4][3];
  UNROLL for (int j = 0; j < 3; ++j) {
    Vector ends = (g[j] + g[6 + j]) * 0.5f, middle = g[3 + j] * 0.5f;
    rows[0][j] = g[j], rows[1][j] = ends + middle, rows[2][j] = ends - middle, rows[3][j] = g[6 + j];
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    Vector ends = (rows[i][0] + rows[i][2]) * 0.5f, middle = rows[i][1] * 0.5f;
    store(4 * i, rows[i][0]), store(4 * i + 1, ends + middle), store(4 * i + 2, ends - middle);
    store(4 * i + 3, rows[i][2]);
  }
}

// to[k][i] = from[i][k], `depth` values of `n` rows, a vector for each k; in single precision.
template <class E> inline void transpose_rows(const E *from, Index stride, Index depth, Index n, float *to) {
  if constexpr (std::is_same<E, float>::value)
    copy_transposed(from, stride, depth, n, kW, to);
  else
    for (Index k = 0; k < depth; ++k)
      for (Index i = 0; i < n; ++i)
        to[k * kW + i] = value(from[i * stride + k]);
}

// G g Gᵀ of every window, packed as the factor of `multiply_positions`: the sum is over the channels of the prefix.
template <class E> Buffer<float> transformed(const Weight<E> &weight, int threads) {
  Index all = vectors_of(weight.out), blocks = vectors_of(weight.in);
  Buffer<float> result(kPositions * weight.in * all * kW);
  bool taps_last = weight.in_stride != 1; // the taps of a channel lie side by side, or the channels of a tap
  int chunks = chunks_for(blocks, kPositions * weight.out * weight.in, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(blocks, chunk, chunks);
    alignas(64) float taps[9 * kW * kW] = {};
    for (Index c = range.begin * kW; c < range.end * kW && c < weight.in; c += kW) {
      Index channels = weight.in - c < kW ? weight.in - c : kW;
      for (Index j = 0, vectors; j < all; j += vectors) {
        vectors = group_of(j, all);
        for (Index v = j; v < j + vectors; ++v) {
          Index n = weight.out - v * kW < kW ? weight.out - v * kW : kW;
          const E *from = weight.data + v * kW * weight.out_stride + c * weight.in_stride;
          if (taps_last)
            transpose_rows(from, weight.out_stride, 9 * channels, n, taps);
          else
            for (Index t = 0; t < 9; ++t)
              transpose_rows(from + t * weight.tap_stride, weight.out_stride, channels, n, taps + t * kW * kW);
          float *to = result.data() + (j * kPositions * weight.in + c * vectors + (v - j)) * kW;
          for (Index i = 0; i < channels; ++i, to += vectors * kW) {
            Vector g[9];
            UNROLL for (Index t = 0; t < 9; ++t) g[t] = load<kW>(taps + (taps_last ? 9 * i + t : t * kW + i) * kW);
            transform_windows(g, [&](Index position, Vector values) {
              store<kW>(to + position * weight.in * vectors * kW, values);
            });
          }
        }
      }
    }
  });
  return result;
}

// G g Gᵀ of every window turned round, (positions, out, in).
template <class E> Buffer<float> transformed_and_turned(const Weight<E> &weight, int threads) {
  Index plane = weight.out * weight.in;
  Buffer<float> result(kPositions * plane);
  int chunks = chunks_for(weight.out, kPositions * plane, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index c = 0; c < weight.in; c += kW) {
        Index n = weight.in - c < kW ? weight.in - c : kW;
        const E *from = weight.data + o * weight.out_stride + c * weight.in_stride;
        float values[9][kW] = {};
        for (Index i = 0; i < n; ++i)
          for (Index t = 0; t < 9; ++t)
            values[8 - t][i] = value(from[i * weight.in_stride + t * weight.tap_stride]);
        Vector g[9];
        std::memcpy(g, values, sizeof values);
        transform_windows(g, [&](Index position, Vector one) {
          std::memcpy(result.data() + position * plane + o * weight.in + c, &one, n * sizeof(float));
        });
      }
  });
  return result;
}

// The gradient Gᵀ u G of each window from the sums u, `at`, of all parts.
template <class E>
void gather_windows(const std::vector<Buffer<float>> &parts, Positions at, const Weight<E> &weight, E *grad,
                    int threads) {
  int chunks = chunks_for(weight.out, kPositions * weight.out * weight.in, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index c = 0; c < weight.in; c += kW) {
        Vector columns[3][4];
        for (Index j = 0; j < 4; ++j) {
          Vector u[4] = {};
          for (Index i = 0; i < 4; ++i)
            for (const auto &part : parts)
              u[i] += load<kW>(part.data() + (4 * i + j) * at.distance + o * at.stride + c);
          Vector half = (u[1] + u[2]) * 0.5f;
          columns[0][j] = u[0] + half, columns[1][j] = (u[1] - u[2]) * 0.5f, columns[2][j] = half + u[3];
        }
        E *to = grad + o * weight.out_stride + c * weight.in_stride;
        for (Index i = 0; i < 3; ++i) {
          const Vector *u = columns[i];
          Vector half = (u[1] + u[2]) * 0.5f, row[3] = {u[0] + half, (u[1] - u[2]) * 0.5f, half + u[3]};
          for (Index j = 0; j < 3; ++j)
            for (Index k = 0; k < kW && c + k < weight.in; ++k)
              set(to[(3 * i + j) * weight.tap_stride + k * weight.in_stride], row[j][k]);
        }
      }
  });
}

// Bᵀ d B of the rectified prefix, by way of a scratch for its lines.
template <class E>
void transform_prefix(const Units &units, const Unit &unit, Matrix<E> x, Index channels, const float *scale,
                      const float *shift, float *lines, float *to, Positions at) {
  Index stride = vectors_of(channels) * kW;
  with_border(units, unit, x, stride, lines, [&](Matrix<E> from, Index pixels, float *to) {
    fill_prefix(from, pixels, channels, scale, shift, stride, to);
  });
  transform_input(units, unit, lines, stride, to, at);
}

END_LEVEL
