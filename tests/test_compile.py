# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile and torch.export: no graph breaks, one node per operator, few compilations."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from segpose_kernels import Conv2dAct, ConvTranspose2dAct, conv2d_act, conv_transpose2d_act

# Extents all different within a shape: equal ones would be compiled as one symbol.
SHAPES = [(2, 3, 16, 18), (4, 3, 20, 12), (3, 3, 9, 11), (5, 3, 7, 40)]
OPERATORS = {"segpose.conv2d_act.default", "segpose.conv_transpose2d_act.default"}

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """Both operators, three activations, an asymmetric "same"."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.down = Conv2dAct(3, 8, 3, stride=2, padding=1, dtype=dtype)
        self.up = ConvTranspose2dAct(
            8, 4, 3, stride=2, padding=1, output_padding=1, activation="relu", dtype=dtype
        )
        self.head = Conv2dAct(4, 2, 4, padding="same", activation="none", dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.up(self.down(x)))
        return y


def draw(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient by name."""
    x = x.detach().requires_grad_()
    y = call(x)
    names = ["input", *dict(model.named_parameters())]
    grads = torch.autograd.grad(y.square().sum(), (x, *model.parameters()))
    return {"output": y} | {f"grad_{n}": g for n, g in zip(names, grads, strict=True)}


def compare(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert ours[name].stride() == tensor.stride(), name


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_two_compilations_serve_all_shapes(dynamic: bool | None) -> None:
    model = Layers()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    for shape in SHAPES:
        x = draw(shape)
        compare(step(compiled, model, x), step(model, model, x))
    assert counter.frame_count <= 2
    assert [t for t in targets(counter.graphs[-1].graph) if t in OPERATORS] == [
        "segpose.conv2d_act.default",
        "segpose.conv_transpose2d_act.default",
        "segpose.conv2d_act.default",
    ]


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_gradients_that_are_not_needed(frozen: str) -> None:
    tensors = {"input": draw((2, 3, 6, 5)), "weight": draw((3, 4, 3, 3)), "bias": draw((4,))}
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n != frozen}

    def call(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv_transpose2d_act(input, weight, bias, stride=2, activation="relu")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(**tensors).sum(), list(leaves.values()))
    theirs = torch.autograd.grad(call(**tensors).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"grad_{name}: {text}")


@pytest.mark.parametrize("which", ["input", "weight"])
def test_channels_last_strides_survive(which: str) -> None:
    model = Layers()
    x = draw(SHAPES[0])
    if which == "input":
        x = x.to(memory_format=torch.channels_last)
    else:
        model = model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compare(step(compiled, model, x), step(model, model, x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor() -> None:
    """The default compiler, on an operator whose strides it must keep."""
    model = Conv2dAct(3, 4, 3, stride=2, dtype=torch.float64)
    x = draw(SHAPES[0]).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True)
    compare(step(compiled, model, x), step(model, model, x))


def test_unbatched_input() -> None:
    model = Layers()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = draw((3, 16, 18))
    compare(step(compiled, model, x), step(model, model, x))


def test_a_size_known_only_at_run_time() -> None:
    """No rule asks for the value of an unbacked size."""
    weight = draw((4, 3, 3, 3))

    def call(x: Tensor, length: Tensor) -> Tensor:
        n = length.item()
        torch._check(n >= 4)
        torch._check(n <= x.size(2))
        return conv2d_act(x[:, :, : int(n)], weight, padding=1)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        x = draw(SHAPES[0])
        for n in (7, 5):
            torch.testing.assert_close(compiled(x, torch.tensor(n)), call(x, torch.tensor(n)))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where: str) -> None:
    model = Layers(torch.float32)
    x = torch.randn(SHAPES[0])

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
            return y

    if where == "inside":
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, call(x))
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize("backend", ["auto", "cpu", "aten"])
def test_backend_is_chosen_while_compiling(backend: str) -> None:
    x, w = draw(SHAPES[0]), draw((4, 3, 3, 3))
    counter = CompileCounterWithBackend("aot_eager")

    def call(x: Tensor) -> Tensor:
        return conv2d_act(x, w, backend=backend)

    y = torch.compile(call, fullgraph=True, backend=counter)(x)
    torch.testing.assert_close(y, call(x))
    native = "segpose.conv2d_act.default" in targets(counter.graphs[0].graph)
    assert native == (backend != "aten")


