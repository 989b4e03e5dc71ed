# SPDX-License-Identifier: BSD-3-Clause
"""What is timed: a plain torch module, an input, and the gradient that arrives at its output.

Every contender starts from the same three, so that an operator and a whole model take one road.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import CPM2DPose, SegNet
from ..testing.spec import ConvSpec
from ..training import initialise

__all__ = ["Subject", "make_subject", "module_of", "results_of", "sizes_like"]

SEGNET_CLASSES = 10


@dataclass(frozen=True)
class Subject:
    """A float32 module in eval mode on CPU, its input, and a gradient for its output.

    Attributes:
        module: plain torch; contenders copy it before they change anything.
        input: [N, C, H, W], float32, contiguous.
        input_grad: whether a training step computes the gradient of the input too: yes for a layer,
            which has others before it, no for a model, whose input is an image.
    """

    module: nn.Module
    input: Tensor
    grad_output: Tensor
    input_grad: bool

    def module_copy(self) -> nn.Module:
        return copy.deepcopy(self.module)

    def to(self, device: str) -> Subject:
        """The same on another device."""
        return Subject(
            self.module_copy().to(device),
            self.input.to(device),
            self.grad_output.to(device),
            self.input_grad,
        )


def module_of(spec: ConvSpec) -> nn.Module:
    """The problem as torch users write it: a convolution, and an activation if it has one."""
    layer = nn.ConvTranspose2d if spec.transposed else nn.Conv2d
    convolution = layer(spec.c_in, spec.c_out, spec.kernel, bias=spec.bias, **spec.attributes)
    if spec.activation == "none":
        return nn.Sequential(convolution)
    activation = nn.ReLU() if spec.activation == "relu" else nn.LeakyReLU(spec.slope)
    return nn.Sequential(convolution, activation)


def _spec_module(spec: ConvSpec, generator: torch.Generator) -> nn.Module:
    module = module_of(spec)
    tensors = spec.make_tensors(generator=generator)
    with torch.no_grad():
        module[0].weight.copy_(tensors.weight)  # type: ignore[index]
        if tensors.bias is not None:
            module[0].bias.copy_(tensors.bias)  # type: ignore[index]
    return module


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "cpm2dpose": lambda: initialise(CPM2DPose()),
    "segnet": lambda: SegNet(SEGNET_CLASSES),
}


def make_subject(
    what: ConvSpec | str,
    dtype: torch.dtype,
    *,
    input_shape: tuple[int, int, int, int] | None = None,
    seed: int = 0,
) -> Subject:
    """The subject for a problem, or for a model of `MODELS` with the given input shape.

    Fresh normal numbers. Where `dtype` is bfloat16 or float16 every number is first rounded to it,
    so that one float64 reference serves every contender: what differs is how they compute.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(what, ConvSpec):
        module, shape, input_grad = _spec_module(what, generator), what.input_shape, True
    else:
        if input_shape is None:
            raise ValueError(f"the model {what!r} needs an input_shape")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = MODELS[what]()
        shape, input_grad = input_shape, False
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
        x = x.to(dtype).float()
        if isinstance(what, ConvSpec):
            grad = torch.randn(what.output_shape, generator=generator)
            grad = grad.masked_fill(_sign_unsure(module, x, dtype), 0.0)
        else:
            grad = torch.randn((shape[0], *module(x[:1]).shape[1:]), generator=generator)
    return Subject(module.eval(), x, grad.to(dtype).float(), input_grad)


def _sign_unsure(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Where rounding decides on which side of zero an activation's input lies.

    No gradient arrives there: everyone's would be right, and none would agree with another.
    """
    y: Tensor = module[0](x)  # type: ignore[index]
    # Winograd's sums differ from others by up to 1e-5 of their size.
    unsure = max(8 * torch.finfo(dtype).eps, 1e-4)
    return y.abs() < unsure * y.square().mean().sqrt()


def sizes_like(height: int, width: int, count: int) -> list[tuple[int, int]]:
    """So many heights and widths of about the same area, 4% more or less, that one itself first.

    In no order, as images come. Raises ValueError where there are not enough.
    """
    area = height * width
    sizes = [
        (h, w)
        for h in range(1, 4 * height)
        for w in range(1, 4 * width)
        if abs(h * w - area) <= 0.04 * area and (h, w) != (height, width)
    ]
    random.Random(0).shuffle(sizes)
    if len(sizes) + 1 < count:
        raise ValueError(f"{height} x {width} has {len(sizes)} sizes like it, not {count - 1}")
    return [(height, width), *sizes[: count - 1]]


def results_of(subject: Subject, *, training: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and, for a training step, gradients by name, as plain torch computes them in `dtype`.

    Names are "output", "grad input" (where the subject wants it) and "grad <parameter>".
    """
    module = subject.module_copy().to(dtype)
    x = subject.input.to(dtype, copy=True)
    if not training:
        with torch.no_grad():
            return {"output": module(x)}
    x.requires_grad_(subject.input_grad)
    output = module(x)
    torch.autograd.backward(output, subject.grad_output.to(dtype))
    results = {"output": output.detach()}
    if x.grad is not None:
        results["grad input"] = x.grad
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        results[f"grad {name}"] = parameter.grad
    return results
