// What a level of instructions is. `baseline.cpp`, `avx2.cpp` and so on say which they are and include `table.h`; every
// header with loops is then compiled for that level, in a namespace of its own. Standard headers come first, here, so
// that no code in them is compiled for instructions that a processor may lack.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "interface.h"
#include "threads.h"

#if !defined(LEVEL) // as an editor opens a header
#define LEVEL baseline
#define VECTOR_BYTES 16
#define REGISTERS 16
#define CONVOLUTIONS 0 // whether there are kernels for whole convolutions
#endif
#if !defined(PAIRS) // whether there are instructions for pairs of bfloat16
#define PAIRS 0
#endif

#if !defined(TILES) // whether these pairs are multiplied by the tile registers of AMX
#define TILES 0
#endif

#define PRAGMA(text) _Pragma(#text)
#if !defined(TARGET)
#define BEGIN_LEVEL namespace LEVEL {
#define END_LEVEL }
#elif defined(__clang__)
#define TARGETED(instructions) PRAGMA(clang attribute push(__attribute__((target(instructions))), apply_to = function))
#define BEGIN_LEVEL TARGETED(TARGET) namespace LEVEL {
#define END_LEVEL } PRAGMA(clang attribute pop)
#else
#define TARGETED(instructions) PRAGMA(GCC push_options) PRAGMA(GCC target(instructions))
#define BEGIN_LEVEL TARGETED(TARGET) namespace LEVEL {
#define END_LEVEL } PRAGMA(GCC pop_options)
#endif

BEGIN_LEVEL

struct bf16 {
  std::uint16_t bits;
};

// The type in which values are computed: single precision, or double for doubles.
template <class E> using Compute = std::conditional_t<std::is_same<E, double>::value, double, float>;

// A matrix of channels-last values: rows `ld` values apart.
template <class E> struct Matrix {
  E *data;
  Index ld;
};
template <class E> inline Matrix<E> from_row(Matrix<E> x, Index row) { return {x.data + row * x.ld, x.ld}; }
template <class E> inline Matrix<E> from_channel(Matrix<E> x, Index channel) { return {x.data + channel, x.ld}; }

// What Python passes, for activations of type E: these, and vectors of one value for each channel.
template <class E> struct Passed {
  static Matrix<E> matrix(Rows rows) { return {static_cast<E *>(rows.data), rows.ld}; }
  static Compute<E> *vector(void *data) { return static_cast<Compute<E> *>(data); }
  static const Compute<E> *vector(const void *data) { return static_cast<const Compute<E> *>(data); }
};

// Rows that are summed up in the type of computation before they go to double precision.
constexpr Index kRowsPerSum = 32;
// Rows that share what is loaded for a group of channels.
constexpr Index kTile = 8;
constexpr int kVectorBytes = VECTOR_BYTES, kRegisters = REGISTERS;

END_LEVEL
