// SPDX-License-Identifier: BSD-3-Clause
// Steps of a prepared model in one call: Python finds its way through a model once, and then only hands over tensors.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "prepared.h"

namespace segpose {
namespace {

// The numbers are those of segpose_kernels/swap/blueprint.py.
// kPooledConv: the step after it pools, and nothing else reads what stands between.
enum StepKind : int64_t { kConv = 0, kPool = 1, kCopy = 2, kTranspose = 3, kPooledConv = 4 };
// Kind, handle of a convolution, and which of the tensors are read and written.
constexpr size_t kStepInts = 4;

// False, and nothing done, where a convolution is no longer as it was prepared.
bool run_steps(Ints code, std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(code.size() % kStepInts == 0, "segpose: code must hold ", kStepInts, " numbers for each step");
  for (size_t i = 0; i < code.size(); i += kStepInts) {
    if ((code[i] == kConv || code[i] == kPooledConv) && !is_current(code[i + 1])) return false;
  }
  const auto tensor = [&](int64_t index) -> const Tensor& {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(tensors.size()), "segpose: a step uses tensor ", index,
                    " of ", tensors.size());
    return tensors[static_cast<size_t>(index)];
  };
  for (size_t i = 0; i < code.size(); i += kStepInts) {
    const Tensor& input = tensor(code[i + 2]);
    const Tensor& output = tensor(code[i + 3]);
    switch (code[i]) {
      case kConv:
        run_prepared(code[i + 1], input, output);
        break;
      case kPooledConv:
        STD_TORCH_CHECK(
            i + kStepInts < code.size() && code[i + kStepInts] == kPool && code[i + kStepInts + 2] == code[i + 3],
            "segpose: no pool reads what step ", i / kStepInts, " writes");
        if (run_prepared_pooled(code[i + 1], input, tensor(code[i + kStepInts + 3]))) {
          i += kStepInts;
        } else {
          run_prepared(code[i + 1], input, output);
        }
        break;
      case kPool:
        max_pool2x2(input, output);
        break;
      case kCopy:
        copy_channels(input, output);
        break;
      case kTranspose:
        write_contiguous(input, output);
        break;
      default:
        STD_TORCH_CHECK(false, "segpose: no step has the kind ", code[i]);
    }
  }
  return true;
}

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) { m.impl("run_steps", TORCH_BOX(&segpose::run_steps)); }
