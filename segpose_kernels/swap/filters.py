# SPDX-License-Identifier: BSD-3-Clause
"""Filters packed once for inference, kept beside a model and never copied or saved with it.

The CPU kernels read a filter in an order (and, for Winograd and Fourier, a transform) of their own.
`FilterCache` keeps that form for each layer and input shape, for as long as it is the form of the
weight that the layer has now: it looks at the identity, version counter, address and dtype of
weight and bias, at a few of their elements (for what writes past the version counter, through
`.data` or NumPy), and at the settings that decide the algorithm.
"""

from __future__ import annotations

import functools
import importlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, fastest
from ..autograd import transforms_active
from .eligible import Fused
from .entries import entries
from .unchanged import Unchanged

# Input shapes of a layer that are kept; those with the same algorithm share one packed filter.
SHAPES_A_LAYER = 64

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A layer's attributes in the operator's words."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def params(self) -> tuple[Any, ...]:
        """In schema order, without negative_slope."""
        if self.transposed:
            return self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return self.stride, self.padding, self.dilation, self.groups


def geometry_of(conv: Fused, output_padding: tuple[int, ...] | None = None) -> Geometry | None:
    """None for a layer that pads its input before the kernel runs."""
    stride, dilation = _pair(conv.stride), _pair(conv.dilation)
    if isinstance(conv, nn.ConvTranspose2d):
        extra = conv.output_padding if output_padding is None else output_padding
        return Geometry(stride, _pair(conv.padding), _pair(extra), dilation, conv.groups, True)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        return None
    if isinstance(padding, str):
        kernel = conv._parameters["weight"].shape[2:]  # type: ignore[union-attr]
        total = [
            step * (extent - 1) if padding == "same" else 0
            for step, extent in zip(dilation, kernel, strict=True)
        ]
        if any(size % 2 for size in total):
            return None
        padding = [size // 2 for size in total]
    return Geometry(stride, _pair(padding), (0, 0), dilation, conv.groups, False)


def _pair(value: Any) -> tuple[int, ...]:
    """An attribute of a module: torch's constructors make tuples, but users may set numbers."""
    return (value, value) if isinstance(value, int) else tuple(value)


def slope_of(activation: str, negative_slope: float) -> float | None:
    """The operator's negative_slope; None where the activation cannot run in the kernel."""
    if activation == "leaky_relu":
        return negative_slope if negative_slope > 0 else None
    return 0.0 if activation == "relu" else 1.0


class Form:
    """One convolution prepared for one input shape; frees its packed filter when it goes."""

    def __init__(
        self,
        handle: int,
        weight: Tensor,
        bias: Tensor | None,
        precision: str,
        input_shape: Shape,
        output_shape: Shape,
    ) -> None:
        self.handle = handle
        # Not by __del__: while that runs, another thread may still get this object from a weak
        # reference, without what it held.
        released = weakref.finalize(self, entries().release_prepared, handle)
        released.atexit = False
        self.weight = weight
        self.bias = bias
        self.weight_version = weight._version
        self.bias_version = -1 if bias is None else bias._version
        # Of float32 alone, as torch's switch is.
        self.precision = precision if weight.dtype == torch.float32 else None
        self.plan, self.bytes, self.address = torch.ops.segpose.prepared_info(handle)
        self.input_shape = input_shape
        self.output_shape = output_shape

    def matches(self, weight: Tensor, bias: Tensor | None, precision: str) -> bool:
        """By what Python sees; the kernels (`first_stale`) look at memory and settings."""
        return (
            self.weight is weight
            and self.bias is bias
            and self.weight_version == weight._version
            and (bias is None or self.bias_version == bias._version)
            and (self.precision is None or self.precision == precision)
        )


class _Held:
    """The forms of one layer by shape, geometry and slope, the latest last. Never changed."""

    def __init__(self, forms: dict[Any, Form]) -> None:
        self.forms = forms
        # Of the packed filters, which forms share.
        self.bytes = sum({form.address: form.bytes for form in forms.values()}.values())


_NOTHING = _Held({})


class FilterCache:
    """The prepared convolutions of one model, at most `max_bytes` of packed filters.

    A layer that finds no room runs as in training, packing its filter on every call. Safe with
    several threads. A copy, by `copy.deepcopy` or pickle, starts empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._layers: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[FilterCache], tuple[int]]:
        return FilterCache, (self.max_bytes,)

    @property
    def bytes(self) -> int:
        """Of all packed filters that are held now."""
        with self._lock:
            return self._bytes()

    def clear(self) -> None:
        """Free everything; the next call prepares again."""
        with self._lock:
            self._layers.clear()

    def forms_of(self, layer: nn.Module) -> list[Form]:
        """What is held for a layer, one form for each input shape, the latest last."""
        with self._lock:
            return list(self._layers.get(layer, _NOTHING).forms.values())

    def form(
        self,
        layer: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        shape: Shape,
        geometry: Geometry,
        slope: float,
    ) -> Form | None:
        """The layer as it is now, prepared for inputs [N, C, H, W] of that shape.

        None for a shape that gives no output, which the operator's own checks report.
        """
        precision = backends.cpu_float32_precision()
        key = shape, geometry, slope
        form = self._current(layer, weight, bias, key, precision)
        if form is not None or min(output_shape(weight, shape, geometry)) < 1:
            return form
        with self._lock:
            # Another thread may have prepared it since.
            form = self._current(layer, weight, bias, key, precision)
            return form or self._prepare(layer, weight, bias, key, precision)

    def _current(
        self, layer: nn.Module, weight: Tensor, bias: Tensor | None, key: Any, precision: str
    ) -> Form | None:
        """What is held for a layer as it is now. Takes no lock: tables are replaced as a whole."""
        form = self._layers.get(layer, _NOTHING).forms.get(key)
        if (
            form is not None
            and form.matches(weight, bias, precision)
            and first_stale((form.handle,)) < 0
        ):
            return form
        return None

    def _prepare(
        self, layer: nn.Module, weight: Tensor, bias: Tensor | None, key: Any, precision: str
    ) -> Form:
        held = self._layers.get(layer, _NOTHING).forms
        # When the latest form was added, those before it were as it is: it stands for them.
        latest = next(reversed(held.values()), None)
        current = (
            latest is not None
            and latest.matches(weight, bias, precision)
            and first_stale((latest.handle,)) < 0
        )
        forms = {k: f for k, f in held.items() if k != key} if current else {}
        while len(forms) >= SHAPES_A_LAYER:
            del forms[next(iter(forms))]
        # What is left out goes before room is sought.
        self._layers[layer] = _Held(forms)
        del held, latest
        form = self._new_form(weight, bias, key, precision, forms)
        if form.bytes == 0 and any(other.bytes for other in forms.values()):
            # Other shapes of this layer hold the room that this one needs.
            forms = {}
            self._layers[layer] = _NOTHING
            form = self._new_form(weight, bias, key, precision, forms)
        self._layers[layer] = _Held({**forms, key: form})
        return form

    def _new_form(
        self,
        weight: Tensor,
        bias: Tensor | None,
        key: Any,
        precision: str,
        forms: dict[Any, Form],
    ) -> Form:
        shape, geometry, slope = key
        result = output_shape(weight, shape, geometry)
        room = max(self.max_bytes - self._bytes(), 0)
        prepare = functools.partial(
            torch.ops.segpose.prepare_conv,
            weight,
            bias,
            shape,
            geometry.stride,
            geometry.padding,
            geometry.output_padding,
            geometry.dilation,
            geometry.groups,
            geometry.transposed,
            slope,
            room,
        )
        if fastest.enabled and room > 0:
            tuning = importlib.import_module("..cpu_tuning", __package__)
            label = "conv_transpose2d" if geometry.transposed else "conv2d"
            tuning.tune_prepared(label, shape, result, weight, geometry.params, lambda: prepare([]))
        with torch.no_grad():
            # One of each packed filter is enough to share it.
            one_of_each = {form.address: form.handle for form in forms.values()}
            handle = prepare(list(one_of_each.values()))
        return Form(handle, weight, bias, precision, shape, result)

    def _bytes(self) -> int:
        return sum(held.bytes for held in self._layers.values())


def output_shape(weight: Tensor, shape: Shape, geometry: Geometry) -> Shape:
    """[N, C_out, P, Q]."""
    extents = []
    for axis in range(2):
        kernel = geometry.dilation[axis] * (weight.shape[2 + axis] - 1)
        stride, padding = geometry.stride[axis], geometry.padding[axis]
        if geometry.transposed:
            extra = geometry.output_padding[axis]
            extents.append((shape[2 + axis] - 1) * stride - 2 * padding + kernel + extra + 1)
        else:
            extents.append((shape[2 + axis] + 2 * padding - kernel - 1) // stride + 1)
    channels = weight.shape[1] * geometry.groups if geometry.transposed else weight.shape[0]
    return shape[0], channels, *extents


def first_stale(handles: Sequence[int]) -> int:
    """Position of the first that the kernels would prepare in another way now, or -1: weight or
    bias have other memory or values, or other algorithms may be chosen (threads, precision, tests'
    choices).
    """
    return int(torch.ops.segpose.first_stale(handles))


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A number of the tensors' memory, and on CPU of a few of their values."""
    if backends.LIBRARY.has_kernels_for("CPU") and all(t.device.type == "cpu" for t in tensors):
        return int(torch.ops.segpose.fingerprint(tensors))
    return hash(tuple(t.data_ptr() for t in tensors))


def run_prepared(form: Form, input: Tensor, output: Tensor) -> None:
    """output = act(conv(input)); both of the prepared shapes, in any memory format."""
    torch.ops.segpose.run_prepared(form.handle, input, output)


@functools.cache
def watchers() -> Unchanged:
    """That nothing watches or transforms what runs now, torch.compile aside."""
    nothing = Unchanged()
    nothing.answer(transforms_active, False)
    nothing.answer(torch._C._is_any_autocast_enabled, False)
    nothing.answer(torch._C._get_tracing_state, None)
    nothing.answer(torch._C._len_torch_dispatch_stack, 0)
    nothing.answer(torch._C._len_torch_function_stack, 0)
    return nothing


def is_unwatched() -> bool:
    """Whether nothing watches or transforms what runs now."""
    # Asked first and here: torch.compile does not look into native functions.
    return not torch.compiler.is_compiling() and watchers().hold()


def needs_no_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors may run without autograd."""
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def can_prepare(conv: Fused, weight: Tensor, bias: Tensor | None, input: Tensor) -> bool:
    """Whether this call of the layer can run prepared. It is known to be plain inference."""
    return (
        type(input) is Tensor
        and input.device.type == "cpu"
        and input.dim() == 4
        and input.numel() > 0
        and input.dtype == weight.dtype
        and weight.device.type == "cpu"
        and not weight.is_inference()  # it has no version to look at
        and (bias is None or not bias.is_inference())
        and input.shape[1] == conv.in_channels
        and weight.numel() > 0
        and backends.select(conv.backend, "cpu", weight.dtype) == "cpu"
    )
