# SPDX-License-Identifier: BSD-3-Clause
"""Packed filters of inference mode: made once, made anew after every change, bounded in memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import inference_models as nets
import pytest
import torch
from swap_helpers import IMAGE
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from segpose_kernels import precision, prepared_bytes
from segpose_kernels.backends import LIBRARY
from segpose_kernels.swap import filters, optimize, restore
from segpose_kernels.swap.entries import entries
from segpose_kernels.swap.filters import Form

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]


def network() -> nn.Sequential:
    """Channels enough for every kind of algorithm to support the layers."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
    )


@pytest.fixture(params=["one graph", "module by module"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A model under inference mode, and the same model in plain torch sharing nothing."""
    model = network().eval()
    plain = copy.deepcopy(model)
    whole = request.param == "one graph"
    memory_format = torch.channels_last if whole else torch.preserve_format
    _, report = optimize(model, mode="inference", memory_format=memory_format)
    assert report.graphs[""].startswith(request.param)
    return model, plain


def assert_right(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(plain).double()(x.double())
        for _ in range(3):
            error = (model(x).double() - expected).norm() / expected.norm()
            assert error < (1e-5 if x.dtype == torch.float32 else 2e-2)


def forms_of(model: nn.Module) -> list[Form]:
    """The forms of every layer, the latest last."""
    filters = vars(model)["_segpose_swap"].report.filters
    return [form for module in model.modules() for form in filters.forms_of(module)]


def sgd_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def one_element(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[1, 1, 1, 1] += 3


def only_bias(model: nn.Module) -> None:
    with torch.no_grad():
        model[5].bias.add_(1)


def statistics(model: nn.Module) -> None:
    model[3].running_var.mul_(2)
    model[3].running_mean.add_(1)


def affine(model: nn.Module) -> None:
    with torch.no_grad():
        model[3].weight.mul_(2)


def write_through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def write_through_numpy(model: nn.Module) -> None:
    model[0].weight.detach().numpy()[:] *= 2


def new_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def new_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
    model[5].bias = nn.Parameter(model[5].bias.detach() + 1)


def other_state() -> dict[str, Tensor]:
    torch.manual_seed(99)
    return network().state_dict()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "optimizer step": sgd_step,
    "in place": in_place,
    "one element in place": one_element,
    "only a bias": only_bias,
    "BatchNorm statistics": statistics,
    "BatchNorm weight": affine,
    "through .data": write_through_data,
    "through NumPy": write_through_numpy,
    "new .data": new_data,
    "new Parameter": new_parameter,
    "load_state_dict": lambda model: model.load_state_dict(other_state()),
    "load_state_dict, assign": lambda model: model.load_state_dict(other_state(), assign=True),
    "double and back": lambda model: model.double().float(),
    "memory format": lambda model: model.to(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_prepared_again(
    pair: tuple[nn.Module, nn.Module], change: Callable[[nn.Module], None]
) -> None:
    model, plain = pair
    x = torch.randn(IMAGE)
    assert_right(model, plain, x)
    held = prepared_bytes(model)
    assert held > 0
    for _ in range(2):
        change(model)
        change(plain)
        assert_right(model, plain, x)
        assert prepared_bytes(model) == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(pair: tuple[nn.Module, nn.Module], dtype: torch.dtype) -> None:
    model, plain = pair
    x = torch.randn(IMAGE)
    assert_right(model, plain, x)
    model.to(dtype)
    plain.to(dtype)
    assert_right(model, plain, x.to(dtype))
    # A layer has forms of the present dtype only.
    assert len(forms_of(model)) == 3


def test_unchanged_weights_are_prepared_once(pair: tuple[nn.Module, nn.Module]) -> None:
    model, plain = pair
    x = torch.randn(IMAGE)
    assert_right(model, plain, x)
    handles = [form.handle for form in forms_of(model)]
    assert len(handles) == 3
    assert_right(model, plain, x)
    assert [form.handle for form in forms_of(model)] == handles


@pytest.fixture
def settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.ops.segpose.set_algorithm("")
    torch.ops.segpose.set_precision("default")


@pytest.mark.usefixtures("settings")
def test_settings_choose_anew(pair: tuple[nn.Module, nn.Module]) -> None:
    """Precision, a forced algorithm and the number of threads, each in force at the next call."""
    model, plain = pair
    x = torch.randn(IMAGE)
    assert_right(model, plain, x)
    for algorithm in ("igemm", "winograd", "split", "gathered", "fourier", ""):
        torch.ops.segpose.set_algorithm(algorithm)
        assert_right(model, plain, x)
        if algorithm in ("igemm", "winograd"):
            assert f" {algorithm} " in forms_of(model)[1].plan
    torch.set_num_threads(3)
    assert_right(model, plain, x)
    with precision("exact"):
        assert_right(model, plain, x)
        plans = " ".join(form.plan for form in forms_of(model))
        assert "winograd" not in plans
        assert "fourier" not in plans
    assert_right(model, plain, x)


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many are kept."""
    monkeypatch.setattr(filters, "SHAPES_A_LAYER", 8)
    return 8


def test_shapes_share_a_filter(few_shapes: int) -> None:
    """The memory does not grow with the number of shapes, and old shapes are forgotten."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).eval()
    plain = copy.deepcopy(model)
    optimize(model, mode="inference")
    torch.ops.segpose.set_algorithm("igemm")
    try:
        assert_right(model, plain, torch.randn(1, 8, 12, 12))
        held = prepared_bytes(model)
        for size in range(13, 33):
            assert_right(model, plain, torch.randn(size % 3 + 1, 8, size, 12))
            assert prepared_bytes(model) == held
        assert len(forms_of(model)) == few_shapes
    finally:
        torch.ops.segpose.set_algorithm("")


class _Pyramid(nn.Module):
    """One layer at more shapes than are kept for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for size in range(1, 10):
            x = self.conv(x).relu()[:, :, : 16 - size]
        return x


def test_more_shapes_in_a_model_than_are_kept(few_shapes: int) -> None:
    model = _Pyramid().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode="inference")
    for _ in range(3):
        assert_right(model, plain, torch.randn(2, 3, 16, 9))
    assert len(forms_of(model)) <= few_shapes


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_memory_is_bounded(share: float) -> None:
    """Layers without room give the same results."""
    model = network().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode="inference")
    assert_right(model, plain, torch.randn(IMAGE))
    everything = prepared_bytes(model)
    bound = int(share * everything)
    report = optimize(model, mode="inference", max_prepared_bytes=bound)[1]
    for shape in (IMAGE, (1, 3, 20, 18), IMAGE):
        assert_right(model, plain, torch.randn(shape))
        assert prepared_bytes(model) <= bound
        assert report.prepared_bytes == prepared_bytes(model)
    unpacked = [form for form in forms_of(model) if form.bytes == 0]
    assert bool(unpacked) == (share < 1)
    assert (prepared_bytes(model) > 0) == (share > 0)


