// Memory for scratch, which each thread keeps from one call to the next. Asking for it anew each time is slow: the allocator
// returns what is free to the system, and gets it back page by page; and what another thread had last is in that one's
// cache.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>

// A block of memory, of which its thread takes parts, one behind the other. When all are given back, the next one lies at its
// beginning again, and it is made as large as was needed. Parts for which there is no place come from the allocator.
//
// Any thread may give a part back. A thread may end before that (OpenMP ends threads where a region needs fewer): its block
// lives until the last part of it is given back.
class Scratch {
  static constexpr std::size_t kLine = 64; // bytes of a line of the cache, where each part begins
#if defined(__SANITIZE_ADDRESS__) // which sees what goes beyond memory of the allocator, and not beyond a part of a block
  static constexpr std::size_t kMost = 0;
#else
  static constexpr std::size_t kMost = 16 << 20; // bytes that a thread keeps
#endif

  char *block = nullptr;
  std::size_t size = 0, taken = 0;
  std::atomic<int> users{1}; // its thread, and each part

  struct OfThread {
    Scratch *scratch = new Scratch;
    ~OfThread() { scratch->release(); }
  };

  static void *allocate(std::size_t bytes) {
    void *memory = std::aligned_alloc(kLine, bytes);
    if (!memory)
      std::abort();
    return memory;
  }

  Scratch() = default;
  ~Scratch() { std::free(block); }
  void release() {
    if (--users == 0)
      delete this;
  }
  void begin_again() {
    if (taken > size && taken <= kMost) {
      std::free(block);
      block = static_cast<char *>(allocate(taken)), size = taken;
    }
    taken = 0;
  }

public:
  static Scratch &of_thread() {
    thread_local OfThread own;
    return *own.scratch;
  }

  // By its thread. What is there is undefined.
  void *take(std::size_t bytes) {
    if (users == 1)
      begin_again();
    bytes = (bytes / kLine + 1) * kLine;
    std::size_t begin = taken;
    ++users, taken += bytes;
    return taken <= size ? block + begin : allocate(bytes);
  }

  void give_back(void *part) {
    char *at = static_cast<char *>(part);
    if (at < block || at >= block + size)
      std::free(part);
    release();
  }
};
