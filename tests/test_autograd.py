# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives in every autograd mode, and what is left out when a gradient is not needed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from segpose_kernels import autograd, conv2d_act, conv_transpose2d_act
from segpose_kernels.autograd import NativeOp, native_ops
from segpose_kernels.reference import conv2d_act_reference, conv_transpose2d_act_reference

OPS = ("conv2d", "conv_transpose2d")
FUNCTIONS = {"conv2d": conv2d_act, "conv_transpose2d": conv_transpose2d_act}
REFERENCES = {
    "conv2d": conv2d_act_reference,
    "conv_transpose2d": conv_transpose2d_act_reference,
}
SLOPES = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.3}
NAMES = ("input", "weight", "bias")

# Odd extents, different per axis; the third has groups and a dilation, the fourth is depthwise.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": (2, 3), "padding": (1, 0)},
    "grouped": {"stride": 2, "dilation": (2, 1), "groups": 2},
    "depthwise": {"padding": 1, "groups": 4},
}

pytestmark = [
    # The loop over a batch for vmap is torch's fallback and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # opcheck looks at .grad of what it computed.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def operands(op: str, groups: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Input [2, 4, 5, 4], a weight for it, and a bias; all require grad."""
    weight = (4, 4 // groups, 3, 2)
    return [
        torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((2, 4, 5, 4), weight, (4,))
    ]


def function_of(op: str, activation: str, geometry: dict[str, Any]) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return FUNCTIONS[op](
            x, w, b, **geometry, activation=activation, negative_slope=SLOPES["leaky_relu"]
        )

    return call


def reference_of(op: str, activation: str, geometry: dict[str, Any]) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return REFERENCES[op](
            x, w, b, **geometry, activation=activation, negative_slope=SLOPES["leaky_relu"]
        )

    return call


def params_of(op: str, activation: str) -> tuple[Any, ...]:
    """Arguments of the plain operator after the tensors, for the strided geometry."""
    if op == "conv2d":
        return ([2, 3], [1, 0], [1, 1], 1, SLOPES[activation])
    return ([2, 3], [1, 0], [1, 2], 1, [1, 1], SLOPES[activation])


def close(name: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{name}: {text}")


# First and second order ----------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("op", OPS)
def test_gradients_match_reference(op: str, activation: str, geometry: dict[str, Any]) -> None:
    """Each gradient, and each gradient of a function of the gradients, by name."""
    tensors = operands(op, geometry.get("groups", 1))
    results = []
    for make in (function_of, reference_of):
        y = make(op, activation, geometry)(*tensors)
        torch.manual_seed(1)
        grads = torch.autograd.grad(y, tensors, torch.randn_like(y), create_graph=True)
        penalty = sum((g * g).sum() for g in grads)
        # The bias moves the masks alone, and those are constant almost everywhere.
        again = torch.autograd.grad(penalty, tensors[:2])
        results.append((grads, again))
    for order, (ours, theirs) in enumerate(zip(*results, strict=True), start=1):
        for name, a, b in zip(NAMES, ours, theirs, strict=False):
            close(f"order {order} grad_{name}", a, b)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_with_forward_mode(op: str, activation: str) -> None:
    call = function_of(op, activation, {"stride": (2, 1), "dilation": (1, 2), "groups": 2})
    x, w, b = operands(op, 2)
    x = x.detach()[..., :3].requires_grad_()
    assert gradcheck(call, (x, w, b), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, (x, w, b), check_fwd_over_rev=True)


@pytest.mark.parametrize("op", OPS)
def test_plain_operators_are_twice_differentiable(op: str) -> None:
    """The formulas that torch.compile traces."""
    tensors = operands(op)
    params = params_of(op, "leaky_relu")
    assert gradcheck(lambda *t: native_ops[op].forward(*t, *params), tensors)
    assert gradgradcheck(lambda *t: native_ops[op].forward(*t, *params), tensors)


@pytest.mark.parametrize("op", OPS)
def test_third_order(op: str) -> None:
    tensors = operands(op)[:2]
    x, w = tensors
    for make in (function_of, reference_of):
        y = make(op, "leaky_relu", {})(x, w, None)
        (gx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (gw,) = torch.autograd.grad(gx.pow(2).sum(), w, create_graph=True)
        tensors.append(torch.autograd.grad(gw.pow(2).sum(), x)[0])
    close("third order", tensors[2], tensors[3])


@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_forward(op: str, activation: str) -> None:
    params = params_of(op, activation)
    for bias in (True, False):
        x, w, b = operands(op)
        torch.library.opcheck(
            native_ops[op].forward, (x, w, b if bias else None, *params), test_utils="ALL"
        )


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize("activation", ["none", "leaky_relu"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck_backward(op: str, activation: str, needs: tuple[bool, bool, bool]) -> None:
    params = params_of(op, activation)
    x, w, b = operands(op)
    y = native_ops[op].forward(x, w, b, *params).detach()
    grad = torch.randn_like(y).requires_grad_()
    output = None if activation == "none" else y
    torch.library.opcheck(
        native_ops[op].backward, (grad, output, x, w, *params, *needs), test_utils="ALL"
    )


@pytest.mark.parametrize("op", OPS)
def test_opcheck_channels_last(op: str) -> None:
    params = params_of(op, "relu")
    x, w, b = (t.detach() for t in operands(op))
    for tensors in (
        (x.to(memory_format=torch.channels_last), w, b),
        (x, w.to(memory_format=torch.channels_last), b),
    ):
        leaves = [t.requires_grad_() for t in tensors]
        torch.library.opcheck(native_ops[op].forward, (*leaves, *params), test_utils="ALL")


# What is not needed is not computed ----------------------------------------------------------


@pytest.fixture
def needs_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """The `need_*` flags of every call of a backward operator."""
    seen: list[tuple[bool, ...]] = []
    for op in native_ops.values():
        plain = op.backward

        def spy(*arguments: Any, plain: Callable[..., Any] = plain) -> Any:
            seen.append(arguments[-3:])
            return plain(*arguments)

        monkeypatch.setattr(op, "backward", spy)
    return seen


SUBSETS = [s for s in itertools.product((True, False), repeat=3) if any(s)]


@pytest.mark.parametrize(
    "needs", SUBSETS, ids=lambda s: "".join("xwb"[i] for i in range(3) if s[i])
)
@pytest.mark.parametrize("op", OPS)
def test_every_subset_of_requires_grad(
    op: str, needs: tuple[bool, ...], needs_seen: list[tuple[bool, ...]]
) -> None:
    tensors = [t.detach().requires_grad_(n) for t, n in zip(operands(op), needs, strict=True)]
    y = function_of(op, "leaky_relu", {"stride": 2})(*tensors)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert needs_seen == [needs]
    expected = reference_of(op, "leaky_relu", {"stride": 2})(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    grads = iter(torch.autograd.grad(expected, wanted, grad))
    for name, tensor, need in zip(NAMES, tensors, needs, strict=True):
        if need:
            assert tensor.grad is not None, name
            close(f"grad_{name}", tensor.grad, next(grads))
        else:
            assert tensor.grad is None, name


@pytest.mark.parametrize(("activation", "saved"), [("none", 2), ("relu", 3), ("leaky_relu", 3)])
@pytest.mark.parametrize("op", OPS)
def test_output_is_saved_only_for_its_mask(op: str, activation: str, saved: int) -> None:
    tensors = operands(op)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function_of(op, activation, {})(*tensors)
    assert len(kept) == saved


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_saved_without_grad(op: str) -> None:
    tensors = operands(op)

    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError(f"saved {tuple(tensor.shape)}")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor), torch.no_grad():
        assert not function_of(op, "relu", {})(*tensors).requires_grad


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradients(op: str) -> None:
    """`y.sum().backward()` sends a gradient whose strides are all 0."""
    tensors = operands(op)
    for kind in (
        lambda y: y.sum(),
        lambda y: y.sum((2, 3)).pow(2).sum(),
        lambda y: y[:, ::2].sum(),
    ):
        ours = torch.autograd.grad(kind(function_of(op, "relu", {})(*tensors)), tensors)
        theirs = torch.autograd.grad(kind(reference_of(op, "relu", {})(*tensors)), tensors)
        for name, a, b in zip(NAMES, ours, theirs, strict=True):
            close(f"grad_{name}", a, b)


@pytest.mark.parametrize("op", OPS)
def test_overwritten_output_is_noticed(op: str) -> None:
    """The output is the mask: changing it in place must not give a wrong gradient."""
    y = function_of(op, "leaky_relu", {})(*operands(op))
    y.mul_(-1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# torch.func ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("op", OPS)
def test_func_grad_and_vmap(op: str, activation: str) -> None:
    x, w, b = (t.detach() for t in operands(op))
    geometry = {"stride": 2}
    ours, theirs = function_of(op, activation, geometry), reference_of(op, activation, geometry)

    def loss(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: call(x, w, b).pow(2).sum()

    for name, i in zip(NAMES, range(3), strict=True):
        close(
            f"func.grad {name}",
            torch.func.grad(loss(ours), argnums=i)(x, w, b),
            torch.func.grad(loss(theirs), argnums=i)(x, w, b),
        )
    per_sample = torch.func.vmap(
        torch.func.grad(loss(ours), argnums=(1, 2)), in_dims=(0, None, None)
    )(x[:, None], w, b)
    expected = [torch.func.grad(loss(theirs), argnums=(1, 2))(x[i : i + 1], w, b) for i in range(2)]
    for k, name in enumerate(("weight", "bias")):
        close(f"per-sample {name}", per_sample[k], torch.stack([e[k] for e in expected]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (1, 0, 0)], ids=str
)
def test_vmap_over_each_operand(op: str, in_dims: tuple[int | None, ...]) -> None:
    tensors = [t.detach() for t in operands(op)]
    batched = [
        t if d is None else torch.stack([t, 2 * t, -t], dim=d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    ours = torch.func.vmap(function_of(op, "leaky_relu", {}), in_dims=in_dims)(*batched)
    theirs = torch.func.vmap(reference_of(op, "leaky_relu", {}), in_dims=in_dims)(*batched)
    close("vmap", ours, theirs)


@pytest.mark.parametrize(
    "given", SUBSETS, ids=lambda s: "".join("xwb"[i] for i in range(3) if s[i])
)
@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op: str, activation: str, given: tuple[bool, ...]) -> None:
    tensors = [t.detach() for t in operands(op)]
    tangents = [torch.randn_like(t) for t in tensors]
    outputs = []
    for make in (function_of, reference_of):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, tangent) if g else t
                for t, tangent, g in zip(tensors, tangents, given, strict=True)
            ]
            y = make(op, activation, {"stride": (1, 2)})(*duals)
            outputs.append(forward_ad.unpack_dual(y).tangent)
    close("tangent", *outputs)


@pytest.mark.parametrize("op", OPS)
def test_hessians_in_every_order(op: str) -> None:
    x, w = (t.detach()[..., :2] for t in operands(op)[:2])
    x, w = x[:1], w[:, :, :1]

    def loss(call: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: call(x, w, None).pow(3).sum()

    expected = torch.func.hessian(loss(reference_of(op, "leaky_relu", {})))(w)
    ours = loss(function_of(op, "leaky_relu", {}))
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    for name, outer, inner in (
        ("forward over reverse", jacfwd, jacrev),
        ("reverse over reverse", jacrev, jacrev),
        ("reverse over forward", jacrev, jacfwd),
        ("forward over forward", jacfwd, jacfwd),
    ):
        close(name, outer(inner(ours))(w), expected)


# Plain operators, as exported programs call them ---------------------------------------------


@pytest.fixture(params=["segpose", "segpose_triton"])
def plain(request: pytest.FixtureRequest) -> dict[str, NativeOp]:
    """The operators of a namespace."""
    if request.param == "segpose":
        return native_ops
    pytest.importorskip("triton")
    from segpose_kernels.triton.ops import triton_ops

    return triton_ops


def plain_calls(op: NativeOp, activation: str) -> list[tuple[Any, Any, list[Tensor]]]:
    """The operator and its backward, each as torch does it, and what they take."""
    params = params_of(op.label, activation)
    x, w, b = (t.detach() for t in operands(op.label))
    geometry: dict[str, Any] = {"stride": (2, 3), "padding": (1, 0)}
    if op.transposed:
        geometry["output_padding"] = (1, 2)
    reference = reference_of(op.label, activation, geometry)
    y = reference(x, w, b)
    output = None if activation == "none" else y

    def backward(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return op.backward(grad, output, x, w, *params, True, True, True)

    def expected(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.func.vjp(reference, x, w, b)[1](grad)
        return grads

    return [
        (lambda *t: (op.forward(*t, *params),), lambda *t: (reference(*t),), [x, w, b]),
        (backward, expected, [x, w, torch.randn_like(y)]),
    ]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_of_plain_operators(
    op: str, activation: str, requires_grad: bool, plain: dict[str, NativeOp]
) -> None:
    """A tangent that gets lost would look like one of zero."""
    for ours, theirs, primals in plain_calls(plain[op], activation):
        tangents = [torch.randn_like(t) for t in primals]
        _, expected = torch.func.jvp(theirs, tuple(primals), tuple(tangents))
        _, actual = torch.func.jvp(ours, tuple(primals), tuple(tangents))
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            close(f"func.jvp {i}", a, e)
        leaves = [t.clone().requires_grad_(requires_grad) for t in primals]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
            for i, (y, e) in enumerate(zip(ours(*duals), expected, strict=True)):
                tangent = forward_ad.unpack_dual(y).tangent
                assert tangent is not None
                close(f"dual {i}", tangent, e)


@pytest.mark.parametrize("op", OPS)
def test_func_transforms_of_plain_operators(op: str, plain: dict[str, NativeOp]) -> None:
    for ours, theirs, primals in plain_calls(plain[op], "leaky_relu"):
        for i in range(3):

            def loss(value: Tensor, call: Any, at: int = i, given: Any = primals) -> Tensor:
                results = call(*given[:at], value, *given[at + 1 :])
                return sum((r * r).sum() for r in results)  # type: ignore[return-value]

            actual, expected = (
                torch.func.grad(functools.partial(loss, call=c))(primals[i]) for c in (ours, theirs)
            )
            close(f"func.grad {i}", actual, expected)


def test_module_under_functional_call() -> None:
    from segpose_kernels import Conv2dAct

    module = Conv2dAct(3, 4, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).pow(2).sum()

    grads = torch.func.grad(loss)({k: v.detach() for k, v in module.named_parameters()})
    loss(dict(module.named_parameters())).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        close(name, grads[name], parameter.grad)


def test_mask_of_the_backward_operator() -> None:
    """A gradient of infinity is stopped by ReLU, not turned into NaN; a NaN output passes it on."""
    y = torch.tensor([1.0, 0.0, -1.0, float("nan")])
    grad = torch.full((4,), float("inf"))
    assert autograd.mask(grad, y, 0.0).tolist()[:3] == [float("inf"), 0.0, 0.0]
    assert autograd.mask(grad, y, 0.0)[3] == float("inf")
    assert autograd.mask(grad, None, 1.0) is grad


def test_operators_are_named() -> None:
    assert {op.name for op in native_ops.values()} == {"conv2d_act", "conv_transpose2d_act"}
    assert all(isinstance(op, NativeOp) for op in native_ops.values())
