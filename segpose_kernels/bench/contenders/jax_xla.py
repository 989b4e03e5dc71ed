# SPDX-License-Identifier: BSD-3-Clause
"""JAX: the subject's graph, played with jax.numpy in NHWC and compiled by XLA."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..cases import Case
from .base import Contender, Prepared, Unavailable, require

__all__ = ["JAX"]


def _prepare(case: Case, device: str, threads: int) -> Prepared:
    jax = require("jax")
    jnp = require("jax.numpy")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores != threads:
        raise Unavailable(f"its pool has a thread for each of {cores} cores, asked for {threads}")
    subject = case.subject
    dtype = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}.get(case.dtype)
    if dtype is None:
        raise Unavailable(f"not asked for {case.dtype}".replace("torch.", ""))
    function = _translate(subject.module, jax, dtype)
    parameters = {
        name: jnp.asarray(p.detach().numpy(), dtype=jnp.float32 if case.training else dtype)
        for name, p in subject.module.named_parameters()
    }
    x = jnp.asarray(_nhwc(subject.input).numpy(), dtype=dtype)
    grad = jnp.asarray(_nhwc(subject.grad_output).numpy(), dtype=dtype)

    if not case.training:
        forward = jax.jit(function)

        def call() -> Any:
            return forward(parameters, x).block_until_ready()

        return Prepared(call, lambda: {"output": _nchw(call())})

    def step(parameters: Any, x: Any, grad: Any) -> Any:
        if subject.input_grad:
            y, pull = jax.vjp(function, parameters, x)
            return y, *pull(grad)
        y, pull = jax.vjp(lambda p: function(p, x), parameters)
        return y, *pull(grad)

    compiled = jax.jit(step)

    def train() -> Any:
        return jax.block_until_ready(compiled(parameters, x, grad))

    def results() -> dict[str, Tensor]:
        y, grads, *grad_x = train()
        found = {"output": _nchw(y)}
        if grad_x:
            found["grad input"] = _nchw(grad_x[0])
        return found | {f"grad {name}": _tensor(value) for name, value in grads.items()}

    return Prepared(train, results)


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous()


def _tensor(array: Any) -> Tensor:
    numpy = require("numpy")  # JAX brings it
    return torch.from_numpy(numpy.array(array, dtype=numpy.float32))


def _nchw(array: Any) -> Tensor:
    return _tensor(array).permute(0, 3, 1, 2)


def _translate(module: nn.Module, jax: Any, dtype: Any) -> Callable[[Any, Any], Any]:
    """A function of (parameters by torch's names, NHWC input) that computes what the module does.

    Parameters are cast to `dtype`, as autocast does.
    """
    trace = fx.symbolic_trace(module)
    layers = dict(trace.named_modules())

    def run(parameters: dict[str, Any], x: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        for node in trace.graph.nodes:
            arguments = fx.map_arg(node.args, values.__getitem__)
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "output":
                return arguments[0]
            elif node.op == "call_module":
                own = {
                    name: parameters[f"{node.target}.{name}"].astype(dtype)
                    for name, _ in layers[node.target].named_parameters()
                }
                values[node] = _layer(layers[node.target], own, arguments[0], jax)
            elif node.op == "call_function":
                values[node] = _function(node.target, arguments, node.kwargs, jax)
            else:
                raise NotImplementedError(f"no translation of {node.format_node()}")
        raise AssertionError("a graph ends in an output")

    return run


def _layer(layer: nn.Module, own: dict[str, Any], x: Any, jax: Any) -> Any:
    if isinstance(layer, nn.ReLU):
        return jax.nn.relu(x)
    if isinstance(layer, nn.LeakyReLU):
        return jax.nn.leaky_relu(x, layer.negative_slope)
    if isinstance(layer, nn.MaxPool2d):
        window = (1, layer.kernel_size, layer.kernel_size, 1)
        stride = (1, layer.stride, layer.stride, 1)
        return jax.lax.reduce_window(x, -jax.numpy.inf, jax.lax.max, window, stride, "VALID")
    if isinstance(layer, nn.ConvTranspose2d):
        y = _conv_transpose(layer, own["weight"], x, jax)
    elif isinstance(layer, nn.Conv2d):
        y = jax.lax.conv_general_dilated(
            x,
            own["weight"],
            window_strides=layer.stride,
            padding=[(p, p) for p in layer.padding],
            rhs_dilation=layer.dilation,
            feature_group_count=layer.groups,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
    else:
        raise NotImplementedError(f"no translation of {type(layer).__name__}")
    return y + own["bias"] if "bias" in own else y


def _conv_transpose(layer: nn.ConvTranspose2d, weight: Any, x: Any, jax: Any) -> Any:
    """A convolution over the input dilated by the stride, with the filter turned round."""
    c_in, c_group, r, s = weight.shape
    groups = layer.groups
    # [C_in, C_out/groups, R, S] -> [C_out, C_in/groups, R, S]
    filters = weight.reshape(groups, c_in // groups, c_group, r, s)
    filters = filters.swapaxes(1, 2).reshape(groups * c_group, c_in // groups, r, s)
    padding = []
    for axis, extent in enumerate((r, s)):
        edge = layer.dilation[axis] * (extent - 1) - layer.padding[axis]
        padding.append((edge, edge + layer.output_padding[axis]))
    return jax.lax.conv_general_dilated(
        x,
        filters[:, :, ::-1, ::-1],
        window_strides=(1, 1),
        padding=padding,
        lhs_dilation=layer.stride,
        rhs_dilation=layer.dilation,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )


def _function(target: Any, arguments: Any, keywords: Any, jax: Any) -> Any:
    if target is F.leaky_relu:
        slope = arguments[1] if len(arguments) > 1 else keywords.get("negative_slope", 0.01)
        return jax.nn.leaky_relu(arguments[0], slope)
    if target is F.relu:
        return jax.nn.relu(arguments[0])
    if target is torch.cat:
        dim = keywords.get("dim", arguments[1] if len(arguments) > 1 else 0)
        if dim != 1:
            raise NotImplementedError(f"concatenation along {dim}")
        return jax.numpy.concatenate(arguments[0], axis=3)
    raise NotImplementedError(f"no translation of {target}")


JAX = (Contender("jax", "JAX (XLA)", frozenset({"cpu"}), _prepare),)
