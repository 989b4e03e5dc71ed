# SPDX-License-Identifier: BSD-3-Clause
"""Whole models that are one line of convolutions: one node of the graph, and the same values as
module by module.
"""

from __future__ import annotations

import copy
import cProfile
import gc
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from test_chain import NODE, assert_equal, layers, one_by_one, results
from torch import Tensor, nn

from segpose_kernels import optimize, restore
from segpose_kernels.backends import LIBRARY
from segpose_kernels.models import SegNet
from segpose_kernels.swap.lines import LineForward

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.has_kernels_for("CPU"), reason="the library is not built"),
]


class Halves(nn.Module):
    """An encoder and a decoder, between which other code may come."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*layers()[:4])
        self.decoder = nn.Sequential(*layers()[4:])
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        if self.twice:
            y = y * 2
        return self.decoder(y)


class Residual(Halves):
    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        return self.decoder(y) + self.decoder(y * 2)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*layers()[:4])
        self.decoder = nn.Sequential(*layers()[4:])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.encoder(x)
        return self.decoder(y), y


class ByMode(Halves):
    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        if self.training:
            y = y + 1
        return self.decoder(y)


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(seed))


def nodes(y: Tensor) -> list[str]:
    """Names of the nodes from a result to its leaves, the leaves left out."""
    names, node = [], y.grad_fn
    while node is not None and "Accumulate" not in node.name():
        names.append(node.name())
        node = next((following for following, _ in node.next_functions if following), None)
    return names


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("make", [Halves, lambda: SegNet(10), lambda: nn.Sequential(*layers())])
def test_one_node_and_the_same_values(
    make: Callable[[], nn.Module], memory_format: torch.memory_format, training: bool
) -> None:
    model = optimize(make())[0].train(training)
    channels = next(model.parameters()).shape[1]
    x = torch.randn(3, channels, 28, 28).to(memory_format=memory_format)
    assert nodes(model(x)) == [NODE]
    found = results(model, x)
    assert_equal(found, results(one_by_one(model), x, chain=False))
    y = found["y"]
    assert y is not None
    assert y.is_contiguous(memory_format=memory_format)


def test_a_contiguous_result_may_be_changed_in_place() -> None:
    """It is a copy of what the backward reads."""
    model, _ = optimize(Halves())
    alone = one_by_one(model)
    x = image()
    y = model(x)
    assert y.is_contiguous()
    y.mul_(2).sum().backward()
    (alone(x) * 2).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("make", [Residual, ByMode])
def test_what_is_no_line(make: Callable[[], nn.Module]) -> None:
    model, _ = optimize(make())
    assert not isinstance(vars(model).get("forward"), LineForward)
    assert_equal(results(model, image()), results(one_by_one(model), image(), chain=False))


def test_two_results_are_no_line() -> None:
    model, _ = optimize(Pair())
    assert not isinstance(vars(model).get("forward"), LineForward)
    first, second = model(image())
    assert (first.shape[1], second.shape[1]) == (5, 8)


def test_a_shared_layer() -> None:
    """The gradient of a weight that is used twice is the sum of both."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model, _ = optimize(nn.Sequential(conv, nn.Conv2d(3, 3, 1), conv))
    assert_equal(results(model, image()), results(one_by_one(model), image(), chain=False))


