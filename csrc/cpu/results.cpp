// SPDX-License-Identifier: BSD-3-Clause
#include "results.h"

#include <torch/csrc/stable/library.h>

#include "workspace.h"

namespace segpose {

namespace {

// Results of such sizes lie in a pool. Those in between do not: kept for one size, they would be missed for others. A
// training step of CPM2DPose (a quarter of the width, 4 images of 256 x 256) held 176 MiB with them, 97 without a pool.
constexpr int64_t kSmallest = int64_t{256} << 10;
constexpr int64_t kLargestSmall = int64_t{4} << 20;
constexpr int64_t kLarge = int64_t{32} << 20;

WorkspacePool* pool_for(int64_t bytes) {
  if (bytes >= kLarge) return &WorkspacePool::instance();
  return bytes >= kSmallest && bytes <= kLargestSmall ? &WorkspacePool::small() : nullptr;
}

int64_t bytes_of(const Tensor& like, const Ints& shape) {
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (const int64_t extent : shape) bytes *= extent;
  return bytes;
}

Ints strides_of(const Ints& shape, bool channels_last) {
  const int64_t c = shape[1], h = shape[2], w = shape[3];
  return channels_last ? Ints{h * w * c, 1, w * c, c} : Ints{c * h * w, h * w, w, 1};
}

// torch's empty_strided, without its dispatcher on the way.
Tensor allocate(const Tensor& like, const Ints& shape, const Ints& strides) {
  int32_t dtype = 0, device = 0;
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype, device, like.get_device_index(),
                                                         &result));
  return Tensor(result);
}

Tensor allocate_from(WorkspacePool* pool, const Tensor& like, const Ints& shape, const Ints& strides) {
  const int64_t bytes = bytes_of(like, shape);
  const Tensor block = pool->acquire(bytes, bytes + bytes / 8, like.device());
  return torch::stable::from_blob(block.data_ptr(), shape, strides, like.device(), like.scalar_type(),
                                  [pool, block](void*) { pool->release(block); });
}

}  // namespace

Tensor allocate_result(const Tensor& like, const Ints& shape, bool channels_last) {
  WorkspacePool* const pool = pool_for(bytes_of(like, shape));
  const Ints strides = strides_of(shape, channels_last);
  return pool == nullptr ? allocate(like, shape, strides) : allocate_from(pool, like, shape, strides);
}

Tensor allocate_gradient(const Tensor& like) {
  const Ints shape{like.size(0), like.size(1), like.size(2), like.size(3)};
  const Ints strides{like.stride(0), like.stride(1), like.stride(2), like.stride(3)};
  // Without gaps in one of the two formats.
  const bool dense =
      like.is_contiguous() || (strides[1] == 1 && strides[3] == shape[1] && strides[2] == shape[3] * shape[1] &&
                               strides[0] == shape[2] * shape[3] * shape[1]);
  WorkspacePool* const pool = dense ? pool_for(bytes_of(like, shape)) : nullptr;
  return pool == nullptr ? torch::stable::empty_like(like) : allocate_from(pool, like, shape, strides);
}

namespace {

Tensor allocate_checked(const Tensor& like, Ints shape, bool channels_last) {
  STD_TORCH_CHECK(shape.size() == 4, "segpose: shape must have 4 extents, got ", shape.size());
  for (const int64_t extent : shape) {
    STD_TORCH_CHECK(extent >= 0, "segpose: extents of shape must not be negative, got ", extent);
  }
  return allocate_result(like, shape, channels_last);
}

int64_t release_workspace() { return WorkspacePool::instance().clear() + WorkspacePool::small().clear(); }

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) { m.impl("allocate_result", TORCH_BOX(&segpose::allocate_checked)); }

STABLE_TORCH_LIBRARY_IMPL(segpose, CompositeExplicitAutograd, m) {
  m.impl("release_workspace", TORCH_BOX(&segpose::release_workspace));
}
