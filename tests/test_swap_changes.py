# SPDX-License-Identifier: BSD-3-Clause
"""Changes of fused modules since `optimize`: `restore` keeps them, or refuses and says why."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_helpers import tree_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from segpose_kernels.nn import Conv2dAct
from segpose_kernels.pooling import MaxPool2x2
from segpose_kernels.swap import optimize, restore
from segpose_kernels.swap.pieces import AbsorbedActivation, FoldedBatchNorm2d

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")

MODES = ("train", "inference")
HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_state_dict_post_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
)


def layers() -> nn.Sequential:
    """Its modules but the last are all replaced, in one mode or the other."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 3),
        nn.Sigmoid(),
    )
    return model.double().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64)


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    x = images()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                torch.testing.assert_close(model(x), plain(x))


def note_calls(module: nn.Module, seen: list[Any]) -> list[Any]:
    """Hooks of all kinds; each notes its name and the module that it is given."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *rest: Any) -> None:
            seen.append((name, module))

        return hook

    return [getattr(module, name)(hook_of(name)) for name in HOOKS]


def use(model: nn.Module) -> None:
    """Everything that calls hooks."""
    model(images().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_hooks_stay(mode: str) -> None:
    model, seen = layers(), []
    old = list(model)
    optimize(model, mode=mode)
    replaced = [i for i, module in enumerate(model) if module is not old[i]]
    handles = [handle for i in replaced for handle in note_calls(model[i], seen)]
    use(model)
    assert {(name, i) for name in HOOKS for i in replaced} == {
        (name, i) for name, module in seen for i in replaced if module is model[i]
    }
    kinds = {type(model[i]) for i in replaced}
    assert kinds >= {AbsorbedActivation, MaxPool2x2 if mode == "train" else FoldedBatchNorm2d}
    before = len(seen)
    restore(model)
    assert list(model) == old
    seen.clear()
    use(model)
    assert len(seen) == before
    assert {(name, id(module)) for name, module in seen} == {
        (name, id(model[i])) for name in HOOKS for i in replaced
    }
    for handle in handles:
        handle.remove()
    seen.clear()
    use(model)
    assert not seen


@pytest.mark.parametrize("mode", MODES)
def test_what_was_added_stays(mode: str) -> None:
    model = layers()
    optimize(model, mode=mode)
    fused = model[2]
    for module in model:
        module.register_buffer("count", torch.ones(1))
        module.register_buffer("scratch", torch.ones(2), persistent=False)
        module.gain = nn.Parameter(torch.ones(3))
        module.child = nn.Identity()
        module.tag = "mine"
    fused.weight.requires_grad_(False)
    keys = list(model.state_dict())
    assert restore(model)[2] is not fused
    assert list(model.state_dict()) == keys
    for module in model:
        assert list(module._buffers)[-2:] == ["count", "scratch"]
        assert not [name for name in module._buffers if name.startswith("folded")]
        assert module._non_persistent_buffers_set == {"scratch"}
        assert list(module._modules) == ["child"]
        assert isinstance(module.gain, nn.Parameter)
        assert module.tag == "mine"
        assert not {"backend", "activation", "filters", "folded_norm", "description"} & {
            *vars(module)
        }
    assert not model[2].weight.requires_grad


def test_what_was_removed_or_set_on_the_plain_module_stays_so() -> None:
    model = layers()
    conv = model[2]
    conv.tags, conv.size = ["first"], 1
    optimize(model)
    assert model[2].tags is conv.tags
    del model[2].tags
    conv.size = 2
    conv.register_forward_hook(lambda module, args, output: output + 1)
    restore(model)
    assert model[2] is conv
    assert not hasattr(conv, "tags")
    assert conv.size == 2
    assert len(conv._forward_hooks) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("index", "change"),
    [
        (2, {"stride": (2, 2), "padding": (1, 1)}),
        (2, {"dilation": (2, 2), "padding": 1}),
        (2, {"padding": (1, 1), "padding_mode": "reflect"}),
        (5, {"output_padding": (1, 1), "stride": (2, 2)}),
        (4, {"kernel_size": 3, "stride": 1}),
        (1, {"eps": 0.5}),
    ],
    ids=str,
)
def test_changed_attributes_stay(mode: str, index: int, change: dict[str, Any]) -> None:
    if "padding_mode" in change:
        change = {**change, "_reversed_padding_repeated_twice": [1] * 4}
    model, plain = layers(), layers()
    plain.load_state_dict(model.state_dict())
    optimize(model, mode=mode)
    for net in (plain, model):
        vars(net[index]).update(change)
    if index != 1:
        assert_same(model, plain)
    for net in (restore(copy.deepcopy(model)), restore(pickle.loads(pickle.dumps(model)))):
        assert_same(net, plain)
    assert_same(restore(model), plain)


def test_attributes_that_nobody_changed_are_the_very_same() -> None:
    model = layers()
    model[2].stride, model[2].padding, model[4].kernel_size = 1, 0, (2, 2)
    before = tree_of(model)
    for mode in MODES:
        optimize(model, mode=mode)
    assert tree_of(restore(model)) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("index", [0, 2, 5])
def test_a_weight_that_a_hook_computes_stays(
    mode: str, index: int, make: Callable[[nn.Module], nn.Module]
) -> None:
    model = layers()
    plain = copy.deepcopy(model)
    optimize(model, mode=mode)
    for net in (plain, model):
        torch.manual_seed(2)
        make(net[index])
    assert_same(model, plain)
    restore(model)
    assert type(model[index]) is type(plain[index])
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(model, plain)
    model.load_state_dict(plain.state_dict())
    remove = getattr(nn.utils, f"remove_{make.__name__}")
    remove(model[index])
    assert "weight" in model[index]._parameters
    assert_same(model, plain)


class Leaky(nn.Module):
    """One activation behind two convolutions, a function behind the third."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 3) for _ in range(3))
        self.act, self.call = nn.LeakyReLU(0.1), F.leaky_relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv2(self.act(self.conv1(x))))
        return self.call(self.conv3(x)) * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_changed_slope_reaches_the_activation(mode: str) -> None:
    model = Leaky().double().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode=mode)
    model.conv1.negative_slope = model.conv2.negative_slope = plain.act.negative_slope = 0.3
    model.conv1.backend = "aten"
    assert_same(model, plain)
    for net in (restore(copy.deepcopy(model)), restore(pickle.loads(pickle.dumps(model)))):
        assert_same(net, plain)
    optimize(model, memory_format="preserve_format")
    assert_same(model, plain)
    assert restore(model).act.negative_slope == 0.3
    model.conv1.negative_slope = 0.5  # decides nothing
    assert_same(restore(optimize(model)[0]), plain)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("conv1", {"negative_slope": 0.3}),
        ("conv2", {"activation": "relu"}),
        ("conv3", {"negative_slope": 0.3}),
        ("conv3", {"activation": "none"}),
    ],
)
def test_an_activation_that_the_plain_model_could_not_have(
    name: str, change: dict[str, Any]
) -> None:
    model = Leaky().double().eval()
    plain = copy.deepcopy(model)
    optimize(model)
    fused = getattr(model, name)
    before = {attribute: getattr(fused, attribute) for attribute in change}
    vars(fused).update(change)
    with pytest.raises(RuntimeError, match=f"{name} computes .* where optimize put leaky_relu"):
        restore(model)
    vars(fused).update(before)
    assert_same(restore(model), plain)


