# SPDX-License-Identifier: BSD-3-Clause
"""Which backend runs a call: the rule for "auto" on CUDA, and benchmark mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tritonsim

import segpose_kernels
from segpose_kernels import auto, backends, fastest, functional
from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.numerics import assert_results_match
from segpose_kernels.testing.spec import ConvSpec
from segpose_kernels.triton import tuning
from segpose_kernels.triton.device import Device

pytestmark = pytest.mark.usefixtures("own_cache")

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends a device, and kernels for the backends named."""

    def pretend(capability: tuple[int, int], *built: str) -> None:
        table = tuple(
            replace(b, missing=None if b.name in built else "not built")
            if b.name in ("cuda", "triton")
            else b
            for b in backends.BACKENDS
        )
        monkeypatch.setattr(auto, "BACKENDS", table)
        monkeypatch.setattr(backends, "BACKENDS", table)
        monkeypatch.setattr(backends, "_BY_NAME", {b.name: b for b in table})
        monkeypatch.setattr(backends, "_selected", {})
        monkeypatch.setattr(auto, "device_of", lambda _: Device.generic(capability))

    return pretend


F16, F32, F64 = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "large", "expected"),
    [
        ((8, 0), ("cuda", "triton"), F16, True, "cuda"),
        ((8, 6), ("cuda", "triton"), F32, True, "cuda"),
        ((9, 0), ("cuda", "triton"), F16, True, "triton"),
        ((9, 0), ("cuda", "triton"), F32, True, "triton"),
        ((9, 0), ("cuda", "triton"), F16, False, "cuda"),
        ((10, 0), ("cuda", "triton"), F16, True, "triton"),
        ((12, 0), ("cuda", "triton"), F16, True, "cuda"),
        ((9, 0), ("cuda", "triton"), F64, True, "cuda"),
        ((8, 0), ("triton",), F16, False, "triton"),
        ((8, 0), ("triton",), F64, False, "aten"),
        ((9, 0), ("cuda",), F16, True, "cuda"),
        ((7, 5), ("cuda", "triton"), F16, True, "aten"),
        ((8, 0), (), F16, True, "aten"),
        ((8, 0), ("cuda", "triton"), torch.int32, True, "aten"),
        ((8, 0), ("cuda", "triton"), torch.complex64, True, "aten"),
    ],
)
def test_rule(
    gpu: Callable[..., None],
    capability: tuple[int, int],
    built: tuple[str, ...],
    dtype: torch.dtype,
    large: bool,
    expected: str,
) -> None:
    gpu(capability, *built)
    assert auto.choose("auto", CUDA, dtype, large) == expected


def test_true_float32_has_no_tensor_cores_to_prefer(gpu: Callable[..., None]) -> None:
    gpu((9, 0), "cuda", "triton")
    with mock.patch.object(auto, "float32_precision", return_value="ieee"):
        assert auto.choose("auto", CUDA, F32, True) == "cuda"


def test_argument_and_environment_overrule(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0), "cuda", "triton")
    assert auto.choose("aten", CUDA, F16, True) == "aten"
    assert auto.choose("cuda", CUDA, F16, True) == "cuda"
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "aten")
    assert auto.choose("auto", CUDA, F16, True) == "aten"
    assert auto.choose("triton", CUDA, F16, True) == "triton"


def test_a_backend_that_cannot_run_says_why(gpu: Callable[..., None]) -> None:
    gpu((7, 5), "triton")
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 .*has 7.5"):
        auto.choose("triton", CUDA, F16, True)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: not built"):
        auto.choose("cuda", CUDA, F16, True)
    with pytest.raises(ValueError, match="backend must be one of"):
        auto.choose("cudnn", CUDA, F16, True)


@pytest.mark.parametrize(
    ("shape", "groups", "trained", "large"),
    [
        ((64, 64, 3, 3), 1, True, True),
        ((512, 17, 4, 4), 1, True, True),
        ((16, 64, 1, 1), 1, True, True),
        ((64, 15, 3, 3), 1, False, False),
        ((63, 63, 3, 3), 1, False, False),
        ((32, 16, 3, 3), 1, False, True),
        ((32, 16, 3, 3), 1, True, False),
        ((128, 64, 1, 1), 2, False, False),
    ],
)
def test_large(shape: tuple[int, ...], groups: int, trained: bool, large: bool) -> None:
    assert auto.is_large(torch.empty(shape), groups, trained=trained) is large


# Benchmark mode ------------------------------------------------------------------------------