class TestChanges:
    """What is done to a model after `optimize` has the effect that it has module by module."""

    def both(self) -> tuple[Halves, Halves]:
        plain = Halves()
        model, _ = optimize(copy.deepcopy(plain))
        assert nodes(model(image())) == [NODE]
        return model, plain

    def assert_follows(self, change: Callable[[Halves], object], *, line: bool = False) -> None:
        model, _ = self.both()
        before = model(image())
        change(model)
        for _ in range(2):
            y = model(image())
            assert (nodes(y) == [NODE]) == line
            assert y.shape != before.shape or not torch.equal(y, before)
            torch.testing.assert_close(y, one_by_one(model)(image()))

    def test_hooks(self) -> None:
        model, plain = self.both()
        for part in ("encoder", "decoder"):
            for hook in ("register_forward_hook", "register_forward_pre_hook"):
                seen: list[str] = []
                handle = getattr(getattr(model, part), hook)(lambda *_, s=seen: s.append("called"))
                y = model(image())
                assert seen == ["called"]
                assert nodes(y) != [NODE]
                torch.testing.assert_close(y, plain(image()))
                handle.remove()
                assert nodes(model(image())) == [NODE]

    def test_hooks_of_the_model_itself(self) -> None:
        model, plain = self.both()
        seen: list[Tensor] = []
        model.register_forward_hook(lambda _m, _args, y: seen.append(y))
        assert model(image()) is seen[0]
        model.register_full_backward_hook(lambda _m, _i, out: seen.append(out[0]))
        model(image().requires_grad_()).sum().backward()
        assert len(seen) == 3
        torch.testing.assert_close(seen[1], plain(image()))

    def test_global_hook(self) -> None:
        model, _ = self.both()
        seen: list[nn.Module] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
        try:
            model(image())
        finally:
            handle.remove()
        assert model.encoder[0] in seen
        assert model.decoder in seen

    def test_attribute(self) -> None:
        self.assert_follows(lambda m: setattr(m, "twice", True))

    def test_forward_of_a_part(self) -> None:
        self.assert_follows(lambda m: setattr(m.encoder, "forward", m.encoder[0].forward))

    def test_replaced_layer(self) -> None:
        conv = nn.Conv2d(8, 8, 1)
        self.assert_follows(lambda m: m.encoder.__setitem__(2, conv))

    def test_appended_layer(self) -> None:
        self.assert_follows(lambda m: m.encoder.append(nn.Sigmoid()))

    def test_replaced_part(self) -> None:
        part = nn.Sequential(nn.ConvTranspose2d(8, 2, 2))
        self.assert_follows(lambda m: setattr(m, "decoder", part))

    def test_new_parameter(self) -> None:
        weight = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.assert_follows(lambda m: setattr(m.encoder[2], "weight", weight), line=True)

    def test_new_values(self) -> None:
        self.assert_follows(lambda m: m.encoder[0].weight.data.mul_(2), line=True)

    def test_other_dtype(self) -> None:
        model, plain = self.both()
        y = model.double()(image().double())
        assert nodes(y) == [NODE]
        torch.testing.assert_close(y, plain.double()(image().double()))
        with pytest.raises((RuntimeError, TypeError), match="dtype"):
            model(image())

    def test_a_part_in_another_mode(self) -> None:
        model, plain = self.both()
        model.encoder.eval()
        torch.testing.assert_close(model(image()), plain(image()))

    def test_frozen_layers(self) -> None:
        model, _ = self.both()
        model.encoder.requires_grad_(False)
        assert_equal(
            results(model, image(), input_grad=False),
            results(one_by_one(model), image(), input_grad=False, chain=False),
        )

    def test_contiguous_weights(self) -> None:
        """As `load_state_dict(assign=True)` leaves them."""
        model, plain = self.both()
        state = {name: 2 * value for name, value in plain.state_dict().items()}
        model.load_state_dict(state, assign=True)
        y = model(image())
        assert nodes(y) == [NODE]
        torch.testing.assert_close(y, one_by_one(model)(image()))
        y.sum().backward()

    def test_cleared_hooks(self) -> None:
        """A new table of hooks, which some set to clear the old one."""
        for module in ("encoder", "encoder.0"):
            model, _ = self.both()
            part = model.get_submodule(module)
            part._forward_hooks = OrderedDict()
            seen: list[str] = []
            part.register_forward_hook(lambda *_, s=seen: s.append("called"))
            model(image())
            assert seen == ["called"]

    def test_new_table_of_modules(self) -> None:
        def change(m: Halves) -> None:
            m.encoder._modules = OrderedDict({"0": nn.Conv2d(3, 8, 1), "1": nn.Conv2d(8, 8, 1)})

        self.assert_follows(change)

    def test_bias_of_another_kind(self) -> None:
        def change(m: Halves) -> None:
            del m.encoder[2].bias
            m.encoder[2].register_buffer("bias", torch.ones(8))

        self.assert_follows(change)

    def test_attribute_that_cannot_be_compared(self) -> None:
        model, _ = self.both()
        before = model(image())
        model.twice = torch.tensor([True, True])
        with pytest.raises(RuntimeError, match="ambiguous"):
            model(image())
        model.twice = False
        torch.testing.assert_close(model(image()), before)

    def test_threads_and_a_new_parameter(self) -> None:
        model, _ = self.both()
        weights = [nn.Parameter(torch.randn(8, 8, 1, 1)) for _ in range(2)]
        failures: list[Exception] = []
        done = threading.Event()

        def call() -> None:
            try:
                while not done.is_set():
                    model(image())
            except Exception as error:
                failures.append(error)

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for i in range(200):
            model.encoder[2].weight = weights[i % 2]
            model(image())
        done.set()
        for caller in callers:
            caller.join()
        assert not failures

    def test_removed_bias(self) -> None:
        def remove(m: Halves) -> None:
            m.encoder[0].bias = None

        self.assert_follows(remove)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_list_that_grows() -> None:
    model, _ = optimize(Listed())
    assert nodes(model(image())) == [NODE]
    model.layers.append(nn.Conv2d(3, 4, 1))
    assert model(image()).shape[1] == 4


