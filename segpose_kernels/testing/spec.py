# SPDX-License-Identifier: BSD-3-Clause
"""One convolution problem as data: extents, attributes, operands in many layouts, and its work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Activation", "ConvSpec", "ConvTensors", "Op", "Pair", "as_layout"]

Pair = tuple[int, int]
Op = Literal["conv2d", "conv_transpose2d"]
Activation = Literal["none", "relu", "leaky_relu"]


@dataclass(frozen=True)
class ConvTensors:
    """Operands of one call, and the gradient that arrives at its output."""

    input: Tensor  # [N, C_in, H, W]
    weight: Tensor  # conv2d [C_out, C_in/groups, R, S]; conv_transpose2d [C_in, C_out/groups, R, S]
    bias: Tensor | None  # [C_out]
    grad_output: Tensor  # [N, C_out, P, Q]


@dataclass(frozen=True)
class ConvSpec:
    """One call of `conv2d_act` or `conv_transpose2d_act`: extents, attributes and activation.

    `h`, `w` are the extents of the input for both operators. `slope` counts for "leaky_relu" only.
    """

    name: str
    op: Op
    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: Activation = "leaky_relu"
    slope: float = 0.01
    bias: bool = True

    @property
    def transposed(self) -> bool:
        return self.op == "conv_transpose2d"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c_in, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape in torch's order for the operator, see `ConvTensors.weight`."""
        if self.transposed:
            return self.c_in, self.c_out // self.groups, *self.kernel
        return self.c_out, self.c_in // self.groups, *self.kernel

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        p, q = (self._output_extent(axis) for axis in (0, 1))
        return self.n, self.c_out, p, q

    def _output_extent(self, axis: int) -> int:
        extent = (self.h, self.w)[axis]
        effective_kernel = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        if self.transposed:
            full = (extent - 1) * self.stride[axis] + effective_kernel
            return full - 2 * self.padding[axis] + self.output_padding[axis]
        return (extent + 2 * self.padding[axis] - effective_kernel) // self.stride[axis] + 1

    @property
    def op_slope(self) -> float:
        """The number that stands for the activation below the Python API: 1 none, 0 ReLU, else
        leaky ReLU.
        """
        return {"none": 1.0, "relu": 0.0, "leaky_relu": self.slope}[self.activation]

    @property
    def attributes(self) -> dict[str, Any]:
        """Keyword arguments of torch.nn.functional.conv2d or conv_transpose2d for this problem."""
        shared: dict[str, Any] = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        return shared | ({"output_padding": self.output_padding} if self.transposed else {})

    @property
    def activation_arguments(self) -> dict[str, Any]:
        """The further keyword arguments that the fused functions take."""
        return {"activation": self.activation, "negative_slope": self.slope}

    @property
    def flops(self) -> int:
        """2 per multiply-add of the forward pass, counted over *input* positions for a transposed
        convolution.

        Each of the three passes (fprop, dgrad, wgrad) of a layer has this many. Taps in the padding
        count.
        """
        _, _, p, q = self.output_shape
        positions = self.h * self.w if self.transposed else p * q
        return (
            2
            * self.n
            * positions
            * (self.c_in * self.c_out // self.groups)
            * math.prod(self.kernel)
        )

    def bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Compulsory traffic of the forward pass: each operand read once and the output written
        once.
        """
        elements = sum(
            math.prod(s) for s in (self.input_shape, self.weight_shape, self.output_shape)
        )
        return (elements + self.c_out * self.bias) * dtype.itemsize

    def reduced(self, *, batch: int = 2, channels: int = 16, extent: int = 9) -> ConvSpec:
        """The same kernel, stride, padding and groups on a small input, named `<name>-reduced`.

        Channels keep their residue modulo `channels`, so that an unaligned count stays unaligned.
        Extents shrink to about `extent` but stay large enough to give an output.
        """

        def shrink(count: int) -> int:
            return count if count <= channels or self.groups > 1 else channels + count % channels

        def shrink_extent(size: int, axis: int) -> int:
            span = self.dilation[axis] * (self.kernel[axis] - 1) + 1 - 2 * self.padding[axis]
            smallest = 1 if self.transposed else span
            return min(size, max(extent + axis, smallest))  # + axis: keep it non-square

        return replace(
            self,
            name=f"{self.name}-reduced",
            n=min(self.n, batch),
            c_in=shrink(self.c_in),
            c_out=shrink(self.c_out),
            h=shrink_extent(self.h, 0),
            w=shrink_extent(self.w, 1),
        )

    def make_tensors(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        generator: torch.Generator | None = None,
        input_layout: str = "contiguous",
        weight_layout: str = "contiguous",
        grad_layout: str = "contiguous",
        device: torch.device | str = "cpu",
    ) -> ConvTensors:
        """Fresh normal numbers in the given memory layouts (names in `LAYOUTS`).

        The weight is scaled by one over the root of the number of terms an output sums, so outputs
        are of the order of one in every problem, as after a usual initialisation.
        """

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (values * scale).to(device=device, dtype=dtype)

        terms = (self.c_in // self.groups) * math.prod(self.kernel)
        if self.transposed:
            terms = max(1, terms // math.prod(self.stride))
        return ConvTensors(
            input=as_layout(draw(self.input_shape), input_layout),
            weight=as_layout(draw(self.weight_shape, terms**-0.5), weight_layout),
            bias=draw((self.c_out,), 0.5) if self.bias else None,
            grad_output=as_layout(draw(self.output_shape), grad_layout),
        )

    def __str__(self) -> str:
        return self.name


LAYOUTS = (
    "contiguous",
    "channels_last",
    "transposed",
    "sliced",
    "offset",
    "odd_strides",
    "expanded",
)


def as_layout(tensor: Tensor, layout: str) -> Tensor:
    """A 4-D tensor with the values of `tensor` in another memory layout.

    contiguous, channels_last: torch's own; transposed: H and W swapped in memory; sliced: every
    second column and a part of the channels of a larger tensor; offset: a dense tensor that starts
    inside its storage; odd_strides: dimensions of size one have meaningless strides; expanded: the
    first item or value, repeated with stride 0 over the batch (so the values are those of item 0).

    Raises ValueError for another name.
    """
    n, c, h, w = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        # NaN around the values: a kernel that reads a neighbour shows it.
        larger = tensor.new_full((n, c + 2, h, 2 * w + 1), math.nan)
        view = larger[:, 1 : c + 1, :, 1 : 2 * w + 1 : 2]
        return view.copy_(tensor)
    if layout == "offset":
        storage = tensor.new_full((tensor.numel() + 3,), math.nan)
        return storage[3:].view(tensor.shape).copy_(tensor)
    if layout == "odd_strides":
        dense = tensor.contiguous()
        strides = [
            7919 if size == 1 else stride
            for size, stride in zip(dense.shape, dense.stride(), strict=True)
        ]
        return dense.as_strided(dense.shape, strides)
    if layout == "expanded":
        return tensor[:1].contiguous().expand(n, c, h, w) if n else tensor
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
