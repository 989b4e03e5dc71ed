# SPDX-License-Identifier: BSD-3-Clause
"""Tolerances and error metrics: every result is compared with the float64 definition, by name.

The rules are in one table, `TOLERANCES`. Two facts shape them. A sum can cancel to nearly nothing,
and then no error is small *relative to it*; the norm of the terms it sums says what an error can be
measured against (`Reference.terms`). And the sign of an output near zero is decided by rounding, so
below float64 the reference gradients take the activation's mask from the output under test, which
has been compared by itself before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import ConvSpec, ConvTensors

__all__ = [
    "NAMES",
    "TF32",
    "TOLERANCES",
    "Reference",
    "Tolerance",
    "assert_close_to_reference",
    "assert_results_match",
    "eager",
    "max_error",
    "relative_l2",
]

Results = Mapping[str, Tensor]
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Tolerance:
    """Rule for one dtype. Exactly one of `relative_l2` and `times_eager` is set."""

    reason: str
    relative_l2: float | None = None
    times_eager: float | None = None

    def __post_init__(self) -> None:
        if (self.relative_l2 is None) == (self.times_eager is None):
            raise ValueError("a Tolerance has either relative_l2 or times_eager")


_LOW = "at most twice the largest error of torch's own operators in this dtype"
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(
        "only the order of summation differs from torch; 2^-52 times some thousand terms",
        relative_l2=1e-12,
    ),
    torch.float32: Tolerance(
        "promised for every algorithm, Winograd's included; direct summation has about 3e-7",
        relative_l2=1e-5,
    ),
    torch.bfloat16: Tolerance(_LOW, times_eager=2.0),
    torch.float16: Tolerance(_LOW, times_eager=2.0),
}
# For float32 operands, where torch.backends.cudnn.conv.fp32_precision is "tf32".
TF32 = Tolerance(
    "operands keep 10 of 23 mantissa bits, cut or rounded; sums are float32",
    relative_l2=1.5e-3,
)


def relative_l2(actual: Tensor, reference: Tensor) -> float:
    """||actual - reference|| / ||reference|| in float64; 0 for two tensors of zeros."""
    error = float((actual.double() - reference.double()).norm())
    return error / float(reference.double().norm()) if error else 0.0


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, in float64; 0 for empty tensors."""
    if actual.numel() == 0:
        return 0.0
    return float((actual.double() - reference.double()).abs().max())


def _convolve(spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    function = F.conv_transpose2d if spec.transposed else F.conv2d
    return function(x, w, b, **spec.attributes)


def _activate(spec: ConvSpec, y: Tensor) -> Tensor:
    if spec.activation == "relu":
        return F.relu(y)
    return F.leaky_relu(y, spec.slope) if spec.activation == "leaky_relu" else y


def _mask(spec: ConvSpec, grad: Tensor, output: Tensor) -> Tensor:
    """Gradient through the activation by the sign of its output."""
    if spec.activation == "none":
        return grad
    if spec.activation == "relu":  # not grad * 0: an infinite gradient must give 0
        return torch.where(output > 0, grad, torch.zeros_like(grad))
    return torch.where(output > 0, grad, grad * spec.slope)


def _backward(spec: ConvSpec, grad: Tensor, x: Tensor, w: Tensor) -> dict[str, Tensor]:
    """The three gradients of the convolution alone."""
    grads = torch.ops.aten.convolution_backward(
        grad,
        x,
        w,
        [spec.c_out],
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.transposed,
        spec.output_padding,
        spec.groups,
        [True, True, False],
    )
    return dict(zip(NAMES[1:3], grads[:2], strict=True)) | {"grad_bias": grad.sum((0, 2, 3))}


@dataclass(frozen=True)
class Reference:
    """Definition of one call in `dtype`, evaluated by torch's operators on demand.

    `mask_output` [N, C_out, P, Q] decides the activation's mask in the gradients; None takes the
    reference's own output.
    """

    spec: ConvSpec
    tensors: ConvTensors
    dtype: torch.dtype = torch.float64
    mask_output: Tensor | None = None

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype).contiguous()

    @cached_property
    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        bias = self.tensors.bias
        cast = self._cast
        return (
            cast(self.tensors.input),
            cast(self.tensors.weight),
            None if bias is None else cast(bias),
        )

    @cached_property
    def output(self) -> Tensor:
        return _activate(self.spec, _convolve(self.spec, *self._operands))

    @cached_property
    def masked_grad(self) -> Tensor:
        mask_output = self.output if self.mask_output is None else self.mask_output
        return _mask(self.spec, self._cast(self.tensors.grad_output), mask_output)

    @cached_property
    def results(self) -> dict[str, Tensor]:
        """The output and the three gradients by name (NAMES)."""
        x, w, _ = self._operands
        return {"output": self.output} | _backward(self.spec, self.masked_grad, x, w)

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """For each element of each result: root of the sum of squares of the terms it adds up."""
        x, w, b = (None if t is None else t.square() for t in self._operands)
        assert x is not None
        assert w is not None
        squares = {"output": _convolve(self.spec, x, w, b) * max(1.0, self.spec.op_slope) ** 2}
        squares |= _backward(self.spec, self.masked_grad.square(), x, w)
        return {name: square.sqrt() for name, square in squares.items()}