def test_layers_in_another_order() -> None:
    parts = {"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 3, 1), "c": nn.Conv2d(3, 3, 1)}
    model, _ = optimize(nn.Sequential(OrderedDict(parts)))
    before = model(image())
    first = model.a
    del model.a
    model.a = first
    y = model(image())
    assert not torch.equal(y, before)
    torch.testing.assert_close(y, model.a(model.c(model.b(image()))))


class Twice(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_an_identity_that_is_none(mode: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), Twice(), nn.Conv2d(4, 3, 3)).eval()
    model, _ = optimize(copy.deepcopy(plain), mode=mode)
    with torch.set_grad_enabled(mode == "train"):
        for _ in range(2):
            torch.testing.assert_close(model(image()), plain(image()))


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_an_activation_function_that_is_replaced(mode: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)
            self.act = nn.functional.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(self.first(x)))

    model, _ = optimize(Model().eval(), mode=mode)
    with torch.set_grad_enabled(mode == "train"):
        before = [model(image()) for _ in range(2)]
        model.act = torch.sigmoid
        y = model(image())
    assert not torch.equal(y, before[0])
    expected = nn.functional.conv2d(image(), model.first.weight, model.first.bias).relu().sigmoid()
    expected = nn.functional.conv2d(expected, model.second.weight, model.second.bias)
    torch.testing.assert_close(y, expected)


class Noting(Halves):
    """Its forward notes that it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def count(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return x


class Appending(Noting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return self.decoder(self.encoder(x))


class Calling(Noting):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.count(self.encoder(x)))


def counted(forward: Callable[[Calling, Tensor], Tensor]) -> Callable[[Calling, Tensor], Tensor]:
    def call(self: Calling, x: Tensor) -> Tensor:
        self.calls.append(1)
        return forward(self, x)

    return call


class Decorated(Noting):
    @counted
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("kind", [Appending, Calling, Decorated])
def test_a_forward_that_does_more_is_no_line(kind: type[Noting]) -> None:
    model, _ = optimize(kind())
    model.calls.clear()
    for _ in range(3):
        model(image())
    assert len(model.calls) == 3


def test_collecting_garbage_is_not_the_forwards_doing() -> None:
    """hypothesis and JAX have functions that run then."""
    seen: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        seen.append(phase)

    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(10)
    try:
        model, _ = optimize(Halves())
        assert nodes(model(image())) == [NODE]
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*thresholds)
    assert seen
    assert gc.isenabled()


def test_a_profiler_that_watches_goes_on() -> None:
    plain = Halves()
    profile = cProfile.Profile()
    profile.enable()
    model, _ = optimize(copy.deepcopy(plain))
    y = model(image())
    profile.disable()
    torch.testing.assert_close(y, plain(image()))
    seen = {str(getattr(entry.code, "co_name", entry.code)) for entry in profile.getstats()}
    assert {"optimize", "_wrapped_call_impl"} <= seen
    assert sys.getprofile() is None


def test_calls_of_other_kinds() -> None:
    model, _ = optimize(Halves())
    plain = one_by_one(model)
    torch.testing.assert_close(model(x=image()), plain(image()))
    with torch.no_grad():
        assert model(image()).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image()).dtype == torch.bfloat16
    with pytest.raises(TypeError):
        model()


def test_copies_pickles_and_restore() -> None:
    plain = SegNet(10)
    model, _ = optimize(copy.deepcopy(plain))
    x = torch.randn(2, 1, 28, 28)
    expected = results(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(results(other, x), expected)
        next(other.parameters()).data.zero_()
    assert_equal(results(model, x), expected)
    restore(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model._forward_hooks
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled() -> None:
    model, _ = optimize(Halves())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(image())
    torch.testing.assert_close(y, model(image()))
    assert y.is_contiguous()
