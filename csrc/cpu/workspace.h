// SPDX-License-Identifier: BSD-3-Clause
// Scratch memory from torch's allocator, kept between calls: fresh pages would be zeroed by the system on every call,
// which costs more than many a layer.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace segpose {

// Asks for huge pages: transforms write a hundred streams at once, more than the first-level TLB has entries for 4 KB
// pages. Only for memory that is kept: a fresh result in huge pages waits for the system to free them.
inline void advise_huge_pages(const torch::stable::Tensor& tensor, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{2} << 20;
  const auto start = reinterpret_cast<int64_t>(tensor.data_ptr());
  const int64_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t end = (start + bytes) / kHugePage * kHugePage;
  // Advice only: without it the kernels are slower, not wrong.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)tensor;
  (void)bytes;
#endif
}

inline torch::stable::Tensor allocate_bytes(int64_t bytes, const torch::stable::Device& device) {
  torch::stable::Tensor tensor =
      torch::stable::empty({std::max<int64_t>(bytes, 1)}, torch::headeronly::ScalarType::Byte, std::nullopt, device);
  advise_huge_pages(tensor, bytes);
  return tensor;
}

class WorkspacePool {
 public:
  // Larger buffers are given back at once.
  static constexpr int64_t kRetainedBytes = int64_t{256} << 20;

  // Never destroyed: tensors must not be freed after torch's own statics.
  static WorkspacePool& instance() {
    static auto* pool = new WorkspacePool;
    return *pool;
  }

  torch::stable::Tensor acquire(int64_t bytes, const torch::stable::Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Sorted by size: the smallest that is large enough, or a new one in place of the largest.
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->numel() < bytes) continue;
      torch::stable::Tensor tensor = *it;
      free_.erase(it);
      return tensor;
    }
    if (!free_.empty()) free_.pop_back();
    return allocate_bytes(bytes, device);
  }

  void release(torch::stable::Tensor tensor) {
    if (tensor.numel() > kRetainedBytes) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place =
        std::find_if(free_.begin(), free_.end(), [&](const auto& other) { return other.numel() > tensor.numel(); });
    free_.insert(place, std::move(tensor));
  }

  // Frees what is kept and says how much it was.
  int64_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t bytes = 0;
    for (const auto& tensor : free_) bytes += tensor.numel();
    free_.clear();
    return bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<torch::stable::Tensor> free_;
};

// A buffer of the pool for as long as this object lives. Concurrent calls each hold their own.
class Workspace {
 public:
  Workspace(int64_t bytes, const torch::stable::Tensor& like)
      : tensor_(WorkspacePool::instance().acquire(bytes, like.device())) {}
  ~Workspace() { WorkspacePool::instance().release(std::move(tensor_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return tensor_.data_ptr(); }

 private:
  torch::stable::Tensor tensor_;
};

}  // namespace segpose