def parametrized(model: nn.Module) -> Callable[[], object]:
    parametrizations.weight_norm(model[2])
    return lambda: parametrize.remove_parametrizations(model[2], "weight")


def with_own_class(model: nn.Module) -> Callable[[], object]:
    before = type(model[2])
    model[2].__class__ = type("Louder", (before,), {})
    return lambda: setattr(model[2], "__class__", before)


def with_own_forward(index: int) -> Callable[[nn.Module], Callable[[], object]]:
    def change(model: nn.Module) -> Callable[[], object]:
        before = model[index].forward
        model[index].forward = lambda x: before(x) + 1
        return lambda: delattr(model[index], "forward")

    return change


def compiled(model: nn.Module) -> Callable[[], object]:
    model[2].compile(backend="eager")
    return lambda: setattr(model[2], "_compiled_call_impl", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (parametrized, "2 has a parametrization: remove it first"),
        (with_own_class, "2 became a Louder: set its class to .*Conv2dAct first"),
        (with_own_forward(2), "2 has a forward of its own"),
        (with_own_forward(3), "3 has a forward of its own"),
        (compiled, "2 is compiled"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_stay_is_named_and_nothing_changes(
    mode: str, change: Callable[[nn.Module], Callable[[], object]], message: str
) -> None:
    model = layers()
    before, plain = tree_of(model), copy.deepcopy(model)
    optimize(model, mode=mode)
    undo = change(model)
    changed = tree_of(model)
    again = MODES[mode == "train"]
    for refused in (lambda: restore(model), lambda: optimize(model, mode=again)):
        with pytest.raises(RuntimeError, match=message):
            refused()
        assert tree_of(model) == changed
    if change is not compiled:  # torch's copies are not
        with pytest.raises(RuntimeError, match=message):
            restore(copy.deepcopy(model))
    undo()
    restore(model)
    names = [(row[0], row[1], row[3]) for row in before if len(row) == 4]
    assert [(row[0], row[1], row[3]) for row in tree_of(model) if len(row) == 4] == names
    assert_same(model, plain)


def test_parts_are_looked_at_before_the_whole_changes() -> None:
    model = nn.Sequential(layers(), layers())
    optimize(model[0])
    optimize(model[1])
    with_own_forward(2)(model[1])
    changed = tree_of(model)
    with pytest.raises(RuntimeError, match="2 has a forward of its own"):
        restore(model)
    assert tree_of(model) == changed


class Reused(nn.Module):
    """Gets a rewritten forward: its activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.leaky_relu(self.conv1(x), 0.2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [layers, Reused])
def test_a_forward_of_the_users_stays(mode: str, make: Callable[[], nn.Module]) -> None:
    """Also one that calls what `optimize` had set."""
    model = make().double().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode=mode)
    before = model.forward
    for net, inner in ((model, before), (plain, plain.forward)):
        net.forward = lambda x, inner=inner: 2 * inner(x)
    mine = model.forward
    assert_same(model, plain)
    optimize(model, backend="aten")
    assert model.forward is mine
    assert_same(model, plain)
    restore(model)
    assert model.forward is mine
    assert_same(model, plain)


def test_a_fused_module_that_was_moved_is_found() -> None:
    model = layers()
    plain = copy.deepcopy(model)
    conv = model[2]
    optimize(model)
    assert isinstance(model[2], Conv2dAct)
    model[2] = nn.Sequential(model[2])
    restore(model)
    assert model[2][0] is conv
    assert_same(model, plain)