def test_bad_input_gives_the_same_message() -> None:
    compiled = torch.compile(conv2d_act, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"input.size\(1\)=5 but weight.size\(1\)=3"):
        compiled(draw((2, 5, 8, 8)), draw((4, 3, 3, 3)))


# Transforms around and inside what is compiled ------------------------------------------------


def objective(w: Tensor, x: Tensor) -> Tensor:
    return conv2d_act(x, w, stride=2, negative_slope=0.1).pow(2).sum()


TRANSFORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "grad": torch.func.grad(objective),
    "vmap-grad": lambda w, x: torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0))(
        w, x[:, None]
    ),
    "jvp": lambda w, x: torch.func.jvp(lambda w: objective(w, x), (w,), (w.cos(),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_inside(transform: Callable[[Tensor, Tensor], Any]) -> None:
    """A compiled formula has no forward mode; its tangent must not silently be zero."""
    w, x = draw((4, 3, 3, 3)), draw((2, 3, 6, 7))
    compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w, x), transform(w, x))


def test_transforms_inside_with_a_named_backend() -> None:
    w, x = draw((4, 3, 3, 3)), draw((2, 3, 6, 7))

    def tangent(w: Tensor) -> Tensor:
        call = lambda w: conv2d_act(x, w, backend="cpu")  # noqa: E731
        result: Tensor = torch.func.jvp(call, (w,), (w,))[1]
        return result

    with pytest.raises(RuntimeError, match=r"no torch.func transforms inside torch.compile"):
        torch.compile(tangent, fullgraph=True, backend="aot_eager")(w)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_forward_mode_through_a_compiled_function(warm: bool) -> None:
    w, x = draw((4, 3, 3, 3)), draw((2, 3, 6, 7))
    compiled = torch.compile(objective, backend="aot_eager")
    if warm:
        compiled(w, x)
    ours = torch.func.jvp(lambda w: compiled(w, x), (w,), (w.cos(),))[1]
    expected = torch.func.jvp(lambda w: objective(w, x), (w,), (w.cos(),))[1]
    torch.testing.assert_close(ours, expected)


# Export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_shapes(strict: bool) -> None:
    """Each operator stays one node, and no size is specialised."""
    model = Layers()
    dims = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(
        model, (draw(SHAPES[0]),), dynamic_shapes={"x": dims}, strict=strict
    )
    assert [t for t in targets(program.graph) if t in OPERATORS] == [
        "segpose.conv2d_act.default",
        "segpose.conv_transpose2d_act.default",
        "segpose.conv2d_act.default",
    ]
    exported = program.module()
    for shape in SHAPES:
        x = draw(shape)
        torch.testing.assert_close(exported(x), model(x))


def test_export_with_an_empty_batch_allowed() -> None:
    program = torch.export.export(
        Layers(), (draw(SHAPES[0]),), dynamic_shapes={"x": {0: Dim("n", min=0, max=64)}}
    )
    assert program.module()(draw((0, 3, 16, 18))).shape == (0, 2, 16, 18)


def test_make_fx_traces_one_node() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = draw(SHAPES[0]), draw((4, 3, 3, 3))
    graph = make_fx(lambda x, w: conv2d_act(x, w), tracing_mode="symbolic")(x, w)
    assert "segpose.conv2d_act.default" in targets(graph.graph)
    torch.testing.assert_close(graph(x, w), conv2d_act(x, w))