@pytest.mark.parametrize("how", ["restore", "delete", "clear"])
def test_memory_is_given_back(how: str) -> None:
    model = network().eval()
    report = optimize(model, mode="inference")[1]
    with torch.no_grad():
        model(torch.randn(IMAGE)), model(torch.randn(IMAGE))
    handles = [form.handle for form in forms_of(model)]
    assert all(torch.ops.segpose.prepared_info(handle)[1] > 0 for handle in handles)
    if how == "clear":
        assert report.filters is not None
        report.filters.clear()
    elif how == "restore":
        restore(model)
    del report
    if how == "delete":
        del model
    gc.collect()
    for handle in handles:
        with pytest.raises(RuntimeError, match="no prepared convolution"):
            torch.ops.segpose.prepared_info(handle)


def test_a_form_that_goes_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may look while the filter is freed: it must not get the form any more."""
    release = entries().release_prepared
    references: dict[int, weakref.ref[Form]] = {}
    found = []

    def look(handle: int) -> None:
        found.append(references[handle]())
        release(handle)

    monkeypatch.setattr(filters, "entries", lambda: SimpleNamespace(release_prepared=look))
    model = network().eval()
    report = optimize(model, mode="inference")[1]
    with torch.no_grad():
        model(torch.randn(IMAGE))
    references |= {form.handle: weakref.ref(form) for form in forms_of(model)}
    assert report.filters is not None
    report.filters.clear()
    gc.collect()
    assert found == [None] * len(references)


def test_models_that_go_while_another_is_traced() -> None:
    """Python may collect garbage anywhere; a tracer must not see that filters are freed."""
    model = network().eval()
    optimize(model, mode="inference")
    with torch.no_grad():
        model(torch.randn(IMAGE)), model(torch.randn(IMAGE))
    handles = [form.handle for form in forms_of(model)]
    held = [model]
    del model

    def function(x: torch.Tensor) -> torch.Tensor:
        held.clear()
        gc.collect()
        return x + 1

    graph = make_fx(function, pre_dispatch=True)(torch.randn(3)).graph
    assert not any("segpose" in str(node.target) for node in graph.nodes)
    for handle in handles:
        with pytest.raises(RuntimeError, match="no prepared convolution"):
            torch.ops.segpose.prepared_info(handle)


@pytest.mark.parametrize(
    ("make", "prepared"),
    [
        (lambda: nn.Sequential(nets.conv(3, 4), nn.ReLU(), nets.conv(4, 4)), False),
        (nets.vgg, True),
    ],
    ids=["plain", "folded"],
)
def test_weights_made_in_inference_mode(make: Callable[[], nn.Module], prepared: bool) -> None:
    """They have no version counter to look at and run unprepared; what was folded has."""
    with torch.inference_mode():
        model = make().eval()
        plain = copy.deepcopy(model)
        optimize(model, mode="inference")
        x = torch.randn(IMAGE)
        for _ in range(2):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
            for net in (model, plain):
                net[0].weight.mul_(2)
                net[len(net) - 2 if prepared else 2].weight.mul_(2)
        assert (prepared_bytes(model) > 0) == prepared


def test_layers_that_share_a_weight() -> None:
    model = nn.Sequential(nets.conv(4, 4), nn.ReLU(), nets.conv(4, 4)).eval()
    model[2].weight = model[0].weight
    plain = copy.deepcopy(model)
    optimize(model, mode="inference")
    x = torch.randn(2, 4, 9, 9)
    assert_right(model, plain, x)
    in_place(model)
    in_place(plain)
    assert_right(model, plain, x)