def eager(
    spec: ConvSpec, tensors: ConvTensors, mask_output: Tensor | None = None
) -> dict[str, Tensor]:
    """What torch's own operators give in the operands' dtype: the measure for low precision."""
    return Reference(spec, tensors, tensors.input.dtype, mask_output).results


def assert_close_to_reference(
    name: str,
    actual: Tensor,
    reference: Tensor,
    *,
    dtype: torch.dtype | None = None,
    terms: Callable[[], Tensor] | None = None,
    eager_result: Callable[[], Tensor] | None = None,
    inner_rounding: bool = False,
    rule: Tolerance | None = None,
) -> None:
    """Raise AssertionError, with `name` and the worst element, unless its dtype's rule is kept.

    `terms` gives the root sum of squares of each element's terms and is asked only when the
    relative rule fails. `eager_result` gives torch's own result in the same dtype; low precision
    cannot be judged without it, except that one rounding of the result is always allowed (no kernel
    can do better), and with `inner_rounding` one of each term too: a gradient times a slope is
    rounded before it is summed. `rule` replaces that of the dtype.
    """
    dtype = actual.dtype if dtype is None else dtype
    rule = TOLERANCES[dtype] if rule is None else rule
    if actual.shape != reference.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}")
    if actual.dtype != dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, not {dtype}")
    if actual.numel() == 0:
        return
    unwritten = int((~torch.isfinite(actual)).sum())
    if unwritten:
        first = torch.nonzero(~torch.isfinite(actual))[0].tolist()
        raise AssertionError(
            f"{name}: {unwritten} of {actual.numel()} elements are not finite, the first at "
            f"{first}: never written, or computed from memory outside the operands"
        )
    if rule.relative_l2 is not None:
        error = float((actual.double() - reference).norm())
        allowed = rule.relative_l2 * float(reference.norm())
        if error > allowed and terms is not None:
            allowed = max(allowed, rule.relative_l2 * float(terms().norm()))
        metric = "L2 error"
    else:
        assert rule.times_eager is not None
        error = max_error(actual, reference)
        unit = torch.finfo(dtype).eps / 2
        allowed = unit * float(reference.abs().max())
        if error > allowed and eager_result is not None:
            allowed = max(allowed, rule.times_eager * max_error(eager_result(), reference))
        if error > allowed and terms is not None:
            # float32 accumulation over terms that cancel, and their own rounding where there is
            # one.
            inner = 16 * torch.finfo(torch.float32).eps + (unit if inner_rounding else 0.0)
            allowed = max(
                allowed, unit * float(reference.abs().max()) + inner * float(terms().max())
            )
        metric = "largest error"
    if not error <= allowed:
        difference = (actual.double() - reference).abs()
        at = torch.unravel_index(difference.argmax(), difference.shape)
        raise AssertionError(
            f"{name}: {metric} {error:.3e} is over {allowed:.3e} ({dtype}: {rule.reason}); "
            f"relative L2 {relative_l2(actual, reference):.2e}; worst at "
            f"{tuple(int(i) for i in at)}: got {float(actual[at]):.9g}, "
            f"expected {float(reference[at]):.9g}"
        )


def assert_results_match(
    spec: ConvSpec, tensors: ConvTensors, results: Results, *, rule: Tolerance | None = None
) -> None:
    """Compare each of `results` (keys from NAMES) with the float64 definition; `rule` replaces that
    of the dtype.
    """
    dtype = tensors.input.dtype
    own_mask = results.get("output") if dtype != torch.float64 else None
    reference = Reference(spec, tensors, mask_output=own_mask)
    same_dtype = Reference(spec, tensors, dtype, own_mask)
    for name in NAMES:
        if name not in results:
            continue
        assert_close_to_reference(
            f"{spec.name} {name}",
            results[name],
            reference.results[name],
            dtype=dtype,
            terms=lambda name=name: reference.terms[name],  # type: ignore[misc]
            eager_result=lambda name=name: same_dtype.results[name],  # type: ignore[misc]
            inner_rounding=name != "output" and spec.activation == "leaky_relu",
            rule=rule,
        )
