# SPDX-License-Identifier: BSD-3-Clause
"""Runs the triton backend without a GPU: real plans and launches, PTX executed by ptxsim.

    with tritonsim.simulated(cc=90) as simulator:
        conv2d_act(x, w, b, backend="triton")      # CPU tensors as device memory

Inside the block the backend takes CPU tensors, its plans are those of the given architecture, and
each launch is compiled ahead of time exactly as Triton's own launcher would compile it. A launch
that ptxsim reports on, or that leaves an element of an output unwritten, raises.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from ptxsim import Counters, Out, triton_aot
from torch import Tensor

from segpose_kernels import backends
from segpose_kernels.triton import calls, launch
from segpose_kernels.triton.device import Device

__all__ = ["Launch", "Simulator", "device", "simulated"]

_OPTIONS = ("num_warps", "num_stages")
_OUTPUT = re.compile(r"(^|_)out_ptr$")


@dataclass(frozen=True)
class Launch:
    """One kernel start."""

    name: str
    grid: int
    arguments: Mapping[str, Any]
    kernel: triton_aot.TritonKernel


@dataclass
class Simulator:
    """Compiles and runs launches; `launches` keeps them in order.

    ones_are_constants: integer arguments equal to 1 become constants, as in Inductor's launches.
    misalign: bytes by which every tensor misses a 16-byte boundary.
    schedule: seed of another order of the warps.
    """

    cc: int
    counters: Counters | None = None
    ones_are_constants: bool = False
    misalign: int = 0
    schedule: int | None = None
    kernels: dict[Any, triton_aot.TritonKernel] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)

    def compile(
        self, kernel: Any, tensors: Mapping[str, Tensor | None], arguments: Mapping[str, Any]
    ) -> tuple[triton_aot.TritonKernel, dict[str, Any]]:
        """The compiled kernel, and the values of the parameters it still has, by name."""
        constants: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for parameter in kernel.params:
            name = parameter.name
            value = tensors[name] if name in tensors else arguments[name]
            fixed = parameter.is_constexpr or value is None
            fixed = fixed or (self.ones_are_constants and name in arguments and value == 1)
            (constants if fixed else values)[name] = value
        signature = {name: triton_aot.type_of(value) for name, value in values.items()}
        options = {name: arguments[name] for name in _OPTIONS}
        key = (
            kernel.fn,
            self.cc,
            self.misalign % 16 == 0,
            tuple(signature.items()),
            tuple((name, type(value), value) for name, value in constants.items()),
            tuple(options.items()),
        )
        if key not in self.kernels:
            self.kernels[key] = triton_aot.compile(
                kernel,
                constants=constants,
                cc=self.cc,
                signature=signature,
                divisible=self.misalign % 16 == 0,
                **options,
            )
            # Parsed kernels live to the end: keep the collector off them.
            gc.freeze()
        return self.kernels[key], values

    def start(
        self,
        kernel: Any,
        grid: int,
        tensors: Mapping[str, Tensor | None],
        arguments: Mapping[str, Any],
    ) -> None:
        """In place of `launch.start`."""
        compiled, values = self.compile(kernel, tensors, arguments)
        self.launches.append(Launch(kernel.__name__, grid, dict(arguments), compiled))
        if grid == 0:
            return
        memory: dict[int, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        positional: list[Any] = []
        for name, value in values.items():
            if isinstance(value, Tensor):
                # An empty tensor has no address of its own.
                value = memory.setdefault(value.data_ptr() or id(value), _flat(value))
                if _OUTPUT.search(name) and value.numel():
                    outputs[name] = value
                    value = Out(value)
            positional.append(value)
        options: dict[str, Any] = {} if self.schedule is None else {"schedule": self.schedule}
        report = compiled.run(
            (grid,), *positional, counters=self.counters, misalign=self.misalign, **options
        )
        report.raise_if_any()
        for name, output in outputs.items():
            missing = int(report.unwritten(output).sum())
            if missing:
                raise AssertionError(
                    f"{kernel.__name__} left {missing} elements of {name} unwritten"
                )


def _flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as one dimension."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    if tensor.numel() and tensor.untyped_storage().nbytes() < flat.nbytes:
        raise ValueError("a launch needs dense tensors")
    return flat


def device(cc: int, multiprocessors: int = 108) -> Device:
    """The device of an architecture such as 80 or 90."""
    return replace(Device.generic(divmod(cc, 10)), multiprocessors=multiprocessors)


# Compiled kernels outlive a simulator: the same launches come again in other tests.
_compiled: dict[Any, triton_aot.TritonKernel] = {}


@contextlib.contextmanager
def simulated(
    cc: int = 80, *, multiprocessors: int = 108, counters: Counters | None = None, **options: Any
) -> Iterator[Simulator]:
    """Route the triton backend's launches into ptxsim; see `Simulator` for the options."""
    simulator = Simulator(cc, counters, kernels=_compiled, **options)
    shape = device(cc, multiprocessors)
    triton = next(b for b in backends.BACKENDS if b.name == "triton")
    on_cpu = replace(triton, devices=frozenset({"cpu", "cuda"}), missing=None)
    with (
        mock.patch.object(launch, "start", simulator.start),
        mock.patch.object(calls, "device_of", return_value=shape),
        mock.patch.dict(backends._BY_NAME, {"triton": on_cpu}),
        mock.patch.dict(backends._selected, clear=True),
    ):
        yield simulator
