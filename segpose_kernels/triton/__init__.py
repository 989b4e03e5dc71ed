# SPDX-License-Identifier: BSD-3-Clause
"""The triton backend: the same operators for CUDA devices, compiled by Triton.

One way down: `ops` (registered operators) -> `launch` (tensors) -> `plan` (problem to kernel, tile
and grid; pure) -> `kernels`, `direct`, `pointwise`. Importing `ops` imports Triton, so nothing here
is imported before a call needs it.
"""
