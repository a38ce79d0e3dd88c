// How images are cut into units of work.
#pragma once

#include "products.h"

BEGIN_LEVEL

// Images of lines of pixels, and the window of a convolution over them.
struct Grid {
  Index images, height, width, window;
  Index rows() const { return images * height * width; }
};

// A unit of work is an even number of lines of one image. In a scratch it has a border around it, of what lies there in
// the image or of zeros, so wide that windows of 3 and tiles of 2 pixels fit.
struct Units {
  Index height, width, across, lines, per_image, count, wide; // `wide`: pixels of a line in the scratch
  Units(const Grid &grid, Index wanted)
      : height(grid.height), width(grid.width), across((width + 1) / 2), wide(2 * across + 2) {
    wanted = wanted / 2 * 2;
    lines = wanted < 2 ? 2 : wanted < height ? wanted : (height + 1) / 2 * 2;
    per_image = (height + lines - 1) / lines;
    count = grid.images * per_image;
  }
  Index tiles() const { return lines / 2 * across; }
  Index scratch(Index stride) const { return (lines + 2) * wide * stride; }
  int chunks(int threads) const { return chunks_of(count, threads); }
};

struct Unit {
  Index image, first, lines, row, rows; // its image, first line, lines; its first row of the matrix, and its rows
  Unit(const Units &units, Index i) : image(i / units.per_image), first(i % units.per_image * units.lines) {
    lines = units.height - first < units.lines ? units.height - first : units.lines;
    row = (image * units.height + first) * units.width;
    rows = lines * units.width;
  }
  Index tiles(const Units &units) const { return (lines + 1) / 2 * units.across; }
};

// For the lines of a unit and of the border around it: inside(line of the scratch, its first row in the matrix), or
// outside(line of the scratch) where it lies outside of the image.
template <class Inside, class Outside>
void for_lines(const Units &units, const Unit &unit, const Inside &inside, const Outside &outside) {
  for (Index line = 0; line < (unit.lines + 1) / 2 * 2 + 2; ++line) {
    Index y = unit.first + line - 1;
    if (y < 0 || y >= units.height)
      outside(line);
    else
      inside(line, (unit.image * units.height + y) * units.width);
  }
}

// A unit and the border around it, `stride` elements from pixel to pixel; fill(rows of x, pixels, to) makes a line of it.
template <class E, class T, class Fill>
void with_border(const Units &units, const Unit &unit, Matrix<E> x, Index stride, T *to, const Fill &fill) {
  Index line = units.wide * stride, behind = (units.width + 1) * stride;
  for_lines(
      units, unit,
      [&](Index i, Index row) {
        T *at = to + i * line;
        std::memset(at, 0, stride * sizeof(T));
        fill(from_row(x, row), units.width, at + stride);
        std::memset(at + behind, 0, (line - behind) * sizeof(T));
      },
      [&](Index i) { std::memset(to + i * line, 0, line * sizeof(T)); });
}

// Of what the next unit reads and this one does not, fetch what lies behind its rows from `begin` to `end`.
template <class E>
void fetch_unit(const Units &units, const Unit &unit, Matrix<E> x, const Grid &grid, Index channels, Index begin,
                Index end) {
  Index ahead = unit.row + unit.rows + units.width, last = grid.rows();
  fetch(x, ahead + begin, ahead + end < last ? ahead + end : last, channels);
}

END_LEVEL
