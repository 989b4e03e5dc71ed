# SPDX-License-Identifier: BSD-3-Clause
"""oneDNN's fused convolution and activation with packed weights, as torch's compiler calls it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ...testing.spec import ConvSpec
from ..cases import Case
from .base import Contender, Prepared, Unavailable

__all__ = ["MKLDNN"]

_ATTRIBUTES = {"none": "none", "relu": "relu", "leaky_relu": "leaky_relu"}


def _prepare(case: Case, device: str, threads: int) -> Prepared:
    if case.spec is None:
        raise Unavailable("single layers only; compile calls it in models")
    if case.training:
        raise Unavailable("it has no backward")
    # Its own best format differs from layer to layer.
    return min((_fused(case, case.spec, f) for f in _FORMATS), key=_seconds)


_FORMATS = (torch.channels_last, torch.contiguous_format)


def _fused(case: Case, spec: ConvSpec, memory_format: torch.memory_format) -> Prepared:
    subject = case.subject
    x = subject.input.to(case.dtype).contiguous(memory_format=memory_format)
    parameters = dict(subject.module.named_parameters())
    weight = parameters["0.weight"].detach().to(case.dtype)
    bias = parameters["0.bias"].detach().to(case.dtype) if spec.bias else None
    scalars = [spec.slope] if spec.activation == "leaky_relu" else []
    geometry: tuple[Any, ...] = (spec.padding, spec.stride, spec.dilation, spec.groups)
    ops = torch.ops.mkldnn
    if spec.transposed:
        geometry = (spec.padding, spec.output_padding, *geometry[1:])
        packed = ops._reorder_convolution_transpose_weight(weight, *geometry, x.shape)
        fused = ops._convolution_transpose_pointwise
    else:
        packed = ops._reorder_convolution_weight(weight, *geometry, x.shape)
        fused = ops._convolution_pointwise
    arguments = (packed, bias, *geometry, _ATTRIBUTES[spec.activation], scalars, "")

    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = fused.default(x, *arguments)
            return y

    return Prepared(call, lambda: {"output": call()}, call)


def _seconds(prepared: Prepared) -> float:
    """Best of a few calls, to choose between formats."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        prepared.call()
        times.append(time.perf_counter() - start)
    return min(times)


MKLDNN = (Contender("mkldnn", "oneDNN fused", frozenset({"cpu"}), _prepare),)
