// SPDX-License-Identifier: BSD-3-Clause
// The backward of a layer with a small filter, a few images at a time: the masked gradient of a block, its input
// gradient and its share of the filter's gradient follow each other on one thread and in its L2 cache. Whole passes
// bring the gradient in again for each, and threads wait for each other after each: the backward of SegNet's last layer
// on 64 images took 0.82 ms in passes and 0.71 in blocks (two threads).
#pragma once

#include <memory>

#include "executor.h"
#include "plan.h"
#include "staging.h"
#include "tensor_view.h"

namespace segpose {

struct LayerBackward {
  ConvProblem problem;
  bool transposed;
  MaskedSource grad;  // of the output
  TensorView input;
  FilterView filter;
  // Null where a gradient is not wanted.
  TensorView grad_input{};
  FilterView grad_filter{};
  void* grad_bias = nullptr;
};

// Plans of a block's passes, null where a pass is not wanted.
struct BlockPlans {
  std::shared_ptr<const Plan> input, weight;
};

// Images of a block, 0 where whole passes are better.
int64_t block_images(const LayerBackward& layer);
// Whether these passes read their operands as the blocks lay them out.
bool can_run_in_blocks(const BlockPlans& plans);

// `plans` are those of `images` images, `last` those of what is left after whole blocks (the same, if nothing is).
struct BlockwiseBackward {
  const LayerBackward* layer;
  int64_t images;
  BlockPlans plans, last;
};

int64_t blockwise_workspace(const BlockwiseBackward& backward, int64_t workers);
void run_blockwise_backward(const BlockwiseBackward& backward, void* workspace, const Executor& executor);

}  // namespace segpose
