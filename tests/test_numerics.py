# SPDX-License-Identifier: BSD-3-Clause
"""The checks themselves: the reference is torch's autograd, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels.testing.memory import peak_allocated_bytes, unreturned_bytes
from segpose_kernels.testing.numerics import (
    NAMES,
    TOLERANCES,
    Reference,
    assert_close_to_reference,
    assert_results_match,
    eager,
    max_error,
    relative_l2,
)
from segpose_kernels.testing.poison import poisoned_memory
from segpose_kernels.testing.problems import KERNEL_PROBLEMS, LAYOUTS, ConvSpec, as_layout, by_name

DTYPES = tuple(TOLERANCES)


@pytest.mark.parametrize("spec", KERNEL_PROBLEMS[::5], ids=str)
def test_reference_is_torchs_autograd(spec: ConvSpec, generator: torch.Generator) -> None:
    """The definition with its explicit mask equals what autograd makes of the unfused pair."""
    tensors = spec.make_tensors(torch.float64, generator=generator)
    bias = torch.zeros(spec.c_out).double() if tensors.bias is None else tensors.bias
    leaves = [t.detach().requires_grad_() for t in (tensors.input, tensors.weight, bias)]
    y = getattr(F, spec.op)(*leaves, **spec.attributes)
    if spec.activation != "none":
        y = F.relu(y) if spec.activation == "relu" else F.leaky_relu(y, spec.slope)
    grads = torch.autograd.grad(y, leaves, tensors.grad_output)
    results = Reference(spec, tensors).results
    for name, expected in zip(NAMES, (y, *grads), strict=True):
        torch.testing.assert_close(results[name], expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout: str, generator: torch.Generator) -> None:
    tensor = torch.randn(2, 3, 4, 5, generator=generator)
    view = as_layout(tensor, layout)
    expected = tensor[:1].expand_as(tensor) if layout == "expanded" else tensor
    assert torch.equal(view, expected)
    assert view.shape == tensor.shape
    with pytest.raises(ValueError, match="layout must be one of"):
        as_layout(tensor, "blocked")


def test_error_metrics() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_l2(reference, reference) == 0.0
    assert relative_l2(reference + torch.tensor([0.0, 0.5]), reference) == pytest.approx(0.1)
    assert max_error(reference - torch.tensor([0.25, 0.0]), reference) == 0.25
    assert max_error(torch.empty(0), torch.empty(0)) == 0.0
    assert relative_l2(torch.zeros(3), torch.zeros(3)) == 0.0


def test_failure_names_the_result_and_the_element() -> None:
    reference = torch.ones(2, 3, dtype=torch.float64)
    wrong = reference.float()
    wrong[1, 2] = 1.5
    with pytest.raises(AssertionError, match=r"grad_weight: L2 .* worst at \(1, 2\): got 1.5"):
        assert_close_to_reference("grad_weight", wrong, reference)
    wrong[1, 2] = torch.nan
    with pytest.raises(AssertionError, match=r"1 of 6 elements are not finite.*\[1, 2\]"):
        assert_close_to_reference("output", wrong, reference)
    with pytest.raises(AssertionError, match=r"shape \(6,\), not \(2, 3\)"):
        assert_close_to_reference("output", torch.ones(6), reference)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_reference("output", wrong, reference, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [by_name("conv-k3s2"), by_name("transposed-k4s2")], ids=str)
def test_eager_results_pass(spec: ConvSpec, dtype: torch.dtype, generator: torch.Generator) -> None:
    """torch's own operators keep the rules: a tolerance that they break would be a wrong one."""
    tensors = spec.make_tensors(dtype, generator=generator)
    output = eager(spec, tensors)["output"]
    assert_results_match(spec, tensors, eager(spec, tensors, mask_output=output))


def _scale_last_channel(t: Tensor) -> Tensor:
    t[:, -1] *= 1.02
    return t


def _repeat_first_row(t: Tensor) -> Tensor:
    t[:, :, 0] = t[:, :, 1]
    return t


def _drop_last_column(t: Tensor) -> Tensor:
    t[..., -1] = 0
    return t


def _swap_items(t: Tensor) -> Tensor:
    return t.flip(0)


def _shift_one_column(t: Tensor) -> Tensor:
    return t.roll(1, dims=3)


def _leave_unwritten(t: Tensor) -> Tensor:
    t[..., -1, -1] = torch.nan
    return t


FAULTS: tuple[Callable[[Tensor], Tensor], ...] = (
    _scale_last_channel,
    _repeat_first_row,
    _drop_last_column,
    _swap_items,
    _shift_one_column,
    _leave_unwritten,
)


@pytest.mark.mutation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("name", NAMES[:3])
def test_planted_faults_are_found(
    name: str, fault: Callable[[Tensor], Tensor], dtype: torch.dtype, generator: torch.Generator
) -> None:
    for spec in (by_name("conv-k3s2"), by_name("transposed-k4s2")):
        tensors = spec.make_tensors(dtype, generator=generator)
        results = dict(eager(spec, tensors))
        results[name] = fault(results[name].clone())
        # The gradients are judged by the mask of the output under test: give it the right one.
        checked = {name: results[name], "output": results["output"]}
        with pytest.raises(AssertionError, match=name):
            assert_results_match(spec, tensors, checked)


@pytest.mark.mutation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_wrong_mask_is_found(
    activation: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Gradients by a mask of the wrong sign, and by no mask at all."""
    chosen = "relu" if activation == "relu" else "leaky_relu"
    for spec in (by_name("conv-k3s2"), by_name("transposed-k4s2")):
        spec = replace(spec, activation=chosen)  # type: ignore[arg-type]
        tensors = spec.make_tensors(dtype, generator=generator)
        output = eager(spec, tensors)["output"]
        for wrong in (-output, torch.ones_like(output)):
            results = eager(spec, tensors, mask_output=wrong)
            for name in NAMES[1:]:
                with pytest.raises(AssertionError, match=name):
                    assert_results_match(spec, tensors, {"output": output, name: results[name]})


@pytest.mark.mutation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lost_precision_is_found(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Operands rounded to the next smaller dtype on the way pass no test of the larger one."""
    smaller = {torch.float32: torch.float16, torch.float64: torch.float32}[dtype]
    spec = by_name("conv-k3s2")
    tensors = spec.make_tensors(dtype, generator=generator)
    rounded = replace(tensors, input=tensors.input.to(smaller).to(dtype))
    with pytest.raises(AssertionError, match="output"):
        assert_results_match(spec, tensors, {"output": eager(spec, rounded)["output"]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 7, 1000, 300_000])
def test_poison_reaches_uninitialised_memory(elements: int, dtype: torch.dtype) -> None:
    with poisoned_memory():
        assert torch.empty(elements, dtype=dtype).isnan().all()
        assert torch.ones(2).new_empty(elements, dtype=dtype).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_peak_counts_what_lives_together() -> None:
    """Two tensors of 4,000 bytes one after the other weigh one; together they weigh two."""

    def one_after_the_other() -> None:
        torch.empty(1000)
        torch.empty(1000)

    assert peak_allocated_bytes(one_after_the_other) == 4000
    assert peak_allocated_bytes(lambda: (torch.empty(1000), torch.empty(1000))) == 8000
    kept: list[Tensor] = []
    assert unreturned_bytes(one_after_the_other) == 0
    assert unreturned_bytes(lambda: kept.append(torch.empty(500))) == 2000
