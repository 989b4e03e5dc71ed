# SPDX-License-Identifier: BSD-3-Clause
"""How much work a model is: floating-point operations of a forward, counted on meta tensors."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from .subjects import MODELS

__all__ = ["model_flops"]


@functools.cache
def model_flops(model: str, input_shape: tuple[int, int, int, int]) -> float:
    """2 per multiply-add of every convolution; over input positions for transposed ones."""
    total = 0.0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        transposed = isinstance(layer, nn.ConvTranspose2d)
        n, _, height, width = (inputs[0] if transposed else output).shape
        channels = layer.in_channels * layer.out_channels // layer.groups
        total += 2.0 * n * height * width * channels * math.prod(layer.kernel_size)

    with torch.device("meta"):
        network = MODELS[model]()
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(count)
        network(torch.empty(input_shape))
    return total
