// The op namespace. Each family adds its schemas and kernels in its own ops.cpp through STABLE_TORCH_LIBRARY_FRAGMENT.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastweights, m) {
  (void)m;
}
