# SPDX-License-Identifier: BSD-3-Clause
"""Everything above the CUDA operators, on the compiled kernels in the simulator.

What every backend must do is in test_backend_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segpose_kernels import Conv2dAct, ConvTranspose2dAct, conv2d_act, conv_transpose2d_act
from segpose_kernels.models import SegNet
from segpose_kernels.swap import optimize
from segpose_kernels.testing.fused import call_fused
from segpose_kernels.testing.spec import ConvSpec

cudasim = pytest.importorskip("cudasim")

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not cudasim.have_nvcc(), reason="no nvcc to compile the kernels with"),
]

CONV = ConvSpec("conv", "conv2d", 1, 2, 3, 4, 3, (3, 2), padding=(1, 0), slope=0.3)
UP = ConvSpec("up", "conv_transpose2d", 1, 3, 2, 2, 3, (3, 2), stride=(2, 1), output_padding=(1, 0))
SPECS = (CONV, UP)


@pytest.fixture(params=SPECS, ids=str)
def spec(request: pytest.FixtureRequest) -> ConvSpec:
    chosen: ConvSpec = request.param
    return chosen


def operands(spec: ConvSpec, generator: torch.Generator) -> tuple[Tensor, ...]:
    tensors = spec.make_tensors(torch.float64, generator=generator)
    assert tensors.bias is not None
    return tuple(t.requires_grad_() for t in (tensors.input, tensors.weight, tensors.bias))


def on_cuda(spec: ConvSpec) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return call_fused(spec, x, w, b, backend="cuda")

    return run


def test_first_and_second_derivatives(spec: ConvSpec, generator: torch.Generator) -> None:
    inputs = operands(spec, generator)
    with cudasim.simulated() as simulator:
        assert torch.autograd.gradcheck(on_cuda(spec), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(on_cuda(spec), inputs, fast_mode=True)
        assert any("_f64" in name for name in simulator.launched)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("n", [0, 2])
def test_memory_format_is_torchs(spec: ConvSpec, last: bool, n: int) -> None:
    """channels_last if input or weight is, an empty batch included."""
    spec = replace(spec, n=n, c_in=8, c_out=8)
    tensors = spec.make_tensors(
        torch.float16, input_layout="channels_last" if last else "contiguous"
    )
    with cudasim.simulated():
        y = call_fused(spec, tensors.input, tensors.weight, tensors.bias, backend="cuda")
    function = F.conv_transpose2d if spec.transposed else F.conv2d
    expected = function(tensors.input.float(), tensors.weight.float(), **spec.attributes)
    assert y.shape == expected.shape
    assert y.stride() == expected.stride()


def test_no_input_channels_give_the_activated_bias() -> None:
    """The plain operator; conv2d_act gives torch's result, which is empty."""
    bias = torch.tensor([1.0, -2.0])
    x, w = torch.zeros(1, 0, 3, 4), torch.zeros(2, 0, 1, 1)
    with cudasim.simulated():
        y = torch.ops.segpose.conv2d_act(x, w, bias, (1, 1), (0, 0), (1, 1), 1, 0.01)
    expected = F.leaky_relu(bias).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    torch.testing.assert_close(y, expected)


def test_unbatched_and_autocast() -> None:
    x, w = torch.randn(8, 5, 6), torch.randn(8, 8, 3, 3)
    with cudasim.simulated(), torch.autocast("cpu", torch.bfloat16):
        y = conv_transpose2d_act(x, w, activation="none", backend="cuda")
    assert (y.dim(), y.dtype) == (3, torch.bfloat16)
    torch.testing.assert_close(y.float(), F.conv_transpose2d(x[None], w)[0], rtol=2e-2, atol=0.3)


def test_modules_train(generator: torch.Generator) -> None:
    """Two fused modules in a row, one step of SGD, against torch's own layers."""
    torch.manual_seed(3)
    mine = nn.Sequential(
        Conv2dAct(3, 8, 3, stride=2, padding=1, activation="relu", backend="cuda"),
        ConvTranspose2dAct(8, 2, 2, stride=2, activation="none", backend="cuda"),
    )
    theirs = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 2, 2, stride=2)
    )
    for ours, torchs in zip((mine[0], mine[1]), (theirs[0], theirs[2]), strict=True):
        torchs.load_state_dict(ours.state_dict())
    x, target = (torch.randn(2, c, 6, 8, generator=generator) for c in (3, 2))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for model in (mine, theirs):
            with cudasim.simulated():
                F.mse_loss(model(x), target).backward()
    finally:
        torch.backends.cudnn.allow_tf32 = before
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_tf32_follows_torchs_switch() -> None:
    x, w = torch.randn(1, 32, 8, 8), torch.randn(64, 32, 3, 3)
    before = torch.backends.cudnn.allow_tf32
    names: dict[bool, Any] = {}
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            with cudasim.simulated() as simulator:
                conv2d_act(x, w, backend="cuda")
            names[allowed] = simulator.launched
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert any("mma_tf32" in name for name in names[True])
    assert not any("tf32" in name for name in names[False])


def test_segnet_forward_and_backward(generator: torch.Generator) -> None:
    """The lecture's model, rewritten by optimize(), on one image."""
    torch.manual_seed(1)
    model = SegNet(10)
    expected_model = SegNet(10)
    expected_model.load_state_dict(model.state_dict())
    optimize(model, backend="cuda")
    x = torch.randn(1, 1, 28, 28, generator=generator)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with cudasim.simulated() as simulator:
            y = model(x)
            y.square().mean().backward()
    finally:
        torch.backends.cudnn.allow_tf32 = before
    expected = expected_model(x)
    expected.square().mean().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert simulator.report.findings == []


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 8, 1 << 15, 1 << 16), "pixels of the activation must be below")],
)
def test_extents_beyond_32_bits_are_refused(shape: tuple[int, ...], words: str) -> None:
    x = torch.zeros(1, dtype=torch.float16).expand(shape)
    with cudasim.simulated(), pytest.raises(RuntimeError, match=words):
        conv2d_act(x, torch.zeros(1, 8, 1, 1, dtype=torch.float16), backend="cuda")
