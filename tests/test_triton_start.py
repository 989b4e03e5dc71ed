# SPDX-License-Identifier: BSD-3-Clause
"""Which launches of Triton kernels go by the launcher, and which by what it has compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import CompiledKernel

from segpose_kernels.triton.plan import Arguments
from segpose_kernels.triton.start import start


class Compiled(CompiledKernel):
    """Keeps the arguments it is started with."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log

    def __del__(self) -> None:
        """Nothing was loaded."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *values: self.log.append(("compiled", grid, values))


class Kernel:
    """A kernel(src_ptr, saved_ptr, n, BLOCK) whose launcher writes down what it binds."""

    arg_names = ("src_ptr", "saved_ptr", "n", "BLOCK")

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fn = object()

    def __getitem__(self, grid: Any) -> Any:
        def launch(**named: Any) -> Compiled:
            self.log.append(("launcher", grid, tuple(named[name] for name in self.arg_names)))
            assert named["num_warps"] == 4
            return Compiled(self.log)

        return launch


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for CUDA ones: their device has the number -1."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)


def arguments(n: int = 3) -> Arguments:
    return Arguments(n=n, BLOCK=64, num_warps=4)


def test_what_is_compiled_starts_again_with_other_tensors() -> None:
    kernel, plan = Kernel(), arguments()
    tensors = [torch.empty(16) for _ in range(3)]
    for grid, tensor in enumerate(tensors, start=1):
        start(kernel, grid, {"saved_ptr": None, "src_ptr": tensor}, plan)
    assert [how for how, _, _ in kernel.log] == ["launcher", "compiled", "compiled"]
    assert [grid for _, grid, _ in kernel.log] == [(1,), (2, 1, 1), (3, 1, 1)]
    for tensor, (_, _, values) in zip(tensors, kernel.log, strict=True):
        assert values[0] is tensor
        assert values[1:] == (None, 3, 64)


@pytest.mark.parametrize("change", ["alignment", "dtype", "none", "plan", "kernel"])
def test_what_triton_compiles_anew_goes_by_its_launcher(change: str) -> None:
    kernel, plan = Kernel(), arguments()
    first = {"src_ptr": torch.empty(16), "saved_ptr": None}
    start(kernel, 1, first, plan)
    second: dict[str, torch.Tensor | None] = dict(first)
    if change == "alignment":
        second["src_ptr"] = torch.empty(17)[1:]
    elif change == "dtype":
        second["src_ptr"] = torch.empty(16, dtype=torch.float16)
    elif change == "none":
        second["saved_ptr"] = torch.empty(16)
    other = Kernel() if change == "kernel" else kernel
    other.log = kernel.log
    start(other, 1, second, arguments(4) if change == "plan" else plan)
    assert [how for how, _, _ in kernel.log] == ["launcher", "launcher"]
    start(kernel, 1, first, plan)
    assert kernel.log[-1][0] == "compiled"


def test_an_empty_grid_starts_nothing() -> None:
    kernel = Kernel()
    start(kernel, 0, {"src_ptr": torch.empty(16), "saved_ptr": None}, arguments())
    assert kernel.log == []


def test_what_an_interpreter_returns_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, plan = Kernel(), arguments()
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda **named: None)
    start(kernel, 1, {"src_ptr": torch.empty(16), "saved_ptr": None}, plan)
    assert plan.compiled == {}