@pytest.fixture
def benchmark_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fastest, "_winners", {})
    segpose_kernels.benchmark = True
    yield
    segpose_kernels.benchmark = False


def runners(label: str) -> dict[str, Any]:
    return {"conv2d": functional._CONV2D, "conv_transpose2d": functional._CONV_TRANSPOSE2D}[
        label
    ].runners


def choose(x: Tensor, w: Tensor, b: Tensor | None = None, default: str = "default") -> str:
    params = (1, 1), (0, 0), (1, 1), 1, 0.1
    return fastest.choose("conv2d", runners("conv2d"), x, w, b, params, default)


@pytest.mark.usefixtures("benchmark_mode")
class TestBenchmark:
    """On simulated kernels: CPU tensors stand for CUDA ones, and given numbers for times."""

    @pytest.fixture(autouse=True)
    def simulated_gpu(
        self, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        gpu((8, 0), "triton")
        monkeypatch.setattr(fastest, "device_of", lambda _: tritonsim.device(80))
        monkeypatch.setattr(fastest, "_on_cpu", lambda _: False)
        monkeypatch.setattr(tuning, "measure_ms", lambda do: float(do() is None))
        with tritonsim.simulated(80):
            yield

    def test_the_setting_is_the_packages(self) -> None:
        assert segpose_kernels.benchmark is True
        assert fastest.is_wanted("auto")
        assert not fastest.is_wanted("triton")
        segpose_kernels.benchmark = False
        assert not fastest.is_wanted("auto")

    @pytest.mark.parametrize("winner", ["triton", "aten"])
    def test_the_fastest_is_kept(self, winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
        timed: list[int] = []

        def measure(do: Callable[[], object]) -> float:
            do()
            timed.append(len(timed))
            # The order of the candidates: triton, aten.
            return {"triton": len(timed), "aten": -len(timed)}[winner]

        monkeypatch.setattr(fastest, "measure_ms", measure)
        x, w = torch.randn(1, 16, 5, 5).half(), torch.randn(8, 16, 1, 1).half()
        assert choose(x, w) == winner
        assert len(timed) == 2
        assert choose(x.clone(), w) == winner
        assert len(timed) == 2, "a known problem is not measured again"
        choose(x[:, :, 1:], w)
        assert len(timed) == 4, "another shape is another problem"

    def test_gradients_are_measured_with_the_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results: list[object] = []
        monkeypatch.setattr(fastest, "measure_ms", lambda do: float(results.append(do()) is None))
        x, w = torch.randn(1, 16, 5, 5).half(), torch.randn(8, 16, 1, 1).half().requires_grad_()
        choose(x, w, torch.randn(8).half().requires_grad_())
        assert [[g.shape for g in r] for r in results] == [[w.shape, (8,)]] * 2  # type: ignore[attr-defined]
        with torch.no_grad():
            choose(x, w, torch.randn(8).half())
        assert isinstance(results[-1], Tensor)

    def test_nothing_is_measured_where_nothing_may_be(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            fastest, "measure_ms", mock.Mock(side_effect=AssertionError("measured"))
        )
        x, w = torch.randn(1, 16, 5, 5).half(), torch.randn(8, 16, 1, 1).half()
        with mock.patch.object(fastest, "is_capturing", return_value=True):
            assert choose(x, w) == "default"
        torch.use_deterministic_algorithms(True)
        try:
            assert choose(x, w) == "default"
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.func.vmap(lambda x: torch.tensor(len(choose(x, w))), out_dims=None)(
            x[None]
        ) == len("default")

    def test_what_was_chosen_is_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever tuning chose for each pass, the gradients are."""
        order = iter(range(10_000))
        # The last candidate of each pass: the library, where it is one.
        monkeypatch.setattr(tuning, "measure_ms", lambda do: (do(), -float(next(order)))[1])
        monkeypatch.setattr(fastest, "measure_ms", lambda do: (do(), 1.0)[1])
        spec = ConvSpec("library", "conv2d", 2, 16, 24, 6, 5, (3, 3), padding=(1, 1))
        tensors = spec.make_tensors(torch.float16, input_layout="channels_last")
        leaves = [
            t.requires_grad_()
            for t in (tensors.input, tensors.weight, tensors.bias)
            if t is not None
        ]
        params = (1, 1), (1, 1), (1, 1), 1, 0.01
        name = fastest.choose(
            "conv2d", runners("conv2d"), leaves[0], leaves[1], leaves[2], params, ""
        )
        assert name == "triton"
        results = run_fused(spec, tensors, backend="triton")
        assert_results_match(spec, tensors, results)
