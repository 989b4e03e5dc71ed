# SPDX-License-Identifier: BSD-3-Clause
"""What a model may be, and become, after `optimize(mode="inference")` wrote it out: it computes
what torch would, or raises torch's error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from inference_helpers import program_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from segpose_kernels import optimize
from segpose_kernels.backends import LIBRARY
from segpose_kernels.nn import Conv2dAct

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.has_kernels_for("CPU"), reason="the library is not built"),
]


# What parametrizations.weight_norm calls a filter's length.
_MAGNITUDE = "parametrizations.weight.original0"


def image(*shape: int) -> Tensor:
    return torch.rand(shape or (1, 3, 12, 11))


def follows(
    make: Callable[[], nn.Module],
    change: Callable[[nn.Module], object] = lambda model: None,
    *,
    inference: bool = False,
) -> None:
    """The optimized model computes what the plain one does, before and after the same change."""
    plain = make().eval()
    model, _ = optimize(copy.deepcopy(plain), mode="inference")
    x = image()

    def compare() -> None:
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        compare()
    with torch.inference_mode(inference), torch.no_grad():
        compare()
        change(plain)
        change(model)
        compare()
    with torch.no_grad():
        compare()


def normed() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.running_mean = torch.randn(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 4, 3))


def plain_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))


def transposed_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1))


class TestInferenceMode:
    """Tensors that are made there have no version to look at."""

    def test_statistics_that_change(self) -> None:
        follows(normed, lambda model: model[1].running_mean.add_(1), inference=True)

    def test_a_checkpoint_that_is_loaded(self) -> None:
        state = {name: value + 1 for name, value in normed().state_dict().items()}
        follows(normed, lambda model: model.load_state_dict(state), inference=True)

    @pytest.mark.parametrize("make", [plain_layers, normed])
    def test_a_checkpoint_that_is_assigned(self, make: Callable[[], nn.Module]) -> None:
        with torch.inference_mode():
            state = {name: value + 1 for name, value in make().state_dict().items()}
        follows(make, lambda model: model.load_state_dict(state, assign=True), inference=True)

    def test_folding_there_leaves_gradients_of_inputs(self) -> None:
        model, _ = optimize(normed().eval(), mode="inference")
        with torch.inference_mode():
            model[1].running_mean.add_(1)
            model(image())
        x = image().requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None


class Doubled(Conv2dAct):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class TestModulesThatDoMore:
    """Than their class says: a forward of their own, a subclass, a parametrization, hooks."""

    def test_a_subclass(self) -> None:
        follows(lambda: nn.Sequential(Doubled(3, 8, 3), nn.Conv2d(8, 4, 3)))

    @pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.ReLU, nn.LeakyReLU, nn.Identity])
    def test_a_forward_on_the_instance(self, kind: type[nn.Module]) -> None:
        def make() -> nn.Module:
            module = kind(2) if kind is nn.MaxPool2d else kind()
            module.forward = lambda x: F.avg_pool2d(x, 2) - 1  # type: ignore[method-assign]
            return nn.Sequential(nn.Conv2d(3, 8, 3), module, nn.Conv2d(8, 4, 3))

        follows(make)

    def test_a_parametrization(self) -> None:
        follows(
            lambda: nn.Sequential(
                parametrizations.weight_norm(Conv2dAct(3, 8, 3)), nn.Conv2d(8, 4, 3)
            )
        )

    def test_a_parametrization_that_comes_later(self) -> None:
        follows(
            lambda: nn.Sequential(Conv2dAct(3, 8, 3), nn.Conv2d(8, 4, 3)),
            lambda model: parametrizations.weight_norm(model[0]),
        )

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    @pytest.mark.parametrize("weight_norm", [parametrizations.weight_norm, nn.utils.weight_norm])
    @pytest.mark.parametrize("make", [plain_layers, normed])
    def test_a_weight_of_a_swapped_layer_that_is_computed(
        self,
        make: Callable[[], nn.Module],
        weight_norm: Callable[[nn.Module], nn.Module],
    ) -> None:
        def change(model: nn.Module) -> None:
            weight_norm(model[0])
            with torch.no_grad():
                for name, parameter in model[0].named_parameters():
                    parameter *= 3 if name in ("weight_g", _MAGNITUDE) else 1

        follows(make, change)

    def test_a_hook_that_was_there_before(self) -> None:
        def make() -> nn.Module:
            pool = nn.MaxPool2d(2)
            pool.register_forward_hook(lambda module, args, output: output + 1)
            return nn.Sequential(nn.Conv2d(3, 8, 3), pool, nn.Conv2d(8, 4, 3))

        follows(make)


class TestGeometry:
    @pytest.mark.parametrize(
        "change",
        [
            {"padding": (2, 2), "dilation": (2, 2)},
            {"stride": (2, 2)},
            {"stride": 2, "padding": 1},
            {"padding": (0, 2)},
            {"padding": 0},
            {"padding": "same"},
        ],
        ids=str,
    )
    def test_of_a_convolution(self, change: dict[str, object]) -> None:
        follows(plain_layers, lambda model: vars(model[0]).update(change))

    @pytest.mark.parametrize(
        "change",
        [{"stride": (1, 1)}, {"output_padding": (1, 1)}, {"padding": (0, 0)}, {"dilation": (2, 1)}],
        ids=str,
    )
    def test_of_a_transposed_convolution(self, change: dict[str, object]) -> None:
        follows(transposed_layers, lambda model: vars(model[1]).update(change))

    def test_dilation_of_same(self) -> None:
        follows(
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 4, 3)),
            lambda model: vars(model[0]).update(dilation=(2, 2)),
        )

    def test_another_number_of_filters(self) -> None:
        weight, bias = torch.randn(5, 8, 3, 3), torch.randn(5)

        def change(model: nn.Module) -> None:
            model[2].weight, model[2].bias = nn.Parameter(weight), nn.Parameter(bias)

        follows(plain_layers, change)

    def test_another_number_of_filters_behind_the_parameter(self) -> None:
        weight, bias = torch.randn(5, 8, 3, 3), torch.randn(5)

        def change(model: nn.Module) -> None:
            model[2].weight.data, model[2].bias.data = weight, bias

        follows(plain_layers, change)


class Masked(nn.Module):
    """Its mask is returned and read; which images its last layer sees depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Conv2d(3, 1, 3, padding=1)
        self.read = nn.Conv2d(1, 4, 3, padding=1)
        self.some = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = self.mask(x)
        return mask, self.read(mask), self.some(x[x.mean((1, 2, 3)) > 0])


def test_a_result_of_a_run_whose_shapes_were_others_is_the_callers() -> None:
    model, _ = optimize(Masked().eval(), mode="inference")
    inside = image(2, 3, 8, 8)
    mixed = inside.clone()
    mixed[1].neg_()
    with torch.no_grad():
        model(inside), model(inside)
        mask = model(mixed)[0]
        kept = mask.clone()
        model(inside)
    assert torch.equal(mask, kept)


def test_the_backend_that_a_module_asks_for() -> None:
    conv = Conv2dAct(3, 8, 3, backend="aten")
    model, _ = optimize(nn.Sequential(conv, nn.Conv2d(8, 4, 3)).eval(), mode="inference")
    with torch.no_grad():
        for _ in range(3):
            model(image())
        assert set(program_of(model).notes()) == {"1"}
        model[0].backend = "triton"
        with pytest.raises(Exception, match="triton"):
            model(image())
