# SPDX-License-Identifier: BSD-3-Clause
"""Starts kernels: by Triton's launcher the first time, then by what it has compiled.

The launcher binds, types and hashes every argument of each launch, 17 to 28 us on a machine where
starting a compiled kernel takes 9. But all arguments besides the tensors are those of a plan, so
what was compiled is known by the plan and the kinds of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .plan import Arguments

__all__ = ["start", "wrap_triton"]

Tensors = Mapping[str, Tensor | None]


def wrap_triton(kernel: Any) -> Any:
    """torch's, where a mode (a tracer, fakes) is to see the launch; else the kernel as it is.

    torch finds the kernels of an operator by calls of this name in its source.
    """
    return torch.library.wrap_triton(kernel) if torch._C._len_torch_dispatch_stack() else kernel


def start(kernel: Any, grid: int, tensors: Tensors, arguments: Arguments) -> None:
    """Start a kernel on the current stream of its tensors' device, or record it while tracing."""
    if type(kernel).__name__ == "TraceableTritonKernelWrapper":
        kernel[(grid,)](**tensors, **arguments)
        return
    if grid == 0:
        return
    index = next(tensor.get_device() for tensor in tensors.values() if tensor is not None)
    if index == torch.cuda.current_device():
        _start(kernel, grid, tensors, arguments, index)
        return
    with torch.cuda.device(index):
        _start(kernel, grid, tensors, arguments, index)


def _start(kernel: Any, grid: int, tensors: Tensors, arguments: Arguments, index: int) -> None:
    # What Triton compiles by, besides the plan: see `specialize_impl` in its jit.py.
    kinds = [
        None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16)
        for tensor in tensors.values()
    ]
    key = (kernel.fn, index, *kinds)
    known = arguments.compiled.get(key)
    if known is not None:
        known(grid, tensors)
        return
    compiled = kernel[(grid,)](**tensors, **arguments)
    if isinstance(compiled, CompiledKernel):
        arguments.compiled[key] = _starter(kernel, compiled, tensors, arguments)


def _starter(
    kernel: Any, compiled: CompiledKernel, tensors: Tensors, arguments: Arguments
) -> Callable[[int, Tensors], None]:
    """Starts a compiled kernel with other tensors in the places of these."""
    names = kernel.arg_names
    template = [arguments.get(name) for name in names]
    places = [(names.index(name), name) for name in tensors]

    def again(grid: int, tensors: Tensors) -> None:
        values = template.copy()
        for place, name in places:
            values[place] = tensors[name]
        compiled[(grid, 1, 1)](*values)

    return again
