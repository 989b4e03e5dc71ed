# SPDX-License-Identifier: BSD-3-Clause
"""Sequences that run without torch's dispatcher (csrc/calls.cpp): whatever tensor comes, and
whoever looks on, they do what the operator does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from inference_helpers import assert_same, optimized, program_of
from torch import Tensor, nn

from segpose_kernels import _calls
from segpose_kernels.models import SegNet
from segpose_kernels.swap.entries import entries
from segpose_kernels.swap.frames import Call

SHAPE = (2, 3, 6, 6)


def pair() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2, 2)
    ).double()


class _Own(Tensor):
    pass


def _complex() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.complex128)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: torch.randn(SHAPE).double().to(memory_format=torch.channels_last),
    "part of a larger one": lambda: torch.randn(2, 4, 8, 8).double()[:, 1:, 1:-1, 2:],
    "every other pixel": lambda: torch.randn(2, 3, 12, 12).double()[:, :, ::2, 1::2],
    "one pixel everywhere": lambda: torch.randn(2, 3, 1, 1).double().expand(SHAPE),
    "transposed": lambda: torch.randn(SHAPE).double().transpose(2, 3),
    "negated on reading": lambda: torch._neg_view(torch.randn(SHAPE).double()),
    "imaginary part of a conjugate": lambda: torch.conj(_complex()).imag,
    "real part": lambda: _complex().real,
    "no memory": lambda: torch._efficientzerotensor(SHAPE, dtype=torch.float64),
    "parameter": lambda: nn.Parameter(torch.randn(SHAPE).double()),
    "subclass": lambda: torch.randn(SHAPE).double().as_subclass(_Own),
    "with a gradient": lambda: torch.randn(SHAPE).double().requires_grad_(),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_every_kind_of_input(kind: str) -> None:
    """In calls that follow a plain one, and twice in a row."""
    model, plain, _ = optimized(pair())
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(SHAPE).double())
        for call in range(3):
            assert_same(model, plain, TENSORS[kind](), f"in call {call} of {kind}")


LEFT: dict[str, Callable[[], object]] = {
    "sparse": lambda: torch.randn(SHAPE).to_sparse(),
    "mkldnn": lambda: torch.randn(SHAPE).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3, 6, 6), torch.randn(3, 5, 5)]),
    "meta": lambda: torch.empty(SHAPE, device="meta"),
    "negated on reading": lambda: torch.conj(_complex()).imag,
    "3-D": lambda: torch.randn(3, 6, 6),
    "int": lambda: torch.ones(SHAPE, dtype=torch.int32),
    "none": lambda: None,
}


def _is_taken(tensor: object) -> bool:
    """Whether the call gets as far as its results; there it ends, for there is no sequence -1."""
    asked: list[int] = []

    def allocate() -> Tensor:
        asked.append(1)
        return torch.empty(SHAPE)

    assert _calls.run(entries().run_sequence, -1, (allocate,), (tensor,)) is None
    return bool(asked)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", LEFT)
def test_what_it_leaves_to_the_operator(kind: str) -> None:
    assert _is_taken(torch.randn(SHAPE))
    assert not _is_taken(LEFT[kind]())


def test_layouts_tell_alike_from_other() -> None:
    x = torch.randn(SHAPE)
    layout = _calls.layouts((x,))
    assert layout is not None
    assert layout == _calls.layouts((torch.randn(SHAPE),))
    others: list[tuple[object, ...]] = [
        (x.to(memory_format=torch.channels_last),),
        (x.double(),),
        (x.bfloat16(),),
        (x.half(),),
        (x[:, :, :5],),
        (x[None],),
        (x, x),
        (),
    ]
    found = [_calls.layouts(other) for other in others]
    assert None not in found
    assert len({layout, *found}) == len(others) + 1
    for none in (None, 1, nn.Parameter(x), x.to_sparse(), x.to("meta")):
        assert _calls.layouts((x, none)) is None


def test_malformed_calls() -> None:
    entry = entries().run_sequence
    with pytest.raises(TypeError, match="two numbers and two tuples"):
        _calls.run(entry, 1, [], ())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _calls.run("entry", 1, (), ())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _calls.layouts([torch.randn(SHAPE)])  # type: ignore[arg-type]
    assert _calls.run(entry, -1, (), ()) is None  # no such sequence

    def fails() -> Tensor:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        _calls.run(entry, -1, (fails,), ())


def _direct_calls(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[bool]:
    """Of the calls of a model from now on: whether they ran without the operator."""
    seen: list[bool] = []
    (frame,) = program_of(model)._idle
    (call,) = frame.calls
    assert isinstance(call, Call)
    directly = call._run_directly

    def watch(*args: object) -> list[Tensor] | None:
        results = directly(*args)  # type: ignore[arg-type]
        seen.append(results is not None)
        return results

    monkeypatch.setattr(call, "_run_directly", watch)
    return seen


def test_plain_calls_run_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, _ = optimized(SegNet(10).double())
    x = torch.randn(2, 1, 28, 28).double()
    with torch.no_grad():
        model(x), model(x)
        seen = _direct_calls(monkeypatch, model)
        assert_same(model, plain, x)
        assert_same(model, plain, torch.randn_like(x))
        assert seen == [True, True]
        assert_same(model, plain, torch._neg_view(x))
        assert seen == [True, True, False]


def test_profilers_see_the_operator() -> None:
    model, _, _ = optimized(pair())
    x = torch.randn(SHAPE).double()
    with torch.no_grad():
        model(x), model(x)
        with torch.autograd.profiler.profile() as profile:
            model(x)
    assert "segpose::run_sequence" in {event.name for event in profile.function_events or ()}


def test_results_are_ordinary_tensors() -> None:
    """Each call's own, of the mode that is on, to be written to and resized; large ones too."""
    model, plain, _ = optimized(pair())
    for shape in (SHAPE, (2, 3, 100, 100)):
        x = torch.randn(shape).double()
        with torch.no_grad():
            first, second, third = model(x), model(x), model(x)
            assert len({y.data_ptr() for y in (first, second, third)}) == 3
            second.zero_()
            assert torch.equal(first, third)
            assert not third.is_inference()
            assert third.requires_grad_().grad_fn is None
        with torch.inference_mode():
            assert model(x).is_inference()
            assert_same(model, plain, x)
    with torch.no_grad():
        assert model(torch.randn(SHAPE).double()).resize_(3, 3).shape == (3, 3)


def test_threads_at_once() -> None:
    """The interpreter goes on while a call computes; each has memory of its own."""
    model, plain, _ = optimized(pair())
    inputs = [torch.randn(SHAPE).double() for _ in range(4)]
    wrong: list[int] = []
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
        model(inputs[0])

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                found = model(inputs[number])
                if not torch.allclose(found, expected[number], rtol=1e-9, atol=1e-9):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
