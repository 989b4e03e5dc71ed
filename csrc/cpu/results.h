// SPDX-License-Identifier: BSD-3-Clause
// Large results in memory that is kept: malloc hands such blocks back to the system when they are freed and takes fresh
// pages, zeroed one fault at a time, for the next. For a result of 32 MiB that costs longer than the convolution.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace segpose {

// Blocks of results that nobody holds any more, for the next ones of the same size.
class ResultPool {
 public:
  // Up to here glibc's malloc keeps blocks itself.
  static constexpr int64_t kSmallest = int64_t{32} << 20;
  // Of all blocks that wait.
  static constexpr int64_t kMostKept = int64_t{256} << 20;

  // Never destroyed: results may outlive torch's own statics.
  static ResultPool& instance() {
    static auto* pool = new ResultPool;
    return *pool;
  }

  torch::stable::Tensor acquire(int64_t bytes, const torch::stable::Device& device) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;) {
        if (free_[i].numel() != bytes) continue;
        torch::stable::Tensor block = std::move(free_[i]);
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
        kept_ -= bytes;
        return block;
      }
    }
    return torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte, std::nullopt, device);
  }

  // Those that have waited longest make room.
  void release(torch::stable::Tensor block) {
    std::vector<torch::stable::Tensor> dropped;  // freed without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_ += block.numel();
    free_.push_back(std::move(block));
    size_t count = 0;
    for (; kept_ > kMostKept; ++count) kept_ -= free_[count].numel();
    const auto end = free_.begin() + static_cast<std::ptrdiff_t>(count);
    dropped.assign(std::make_move_iterator(free_.begin()), std::make_move_iterator(end));
    free_.erase(free_.begin(), end);
  }

  // Frees what is kept and says how much it was.
  int64_t clear() {
    std::vector<torch::stable::Tensor> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(free_);
    return std::exchange(kept_, 0);
  }

 private:
  std::mutex mutex_;
  std::vector<torch::stable::Tensor> free_;  // the last one waits shortest
  int64_t kept_ = 0;
};

}  // namespace segpose
