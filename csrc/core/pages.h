// Memory of large outputs, which the allocator maps anew at every call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastweights {

// Beyond glibc's largest threshold for mapping an allocation, the first touch of every 4 KiB costs a page fault, which
// for a kernel at the speed of memory is half of its time. Pages of 2 MiB have 512 times fewer.
constexpr int64_t kMappedBytes = 32 << 20;

// The tensor itself. What the system does with the advice is its own business: no error is one.
inline torch::stable::Tensor in_huge_pages(torch::stable::Tensor t) {
#ifdef MADV_HUGEPAGE
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  if (bytes >= kMappedBytes) {
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t data = reinterpret_cast<uintptr_t>(t.data_ptr());
    const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + uintptr_t(bytes)) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

}  // namespace fastweights
