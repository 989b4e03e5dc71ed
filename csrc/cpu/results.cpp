// SPDX-License-Identifier: BSD-3-Clause
#include "results.h"

#include <torch/csrc/stable/library.h>

#include "workspace.h"

namespace segpose {

using torch::headeronly::MemoryFormat;

Tensor allocate_result(const Tensor& like, const Ints& shape, bool channels_last) {
  // Up to here glibc's malloc keeps blocks itself.
  constexpr int64_t kSmallest = int64_t{32} << 20;
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (const int64_t extent : shape) bytes *= extent;
  if (bytes < kSmallest) {
    return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  const Tensor block = WorkspacePool::instance().acquire(bytes, bytes + bytes / 8, like.device());
  const int64_t c = shape[1], h = shape[2], w = shape[3];
  const Ints strides = channels_last ? Ints{h * w * c, 1, w * c, c} : Ints{c * h * w, h * w, w, 1};
  return torch::stable::from_blob(block.data_ptr(), shape, strides, like.device(), like.scalar_type(),
                                  [block](void*) { WorkspacePool::instance().release(block); });
}

namespace {

Tensor allocate_checked(const Tensor& like, Ints shape, bool channels_last) {
  STD_TORCH_CHECK(shape.size() == 4, "segpose: shape must have 4 extents, got ", shape.size());
  for (const int64_t extent : shape) {
    STD_TORCH_CHECK(extent >= 0, "segpose: extents of shape must not be negative, got ", extent);
  }
  return allocate_result(like, shape, channels_last);
}

int64_t release_workspace() { return WorkspacePool::instance().clear(); }

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) { m.impl("allocate_result", TORCH_BOX(&segpose::allocate_checked)); }

STABLE_TORCH_LIBRARY_IMPL(segpose, CompositeExplicitAutograd, m) {
  m.impl("release_workspace", TORCH_BOX(&segpose::release_workspace));
}
