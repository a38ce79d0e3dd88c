// Work in chunks, on the threads of PyTorch.
#pragma once

#include "interface.h"

// Functions of the OpenMP runtime that PyTorch has already started; all null: one thread.
struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*team)() = nullptr;
};
extern OpenMP openmp;

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

// A chunk for each thread, or for each thing where there are fewer.
inline int chunks_of(Index things, int threads) { return static_cast<int>(things < threads ? things : threads); }

// Too little work is not worth waking a thread for.
inline int chunks_for(Index things, Index values, int threads) {
  Index most = values / 16384;
  if (most > things)
    most = things;
  return most < 1 ? 1 : chunks_of(most, threads);
}
