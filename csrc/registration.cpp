// SPDX-License-Identifier: BSD-3-Clause
// Every schema of the library. Kernels are attached per dispatch key in <device>/conv.cpp; fakes and autograd formulas
// are registered from Python (segpose_kernels/autograd.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(segpose, m) {
  m.def(
      "conv2d_act(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
      "SymInt groups, float negative_slope) -> Tensor");
  m.def(
      "conv2d_act_backward(Tensor grad_output, Tensor? output, Tensor input, Tensor weight, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, float negative_slope, bool need_input, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_transpose2d_act(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] output_padding, SymInt groups, SymInt[2] dilation, float negative_slope) -> Tensor");
  m.def(
      "conv_transpose2d_act_backward(Tensor grad_output, Tensor? output, Tensor input, Tensor weight, SymInt[2] "
      "stride, "
      "SymInt[2] padding, SymInt[2] output_padding, SymInt groups, SymInt[2] dilation, float negative_slope, "
      "bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  // Layers that follow each other, in one call: segpose_kernels/chain.py.
  m.def("conv_chain(Tensor input, Tensor[] parameters, int[] code, float[] slopes, bool contiguous) -> Tensor[]");
  m.def(
      "conv_chain_backward(Tensor grad_output, Tensor[] values, Tensor[] parameters, int[] code, float[] slopes, "
      "int[] needs) -> Tensor[]");
  // Inference: convolutions bound to an input shape, held by a number, that write into a given output.
  m.def(
      "prepare_conv(Tensor weight, Tensor? bias, int[4] input_shape, int[2] stride, int[2] padding, "
      "int[2] output_padding, int[2] dilation, int groups, bool transposed, float negative_slope, int max_bytes, "
      "int[] donors) -> int");
  m.def("run_prepared(int handle, Tensor input, Tensor(a!) output) -> ()");
  m.def("prepare_sequence(int[] code, int[] places, Tensor[] fixed) -> int");
  m.def("run_sequence(int handle, Tensor(a!)[] given) -> (bool, Tensor[])");
  m.def("release_sequence(int handle) -> ()");
  m.def("first_stale(int[] handles) -> int");
  m.def("fingerprint(Tensor[] tensors) -> int");
  m.def("prepared_info(int handle) -> (str, int, int)");
  m.def("release_prepared(int handle) -> ()");
  // Addresses of functions that Python calls itself: segpose_kernels/swap/entries.py.
  m.def("entries() -> int[]");
  // Between convolutions, in channels_last.
  m.def("max_pool2x2(Tensor input, Tensor(a!) output) -> ()");
  m.def("max_pool2x2_backward(Tensor grad_output, Tensor output, Tensor input, Tensor(a!) grad_input) -> ()");
  m.def("to_contiguous(Tensor input) -> Tensor");
  m.def("allocate_workspace(Tensor like, int bytes) -> Tensor");
  m.def("allocate_result(Tensor like, int[] shape, bool channels_last) -> Tensor");
  // Process-wide settings of the CPU kernels, each returning what it replaces: segpose_kernels/settings.py.
  m.def("set_precision(str name) -> str");
  m.def("set_algorithm(str name) -> str");
  m.def("choose_algorithm(int[] problem, str pass_name, str dtype, str precision, bool prepared, str algorithm) -> ()");
  m.def("precision_of(Tensor weight, float flops) -> str");
  m.def("release_workspace() -> int");
  // torch's switches for float32 convolutions on CUDA and on CPU; implemented in Python, segpose_kernels/backends.py.
  m.def("tf32_allowed() -> bool");
  m.def("cpu_float32_precision() -> str");
}
