# SPDX-License-Identifier: BSD-3-Clause
"""Measures the candidates for each pass of a call and remembers the fastest (choices.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from ..unnoticed import draw_like
from . import choices
from .calls import BackwardPasses, Call, Needs, backward_passes
from .device import is_capturing
from .launch import nhwc
from .ops import run_forward, run_grad_input, run_grad_weight
from .plan import Choice, Direction, Epilogue, Operands
from .plan_gather import gather_tiles, plan_gather
from .plan_wgrad import plan_wgrad, wgrad_tiles
from .problem import ConvProblem

__all__ = ["Pass", "measure_ms", "passes_of_call", "tune"]


def measure_ms(work: Callable[[], object]) -> float:
    """Median time on the device in milliseconds, with a cold L2 cache."""
    result: float = do_bench(work, warmup=10, rep=50, return_mode="median")
    return result


@dataclass(frozen=True)
class Pass:
    """One pass of a call: its key among the choices, and the work of each candidate."""

    key: str
    operands: Operands
    candidates: tuple[Choice, ...]
    work: Callable[[Choice], Callable[[], object]]

    @property
    def is_known(self) -> bool:
        return choices.recall(self.operands, self.key) is not None


def _gather_choices(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> tuple[Choice, ...]:
    """The default first; the library only where it takes the gradient as it is."""
    plan = plan_gather(problem, direction, operands, epilogue)
    if plan.kernel == "direct":
        own = [Choice("direct")]
    else:
        tiles = gather_tiles(plan.problem, direction, operands, epilogue)
        own = [Choice("igemm", tile) for tile in dict.fromkeys((plan.tile, *tiles)) if tile]
    return (*own, *([Choice("library")] if epilogue.mask_slope == 1 else []))


def _wgrad_choices(
    problem: ConvProblem, operands: Operands, mask_slope: float, mask_x: bool, bias: bool
) -> tuple[Choice, ...]:
    """The default first, then every tile with its best number of splits, half and twice that."""
    options: dict[str, Any] = {"bias": bias, "mask_x": mask_x, "mask_slope": mask_slope}
    plan = plan_wgrad(problem, operands, **options)
    if plan.kernel == "direct" or plan.tile is None:
        own = [Choice("direct")]
    else:
        own = [Choice("igemm", plan.tile, plan.splits)]
        for tile in wgrad_tiles(plan.problem, operands, mask_slope):
            splits = plan_wgrad(problem, operands, choice=Choice("igemm", tile), **options).splits
            own += [Choice("igemm", tile, s) for s in (splits, splits // 2, splits * 2) if s > 0]
    # Sums of y come with our own kernel only.
    library = [Choice("library")] if mask_slope == 1 and not bias else []
    return (*dict.fromkeys(own), *library)


def _masks(passes: BackwardPasses, slope: float) -> float:
    """The slope that the kernels still have to mask by."""
    return 1.0 if passes.mask is not None and passes.mask.store else slope


def passes_of_call(
    label: str,  # "conv2d" or "conv_transpose2d"
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    params: tuple[Any, ...],  # of the operator, in schema order, with negative_slope
    needs: Needs,
) -> list[Pass]:
    """The passes that a call and its gradients take."""
    transposed = label == "conv_transpose2d"
    slope = params[-1]
    call = Call.of(transposed, x, w, params[:-1], slope)
    problem, shape = call.problem()
    operands = call.operands
    directions: tuple[Direction, Direction] = (
        ("dgrad", "fprop") if transposed else ("fprop", "dgrad")
    )
    epilogue = Epilogue(b is not None, slope)

    def forward(choice: Choice) -> Callable[[], object]:
        plan = plan_gather(problem, directions[0], operands, epilogue, choice)
        return lambda: run_forward(plan, x, w, b, slope, shape)

    result = [
        Pass(
            choices.gather_key(problem, directions[0], operands, epilogue),
            operands,
            _gather_choices(problem, directions[0], operands, epilogue),
            forward,
        )
    ]
    if not any(needs):
        return result
    passes, _ = backward_passes(call, needs)
    mask_slope = _masks(passes, slope)
    last = torch.channels_last
    grad = draw_like(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last))
    saved = None if mask_slope == 1 else grad.clone()
    if passes.gather is not None:
        masked = Epilogue(mask_slope=mask_slope)
        target = nhwc(torch.empty_like(x))

        def grad_input(choice: Choice) -> Callable[[], object]:
            plan = plan_gather(problem, directions[1], operands, masked, choice)
            return lambda: run_grad_input(plan, grad, saved, w, target)

        result.append(
            Pass(
                choices.gather_key(problem, directions[1], operands, masked),
                operands,
                _gather_choices(problem, directions[1], operands, masked),
                grad_input,
            )
        )
    if passes.wgrad is not None:
        bias = passes.wgrad.bias
        y, image = (nhwc(x), grad) if transposed else (grad, nhwc(x))
        options: dict[str, Any] = {"bias": bias, "mask_x": transposed, "mask_slope": mask_slope}

        def grad_weight(choice: Choice) -> Callable[[], object]:
            plan = plan_wgrad(problem, operands, choice=choice, **options)
            return lambda: run_grad_weight(plan, y, image, saved, w)

        result.append(
            Pass(
                choices.wgrad_key(problem, operands, mask_slope != 1),
                operands,
                _wgrad_choices(problem, operands, mask_slope, transposed, bias),
                grad_weight,
            )
        )
    return result


def tune(
    work: Pass,
    *,
    measure: Callable[[Callable[[], object]], float] | None = None,
    tried: Callable[[], None] | None = None,
) -> tuple[Choice, float]:
    """Measure every candidate of a pass, remember and return the fastest and its milliseconds.

    A candidate that does not run (out of shared memory or registers on this device, no such
    algorithm in the library) is left out; `tried` is called after each. Raises RuntimeError if none
    runs, and inside the capture of a CUDA graph, where nothing may be measured.
    """
    if is_capturing():
        raise RuntimeError("segpose_kernels: tuning cannot measure while a CUDA graph is captured")
    measure = measure_ms if measure is None else measure
    best: tuple[float, Choice] | None = None
    refusals: list[str] = []
    for choice in work.candidates:
        try:
            time = measure(work.work(choice))
        except (RuntimeError, OutOfResources) as error:
            refusals.append(f"{choice}: {error}")
        else:
            if best is None or time < best[0]:
                best = time, choice
        if tried is not None:
            tried()
    if best is None:
        raise RuntimeError(f"segpose_kernels: no kernel runs {work.key}: {'; '.join(refusals)}")
    choices.remember(work.operands, work.key, best[1])
    return best[1], best[0]
