# SPDX-License-Identifier: BSD-3-Clause
"""Fused convolutions of cuDNN: torch's binding of one of them, and graphs of its frontend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...testing.spec import ConvSpec
from ..cases import Case
from ..subjects import Subject
from .base import Contender, Prepared, Unavailable, require

__all__ = ["CUDNN", "build_graph"]

_CUDA = frozenset({"cuda"})


def _one_layer(case: Case) -> ConvSpec:
    if case.spec is None:
        raise Unavailable("single layers only")
    if case.training:
        raise Unavailable("no backward")
    return case.spec


def _operands(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias in channels_last."""
    subject: Subject = case.subject.to(device)
    channels_last = torch.channels_last
    parameters = {
        name: parameter.detach().to(case.dtype)
        for name, parameter in subject.module.named_parameters()
    }
    return (
        subject.input.to(case.dtype, memory_format=channels_last),
        parameters["0.weight"].contiguous(memory_format=channels_last),
        parameters.get("0.bias"),
    )


def _fused_relu(case: Case, device: str, threads: int) -> Prepared:
    """`torch.cudnn_convolution_relu`."""
    spec = _one_layer(case)
    if spec.transposed or spec.activation != "relu":
        raise Unavailable("convolution and ReLU only")
    x, weight, bias = _operands(case, device)
    geometry = spec.stride, spec.padding, spec.dilation, spec.groups

    def call() -> Tensor:
        with torch.no_grad():
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)

    return Prepared(call, lambda: {"output": call()}, call)


def build_graph(
    cudnn: Any, spec: ConvSpec, dtype: torch.dtype, *, handle: Any = None
) -> tuple[Any, Sequence[Any]]:
    """A graph of convolution, bias and activation in channels_last, not yet built.

    A transposed convolution is the data gradient of a convolution with the same weight.

    Returns:
        The graph, and its tensors: input, weight, output and, if there is one, bias.
    """
    kinds = {
        torch.float16: cudnn.data_type.HALF,
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float32: cudnn.data_type.FLOAT,
    }
    graph = cudnn.pygraph(
        io_data_type=kinds[dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )

    def tensor(name: str, shape: tuple[int, ...]) -> Any:
        strides = _channels_last_strides(shape)
        return graph.tensor(name=name, dim=list(shape), stride=strides, data_type=kinds[dtype])

    x, weight = tensor("x", spec.input_shape), tensor("weight", spec.weight_shape)
    geometry = {
        "padding": list(spec.padding),
        "stride": list(spec.stride),
        "dilation": list(spec.dilation),
    }
    if spec.transposed:
        y = graph.conv_dgrad(loss=x, filter=weight, **geometry)
        y.set_dim(list(spec.output_shape)).set_stride(_channels_last_strides(spec.output_shape))
    else:
        y = graph.conv_fprop(image=x, weight=weight, **geometry)
    bias = []
    if spec.bias:
        bias.append(tensor("bias", (1, spec.c_out, 1, 1)))
        y = graph.bias(input=y, bias=bias[0])
    if spec.activation == "relu":
        y = graph.relu(input=y)
    elif spec.activation == "leaky_relu":
        y = graph.leaky_relu(input=y, negative_slope=spec.slope)
    y.set_output(True).set_data_type(kinds[dtype])
    return graph, (x, weight, y, *bias)


def _channels_last_strides(shape: tuple[int, ...]) -> list[int]:
    _, c, h, w = shape
    return [c * h * w, 1, w * c, c]


def _graph(case: Case, device: str, threads: int) -> Prepared:
    spec = _one_layer(case)
    cudnn = require("cudnn")
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    graph, names = build_graph(cudnn, spec, case.dtype, handle=handle)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    x, weight, bias = _operands(case, device)
    y = torch.empty(
        spec.output_shape, dtype=case.dtype, device=device, memory_format=torch.channels_last
    )
    tensors = (x, weight, y) if bias is None else (x, weight, y, bias)
    bound = dict(zip(names, tensors, strict=True))
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)

    def call() -> Tensor:
        graph.execute(bound, workspace, handle=handle)
        return y

    def results() -> dict[str, Tensor]:
        y.fill_(float("nan"))
        return {"output": call().clone()}

    return Prepared(call, results)


def _flag_gems(case: Case, device: str, threads: int) -> Prepared:
    """The Triton convolution of flag-gems, and torch's activation behind it."""
    spec = _one_layer(case)
    ops = require("flag_gems.ops")
    function = getattr(ops, "conv_transpose2d" if spec.transposed else "conv2d", None)
    if function is None:
        raise Unavailable("this version has no transposed convolution")
    subject = case.subject.to(device)
    x = subject.input.to(case.dtype)
    module = subject.module.to(case.dtype)
    weight, bias = (*(parameter.detach() for parameter in module.parameters()), None)[:2]
    activation = torch.nn.Sequential(*list(module.children())[1:])

    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = activation(function(x, weight, bias, **spec.attributes))
            return y

    return Prepared(call, lambda: {"output": call()}, call)


CUDNN = (
    Contender("cudnn-fused", "torch.cudnn_convolution_relu", _CUDA, _fused_relu),
    Contender("cudnn-graph", "cuDNN frontend graph", _CUDA, _graph),
    Contender("flag-gems", "flag-gems (Triton)", _CUDA, _flag_gems),
)
