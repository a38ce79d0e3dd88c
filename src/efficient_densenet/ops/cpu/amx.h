// Tiles of a product in the registers of AMX. There are eight, and each holds up to 16 rows of 64 bytes. Four are the tile
// of the result, two hold rows of `a` and two hold vectors of `b`: 16 rows of up to 16 pairs, and up to 16 pairs for each
// of 16 columns, as `pack.h` and `pair_rows` lay them out. One instruction adds the product of two registers to a third,
// 8192 products of bfloat16 in 16 cycles; a register is loaded in 8 cycles, so that the four loads for four products
// take half of their time.
//
// The instructions are written out, for the functions of the compilers take no register from a template.
#pragma once

#include "pack.h"

BEGIN_LEVEL

// The most outputs of a tile of `OuterTile`.
constexpr Index kOutputs = 32;
constexpr int kRegisterRows = 16;
constexpr Index kLargestTile = 4 * kRegisterRows * kW; // values

template <int kRegister> struct TileRegister {
  static void clear() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(kRegister)); }
  // Rows that are `bytes` apart.
  static void load(const void *rows, Index bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(bytes), "i"(kRegister) : "memory");
  }
  static void save(void *rows, Index bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(bytes), "i"(kRegister) : "memory");
  }
  template <int kA, int kB> static void add_product() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kRegister), "i"(kA), "i"(kB));
  }
};

// While it lives, the registers of this thread are set up for sums of so many pairs. Nobody relies on
// what they leave: oneDNN sets up the registers before its own products.
class TileRegisters {
  struct Configuration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };

public:
  explicit TileRegisters(Index depth) {
    Configuration c;
    for (int i = 0; i < 8; ++i)
      c.row_bytes[i] = 4 * kW, c.rows[i] = kRegisterRows;
    c.row_bytes[4] = c.row_bytes[5] = static_cast<std::uint16_t>(4 * step_of(depth)); // of `a`
    c.rows[6] = c.rows[7] = static_cast<std::uint8_t>(step_of(depth));                // of `b`
    __asm__ volatile("ldtilecfg %0" : : "m"(c));
  }
  TileRegisters(const TileRegisters &) = delete;
  ~TileRegisters() { __asm__ volatile("tilerelease"); }
};

template <class Work, std::size_t... I>
inline __attribute__((always_inline)) void repeat(const Work &work, std::index_sequence<I...>) {
  (work(std::integral_constant<int, I>()), ...);
}
// work(i) for every i below n, as constants.
template <int n, class Work> inline __attribute__((always_inline)) void repeat(const Work &work) {
  repeat(work, std::make_index_sequence<n>());
}

// MR × NV registers of a result, row by row.
template <int MR, int NV> struct Accumulators {
  static void clear() {
    repeat<MR * NV>([](auto i) { TileRegister<i()>::clear(); });
  }
  // += rows of `a`, of `depth` pairs, against columns of `b`.
  static void add(const pair *a, Index lda, const pair *b, Index ldb, Index depth) {
    for (Index k = 0, step = step_of(depth); k < depth; k += step) {
      repeat<NV>([&](auto j) { TileRegister<6 + j()>::load(b + k * ldb + j() * kW, ldb * sizeof(pair)); });
      repeat<MR>([&](auto r) {
        using A = TileRegister<4 + r() % 2>;
        A::load(a + r() * kRegisterRows * lda + k, lda * sizeof(pair));
        repeat<NV>([&](auto j) { TileRegister<r() * NV + j()>::template add_product<4 + r() % 2, 6 + j()>(); });
      });
    }
  }
  static void save(float *out, Index ldo) {
    repeat<MR * NV>([&](auto i) {
      TileRegister<i()>::save(out + i() / NV * kRegisterRows * ldo + i() % NV * kW, ldo * sizeof(float));
    });
  }
};

// body.run<registers for the rows, registers for the columns>(rows) for sizes known at run time.
template <int NV = kMostVectors, class Body> inline void with_tile(int rows, int vectors, const Body &body) {
  if (vectors != NV) {
    if constexpr (NV > 1)
      with_tile<NV - 1>(rows, vectors, body);
    return;
  }
  repeat<tile_rows(NV) / kRegisterRows>([&](auto r) {
    if ((rows + kRegisterRows - 1) / kRegisterRows == r() + 1)
      body.template run<r() + 1, NV>(rows);
  });
}

// As in `registers.h`; `out` has room for all rows of the registers, and `a` has as many.
template <class T> struct ProductTile {
  const T *a;
  Index lda, depth;
  const T *b;
  float *out;
  Index ldo;
  Index places = 1;
  const Index *offsets = &kHere;
  template <int MR, int NV> __attribute__((noinline)) void run(int) const {
    Accumulators<MR, NV>::clear();
    for (Index place = 0; place < places; ++place)
      Accumulators<MR, NV>::add(a + offsets[place], lda, b + place * depth * NV * kW, NV * kW, depth);
    Accumulators<MR, NV>::save(out, ldo);
  }
};

// As in `registers.h`, but `a` lies the other way: a row for each output.
template <class T> struct OuterTile {
  Lines<T> a, b;
  Index lines, rows;
  float *into;
  Index stride;
  template <int MR, int NV> __attribute__((noinline)) void run(int outputs) const {
    alignas(64) float values[kLargestTile];
    Accumulators<MR, NV>::clear();
    for (Index y = 0; y < lines; ++y)
      Accumulators<MR, NV>::add(a.data + y * a.line, a.ld, b.data + y * b.line, b.ld, rows);
    Accumulators<MR, NV>::save(values, NV * kW);
    for (Index o = 0; o < outputs; ++o)
      UNROLL for (int j = 0; j < NV; ++j) {
        float *to = into + o * stride + j * kW;
        store<kW>(to, load<kW>(to) + load<kW>(values + (o * NV + j) * kW));
      }
  }
};

END_LEVEL
