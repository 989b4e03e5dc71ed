# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of a Sequential as one node of the autograd graph: the same to the bit, and only
where nobody could tell.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import segpose_kernels
from segpose_kernels import optimize, restore
from segpose_kernels.backends import LIBRARY
from segpose_kernels.models import Autoencoder, SegNet
from segpose_kernels.swap import chains

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.has_kernels_for("CPU"), reason="the library is not built"),
]

NODE = "_FusedChainBackward"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def layers() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
    ]


def chained(modules: list[nn.Module] | None = None, **options: Any) -> nn.Sequential:
    return optimize(nn.Sequential(*(modules or layers())), **options)[0]


def has_chain(y: Tensor) -> bool:
    """Whether a chain's node is in the graph of a result."""
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == NODE:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def one_by_one(model: ModuleT) -> ModuleT:
    """A copy whose modules run by themselves: hooks see each of them."""
    alone = copy.deepcopy(model)
    for module in alone.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda *_: None)
    return alone


def results(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    x = x.detach().requires_grad_(options.get("input_grad", True))
    y = model(x)
    assert has_chain(y) == options.get("chain", True)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    return {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if value is None:
            assert other is None, name
        else:
            assert other is not None, name
            assert torch.equal(other, value), name
            assert other.stride() == value.stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_same_to_the_bit(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    model = chained().to(dtype)
    for shape in ((2, 3, 9, 12), (17, 3, 8, 8), (1, 3, 1, 1)):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
        expected = results(one_by_one(model), x, chain=False)
        for _ in range(2):
            assert_equal(results(model, x), expected)


@pytest.mark.parametrize("frozen", [(0,), (2,), (4,), (0, 2), (2, 4), (0, 2, 4)])
@pytest.mark.parametrize("input_grad", [True, False])
def test_only_the_gradients_that_are_wanted(frozen: tuple[int, ...], input_grad: bool) -> None:
    model = chained()
    for index in frozen:
        model[index].requires_grad_(False)
    x = torch.randn(3, 3, 8, 8)
    if len(frozen) == 3 and not input_grad:
        assert not model(x).requires_grad
        return
    alone = results(one_by_one(model), x, chain=False, input_grad=input_grad)
    assert_equal(results(model, x, input_grad=input_grad), alone)


def test_a_bias_alone_is_frozen() -> None:
    model = chained()
    model[4].bias.requires_grad_(False)
    x = torch.randn(3, 3, 8, 8)
    assert_equal(results(model, x), results(one_by_one(model), x, chain=False))


def test_second_derivatives() -> None:
    """The values between the layers, which the node computed out of the graph, count too."""
    model = chained().double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    found = []
    for network in (model, one_by_one(model)):
        y = network(x)
        assert has_chain(y) == (network is model)
        wanted = [x, *network.parameters()]
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    names = ["x", *(name for name, _ in model.named_parameters())]
    for name, a, b in zip(names, *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_a_batch_of_gradients() -> None:
    """torch.autograd.grad(is_grads_batched=True) runs backwards under vmap."""
    model = chained().double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    y = model(x)
    grads = torch.randn(3, *y.shape, dtype=torch.double)
    batched = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    for grad, found in zip(grads, batched, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


def test_a_changed_weight_is_noticed() -> None:
    model = chained()
    y = model(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_result_without_activation_may_be_changed_in_place() -> None:
    model = chained(layers()[:-1])
    x = torch.randn(2, 3, 8, 8)
    first, second = (results(m, x, chain=m is model) for m in (model, one_by_one(model)))
    assert_equal(first, second)
    model.zero_grad()
    y = model(x)
    (y.mul_(2) * torch.linspace(-0.5, 1, y.numel()).view(y.shape)).sum().backward()
    for name, p in model.named_parameters():
        assert first[name] is not None
        torch.testing.assert_close(p.grad, first[name])


def test_saved_tensors_can_be_packed() -> None:
    model = chained()
    x = torch.randn(2, 3, 8, 8)
    expected = results(model, x)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = results(model, x)
    assert packed
    assert_equal(found, expected)


def test_checkpointing() -> None:
    model = chained()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    other = x.detach().requires_grad_()
    model(other).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, other.grad)


class TestWhereItMustNotRun:
    """Whatever could tell the difference gets module by module."""

    x = torch.randn(2, 3, 8, 8)

    def assert_alone(self, model: nn.Module, x: Tensor | None = None) -> Tensor:
        y = model(self.x if x is None else x)
        assert not has_chain(y)
        return y

    def test_hooks_of_a_member(self) -> None:
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            model = chained()
            seen: list[str] = []
            assert has_chain(model(self.x))
            handle = getattr(model[3], register)(lambda *_, seen=seen: seen.append("called"))
            self.assert_alone(model)
            assert seen == ["called"]
            handle.remove()
            assert has_chain(model(self.x))

    def test_backward_hook(self) -> None:
        model = chained()
        seen: list[Tensor] = []
        model[2].register_full_backward_hook(lambda _m, _i, out: seen.append(out[0]))
        self.assert_alone(model).sum().backward()
        assert len(seen) == 1

    def test_global_hook(self) -> None:
        model = chained()
        seen: list[nn.Module] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
        try:
            self.assert_alone(model)
        finally:
            handle.remove()
        assert model[0] in seen

    def test_members_that_changed(self) -> None:
        changes: tuple[Callable[[nn.Sequential], object], ...] = (
            lambda m: m.__setitem__(3, nn.Tanh()),
            lambda m: setattr(m[2], "activation", "leaky_relu"),
            lambda m: setattr(m[2], "backend", "aten"),
        )
        for change in changes:
            model = chained([*layers()[:4], nn.Sigmoid()])
            assert has_chain(model(self.x))
            change(model)
            expected = self.x
            for module in model:
                expected = module(expected)
            assert torch.equal(model(self.x), expected)

    def test_appended_module(self) -> None:
        model = chained()
        plain = model(self.x)
        model.append(nn.Sigmoid())
        assert torch.equal(model(self.x), plain.sigmoid())

    def test_functorch(self) -> None:
        model = chained().double()
        x = self.x.double()
        values = {name: p.detach() for name, p in model.named_parameters()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, values, (x,)).square().sum()

        found = torch.func.grad(loss)(values)
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad)

    def test_autocast(self) -> None:
        model = chained()
        with torch.autocast("cpu", torch.bfloat16):
            assert self.assert_alone(model).dtype == torch.bfloat16

    def test_no_gradient(self) -> None:
        model = chained()
        with torch.no_grad():
            self.assert_alone(model)

    def test_dispatch_modes_see_the_layers(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model = chained()
        with FlopCounterMode(display=False):
            self.assert_alone(model)

    def test_measured_backends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = chained()
        monkeypatch.setattr(segpose_kernels, "benchmark", True)
        self.assert_alone(model)

    def test_large_values_are_freed_layer_by_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chains, "MOST_BYTES", 1000)
        self.assert_alone(chained())

    def test_other_backends(self) -> None:
        self.assert_alone(chained(backend="aten"))

    # Dynamo looks at the gradient of any tensor that enters a frame, here the output's in a hook.
    @pytest.mark.filterwarnings("ignore:The .grad attribute")
    def test_compiled(self) -> None:
        model = chained()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(self.x), model(self.x))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 4, 8, 8), torch.float32),
        ((2, 3, 8), torch.float32),
        ((2, 3, 8, 8), torch.float64),
        ((2, 3, 8, 8), torch.int64),
    ],
)
def test_bad_input_gets_the_operators_error(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = chained()
    x = torch.ones(shape, dtype=dtype)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        one_by_one(model)(x)
    for _ in range(2):
        with pytest.raises(type(expected.value)) as found:
            model(x)
        assert str(found.value) == str(expected.value)
    assert has_chain(model(torch.randn(2, 3, 8, 8)))


def test_an_empty_batch() -> None:
    model = chained()
    x = torch.randn(0, 3, 8, 8)
    assert_equal(results(model, x), results(one_by_one(model), x, chain=False))


def test_runs_between_other_modules() -> None:
    modules = [*layers(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.Conv2d(4, 2, 1), nn.Tanh()]
    model = chained(modules)
    x = torch.randn(2, 3, 16, 16)
    found = results(model, x)
    assert_equal(found, results(one_by_one(model), x, chain=False))


def test_copies_pickles_and_restore() -> None:
    plain = nn.Sequential(*layers())
    model, _ = optimize(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, 8)
    expected = results(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(results(other, x), expected)
        other[0].weight.data.zero_()  # its own
    assert_equal(results(model, x), expected)
    restore(model)
    assert "forward" not in vars(model)
    assert model(x).grad_fn.name() != NODE


def test_segnet_learns_as_it_does_module_by_module() -> None:
    model, _ = optimize(SegNet(10))
    alone = one_by_one(model)
    for network in (model, alone):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            x = torch.randn(16, 1, 28, 28, generator=generator)
            y = network(x)
            assert has_chain(y) == (network is model)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("make", [lambda: SegNet(10), Autoencoder])
def test_second_derivatives_of_lecture_models(make: Callable[[], nn.Module]) -> None:
    model, _ = optimize(make().double())
    alone = one_by_one(model)
    channels = next(model.parameters()).shape[1]
    x = torch.randn(2, channels, 28, 28, dtype=torch.float64)
    found = []
    for net in (model, alone):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert has_chain(model(x))
