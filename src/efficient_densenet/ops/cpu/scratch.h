// Memory for scratch, which each thread keeps from one call to the next. Asking for it anew each time is slow: the allocator
// returns what is free to the system, and gets it back page by page; and what another thread had last is in that one's
// cache.
#pragma once

#include <cstddef>
#include <cstdlib>

// A block of memory, of which parts are taken one behind the other. It is empty again when all parts are given back, and is
// then made as large as was needed. Parts for which there is no place come from the allocator.
class Scratch {
  static constexpr std::size_t kLine = 64; // bytes of a line of the cache, where each part begins
  static constexpr std::size_t kMost = 16 << 20; // bytes that a thread keeps

  char *block = nullptr;
  std::size_t size = 0, taken = 0, parts = 0;

  static void *allocate(std::size_t bytes) {
    void *memory = std::aligned_alloc(kLine, bytes);
    if (!memory)
      std::abort();
    return memory;
  }

public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  ~Scratch() { std::free(block); }
  static Scratch &of_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  // What is there is undefined.
  void *take(std::size_t bytes) {
    bytes = (bytes / kLine + 1) * kLine;
    std::size_t begin = taken;
    ++parts, taken += bytes;
    return taken <= size ? block + begin : allocate(bytes);
  }

  // Not while the thread of this scratch works.
  void give_back(void *part) {
    char *at = static_cast<char *>(part);
    if (at < block || at >= block + size)
      std::free(part);
    if (--parts)
      return;
    if (taken > size && taken <= kMost) {
      std::free(block);
      block = static_cast<char *>(allocate(taken)), size = taken;
    }
    taken = 0;
  }
};
