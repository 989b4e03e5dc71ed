// SPDX-License-Identifier: BSD-3-Clause
#include "results.h"

#include <torch/csrc/stable/library.h>

#include "torch_views.h"
#include "workspace.h"

namespace segpose {
namespace {

// Uninitialised [n, c, h, w] in channels_last, with the dtype and device of `like`.
Tensor allocate_result(const Tensor& like, Ints shape) {
  STD_TORCH_CHECK(shape.size() == 4, "segpose: shape must have 4 extents, got ", shape.size());
  int64_t elements = 1;
  for (const int64_t extent : shape) {
    STD_TORCH_CHECK(extent >= 0, "segpose: extents of shape must not be negative, got ", extent);
    elements *= extent;
  }
  const int64_t bytes = elements * static_cast<int64_t>(like.element_size());
  if (bytes < ResultPool::kSmallest) {
    return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                torch::headeronly::MemoryFormat::ChannelsLast);
  }
  Tensor block = ResultPool::instance().acquire(bytes, like.device());
  const Ints strides{shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
  void* data = block.data_ptr();
  return torch::stable::from_blob(data, shape, strides, like.device(), like.scalar_type(),
                                  [block](void*) { ResultPool::instance().release(block); });
}

int64_t release_workspace() { return WorkspacePool::instance().clear() + ResultPool::instance().clear(); }

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) { m.impl("allocate_result", TORCH_BOX(&segpose::allocate_result)); }

STABLE_TORCH_LIBRARY_IMPL(segpose, CompositeExplicitAutograd, m) {
  m.impl("release_workspace", TORCH_BOX(&segpose::release_workspace));
}
