// SPDX-License-Identifier: BSD-3-Clause
// Memory from torch's allocator, kept between calls: fresh pages would be zeroed by the system on every call, which
// costs more than many a layer.
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

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks for huge pages: transforms write a hundred streams at once, more than the first-level TLB has entries for 4 KB
// pages. Only for memory that is kept: a fresh result in huge pages waits for the system to free them. What malloc has
// had in use before lies in 4 KB pages already. Collapsing those (Linux 6.1) copies them, which pays for memory that is
// kept for many runs: CPM2DPose in float32 took 70 ms instead of 82 in a process that had freed 1.5 GB.
enum class Use { calls, runs };

inline void advise_huge_pages(const void* memory, int64_t bytes, Use use) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  const auto start = reinterpret_cast<int64_t>(memory);
  const int64_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t end = (start + bytes) / kHugePage * kHugePage;
  if (end <= begin) return;
  // Advice only: without it the kernels are slower, not wrong.
  (void)madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
  if (use == Use::runs) {
    (void)madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), kCollapse);
  }
#else
  (void)use;
  (void)memory;
  (void)bytes;
#endif
}

inline torch::stable::Tensor empty_bytes(int64_t bytes, const torch::stable::Device& device) {
  return torch::stable::empty({std::max<int64_t>(bytes, 1)}, torch::headeronly::ScalarType::Byte, std::nullopt, device);
}

inline torch::stable::Tensor allocate_bytes(int64_t bytes, const torch::stable::Device& device, Use use) {
  torch::stable::Tensor tensor = empty_bytes(bytes, device);
  advise_huge_pages(tensor.data_ptr(), bytes, use);
  return tensor;
}

// Bytes of a filter of that size in whole huge pages, or of one too small for that. A filter that has been idle for the
// time of a model is read through page tables that no cache holds any more: with huge pages CPM2DPose in bfloat16 took
// 23.7 ms instead of 24.4, and its layers of 1 to 2 MB 1.1 times as long as alone instead of 1.3 times.
inline int64_t filter_bytes_in_pages(int64_t bytes) {
  return bytes < kHugePage / 2 ? bytes : (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

// Memory for a filter of that size. What alignment adds is never touched.
inline torch::stable::Tensor allocate_filter(int64_t bytes, const torch::stable::Device& device) {
  const int64_t size = filter_bytes_in_pages(bytes);
  if (size % kHugePage != 0 || size == 0) return allocate_bytes(size, device, Use::runs);
  const torch::stable::Tensor block = empty_bytes(size + kHugePage, device);
  const auto start = reinterpret_cast<int64_t>(block.data_ptr());
  const int64_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  advise_huge_pages(reinterpret_cast<void*>(aligned), size, Use::runs);
  return torch::stable::from_blob(reinterpret_cast<void*>(aligned), {size}, {1}, device,
                                  torch::headeronly::ScalarType::Byte, [block](void*) {});
}

class WorkspacePool {
 public:
  // Of all buffers that wait; larger ones are given back at once.
  static constexpr int64_t kRetainedBytes = int64_t{256} << 20;
  static constexpr int64_t kRetainedSmallBytes = int64_t{12} << 20;
  // One that so many calls had no use for is given back: more calls than a training step of most models makes, so that
  // the next step finds what this one used. Given back after 8, the workspaces of CPM2DPose were zeroed by the system
  // again in every step: 60 to 80 ms of 390 (bfloat16, batch 4).
  static constexpr int64_t kIdleCalls = 1024;

  // Never destroyed: tensors must not be freed after torch's own statics.
  static WorkspacePool& instance() {
    static auto* pool = new WorkspacePool(kRetainedBytes, true);
    return *pool;
  }

  // Of small results (results.h), which come in many sizes.
  static WorkspacePool& small() {
    static auto* pool = new WorkspacePool(kRetainedSmallBytes, false);
    return *pool;
  }

  // `grows`: a new buffer takes the place of a smaller one.
  WorkspacePool(int64_t retained, bool grows) : retained_(retained), grows_(grows) {}

  // A buffer of at least so many bytes, and at most `most`.
  torch::stable::Tensor acquire(int64_t bytes, int64_t most, const torch::stable::Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++calls_;
    free_.erase(
        std::remove_if(free_.begin(), free_.end(), [&](const Kept& kept) { return calls_ - kept.used > kIdleCalls; }),
        free_.end());
    // Sorted by size: the smallest that is large enough, unless most of it would lie idle; or a new one, where they
    // grow in place of the largest that is too small.
    const auto fit =
        std::find_if(free_.begin(), free_.end(), [&](const Kept& kept) { return kept.tensor.numel() >= bytes; });
    if (fit != free_.end() && fit->tensor.numel() <= most) {
      torch::stable::Tensor tensor = fit->tensor;
      free_.erase(fit);
      return tensor;
    }
    if (grows_ && fit != free_.begin()) free_.erase(fit - 1);
    return allocate_bytes(bytes, device, Use::calls);
  }

  // Those that have waited longest make room.
  void release(torch::stable::Tensor tensor) {
    if (tensor.numel() > retained_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t kept = tensor.numel() + kept_bytes();
    while (kept > retained_) {
      const auto oldest =
          std::min_element(free_.begin(), free_.end(), [](const Kept& a, const Kept& b) { return a.used < b.used; });
      kept -= oldest->tensor.numel();
      free_.erase(oldest);
    }
    const auto place = std::find_if(free_.begin(), free_.end(),
                                    [&](const Kept& other) { return other.tensor.numel() > tensor.numel(); });
    free_.insert(place, Kept{std::move(tensor), calls_});
  }

  // Frees what is kept and says how much it was.
  int64_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = kept_bytes();
    free_.clear();
    return bytes;
  }

 private:
  struct Kept {
    torch::stable::Tensor tensor;
    int64_t used;  // the call before it was released
  };

  int64_t kept_bytes() const {
    int64_t bytes = 0;
    for (const Kept& kept : free_) bytes += kept.tensor.numel();
    return bytes;
  }

  const int64_t retained_;
  const bool grows_;
  std::mutex mutex_;
  std::vector<Kept> free_;
  int64_t calls_ = 0;
};

// A buffer of the pool for as long as this object lives. Concurrent calls each hold their own.
class Workspace {
 public:
  static constexpr int64_t kMostSpare = 4;
  static constexpr int64_t kSmallBytes = int64_t{4} << 20;

  Workspace(int64_t bytes, const torch::stable::Tensor& like)
      : tensor_(WorkspacePool::instance().acquire(bytes, std::max(kMostSpare * bytes, kSmallBytes), like.device())) {}
  ~Workspace() { WorkspacePool::instance().release(std::move(tensor_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return tensor_.data_ptr(); }

 private:
  torch::stable::Tensor tensor_;
};

}  // namespace segpose
