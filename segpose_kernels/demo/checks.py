# SPDX-License-Identifier: BSD-3-Clause
"""Is an optimized model right? All outputs and gradients, and plain torch's, against float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..swap import optimize

# A whole float32 model may be this far from float64, or this many times as far as plain torch is.
# (Rounding grows through layers, and a pre-activation near zero may round to the other side; plain
# torch shows how much is usual.)
LARGEST_ERROR = 1e-5
LARGEST_RATIO = 3.0


@dataclass(frozen=True)
class ModelCheck:
    """Largest relative L2 errors against float64 over tensors of one kind (output, gradient).

    Attributes:
        tensors: how many tensors were compared.
        ours, eager: largest error of the optimized and the plain model.
        worst: the tensor where ours is largest.
    """

    model: str
    kind: str
    tensors: int
    ours: float
    eager: float
    worst: str

    @property
    def passed(self) -> bool:
        """Within the limits above; an error that is NaN never is."""
        return self.ours <= max(LARGEST_ERROR, LARGEST_RATIO * self.eager)


def check_model(name: str, model: nn.Module, image: Tensor) -> list[ModelCheck]:
    """Compare a plain float32 model, which is not touched, with its optimized copy on one batch.

    The loss is the output's product with fixed random numbers, so that every gradient is exercised.
    Parameters' gradients and the input's are compared.
    """
    optimized, _ = optimize(copy.deepcopy(model))
    exact = _tensors(copy.deepcopy(model).double(), image.double())
    ours, eager = _tensors(optimized, image), _tensors(copy.deepcopy(model), image)
    rows = []
    for kind in ("output", "gradient"):
        names = [key for key in exact if key.split(" ")[0] == kind]
        ours_error = {key: relative_error(ours[key], exact[key]) for key in names}
        eager_error = [relative_error(eager[key], exact[key]) for key in names]
        worst = max(names, key=lambda key: ours_error[key])
        rows.append(
            ModelCheck(
                name, kind, len(names), ours_error[worst], max(eager_error), worst.split(" ")[1]
            )
        )
    return rows


def relative_error(value: Tensor, exact: Tensor) -> float:
    """L2 norm of the error over that of the exact tensor; infinity if that is not finite."""
    error = torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact)
    return error.item() if bool(torch.isfinite(error)) else float("inf")


def _tensors(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name, the names beginning with their kind."""
    leaf = image.clone().requires_grad_()
    output = model(leaf)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    (output * weights).sum().backward()
    leaves = {"image": leaf, **dict(model.named_parameters())}
    tensors = {"output y": output.detach()}
    for name, tensor in leaves.items():
        assert tensor.grad is not None, f"{name} got no gradient"
        tensors[f"gradient {name}"] = tensor.grad
    return tensors
