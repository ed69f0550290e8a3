// Scratch memory for kernels: 64-byte aligned, uninitialised, freed at the end of the scope.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/vec.h"

namespace fastweights::FW_LEVEL {

class Scratch {
 public:
  // An allocation that fails ends the process, as it would anywhere in a noexcept kernel.
  explicit Scratch(size_t bytes) : memory_(__builtin_malloc(bytes + 64)) {
    if (!memory_) __builtin_trap();
    next_ = (reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t(63);
  }
  ~Scratch() { __builtin_free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Hands out the next `count` elements; the caller's sum of take_bytes must not exceed the constructor's bytes.
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += take_bytes<T>(count);
    return p;
  }

  template <typename T>
  static constexpr size_t take_bytes(int64_t count) {
    return (size_t(count) * sizeof(T) + 63) & ~size_t(63);
  }

 private:
  void* memory_;
  uintptr_t next_;
};

}  // namespace fastweights::FW_LEVEL
