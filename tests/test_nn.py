# SPDX-License-Identifier: BSD-3-Clause
"""The modules against torch.nn: constructors, state_dict, padding modes, output sizes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segpose_kernels import Conv2dAct, ConvTranspose2dAct
from segpose_kernels.reference import activate

ACTIVATIONS = ("none", "relu", "leaky_relu")

CONVS: dict[str, dict[str, Any]] = {
    "defaults": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated-grouped": {"kernel_size": 3, "dilation": 2, "groups": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect-same": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"},
}

TRANSPOSED: dict[str, dict[str, Any]] = {
    "defaults": {"kernel_size": 3},
    "doubling": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "mixed": {"kernel_size": (2, 4), "stride": (2, 1), "dilation": (1, 2), "groups": 2},
    "no-bias": {"kernel_size": 2, "stride": 2, "bias": False},
}


def twin(module: nn.Module, plain: nn.Module) -> None:
    """Give both the same parameters, through the state_dict."""
    plain.load_state_dict(module.state_dict(), strict=True)


def compare(module: nn.Module, plain: nn.Module, x: Tensor, activation: str, *rest: Any) -> None:
    """Output and every gradient, by name."""
    twin(module, plain)
    x.requires_grad_()
    y = module(x, *rest)
    expected = activate(plain(x, *rest), activation, 0.1)
    torch.testing.assert_close(y, expected, msg=lambda text: f"output: {text}")
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, *module.parameters()), grad)
    theirs = torch.autograd.grad(expected, (x, *plain.parameters()), grad)
    names = ["input", *dict(module.named_parameters())]
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"grad_{name}: {text}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arguments", CONVS.values(), ids=CONVS)
def test_conv2d_act_is_torchs_layer_and_activation(
    arguments: dict[str, Any], activation: str
) -> None:
    double = {"dtype": torch.float64}
    module = Conv2dAct(4, 6, **arguments, **double, activation=activation, negative_slope=0.1)
    plain = nn.Conv2d(4, 6, **arguments, **double)
    compare(module, plain, torch.randn(2, 4, 9, 8, **double), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arguments", TRANSPOSED.values(), ids=TRANSPOSED)
def test_conv_transpose2d_act_is_torchs_layer_and_activation(
    arguments: dict[str, Any], activation: str
) -> None:
    double = {"dtype": torch.float64}
    module = ConvTranspose2dAct(
        4, 6, **arguments, **double, activation=activation, negative_slope=0.1
    )
    plain = nn.ConvTranspose2d(4, 6, **arguments, **double)
    compare(module, plain, torch.randn(2, 4, 5, 4, **double), activation)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Conv2dAct, nn.Conv2d), (ConvTranspose2dAct, nn.ConvTranspose2d)]
)
def test_constructor_arguments_are_torchs_and_three_keywords(ours: type, theirs: type) -> None:
    mine, torchs = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(mine)[: len(torchs)] == list(torchs)
    for name, parameter in torchs.items():
        assert mine[name].default == parameter.default, name
    assert list(mine)[len(torchs) :] == ["activation", "negative_slope", "backend"]
    assert all(mine[n].kind is inspect.Parameter.KEYWORD_ONLY for n in list(mine)[len(torchs) :])
    assert issubclass(ours, theirs)


def test_state_dict_keys_and_shapes_are_torchs() -> None:
    pairs = [
        (Conv2dAct(3, 6, (3, 2), groups=3), nn.Conv2d(3, 6, (3, 2), groups=3)),
        (ConvTranspose2dAct(4, 6, 2, groups=2), nn.ConvTranspose2d(4, 6, 2, groups=2)),
        (Conv2dAct(3, 6, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)),
    ]
    for module, plain in pairs:
        mine, torchs = module.state_dict(), plain.state_dict()
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in torchs.items()}
        plain.load_state_dict(mine, strict=True)
        module.load_state_dict(plain.state_dict(), strict=True)


def test_initialisation_is_torchs() -> None:
    torch.manual_seed(3)
    module = Conv2dAct(3, 4, 3)
    torch.manual_seed(3)
    plain = nn.Conv2d(3, 4, 3)
    assert torch.equal(module.weight, plain.weight)
    assert module.bias is not None
    assert plain.bias is not None
    assert torch.equal(module.bias, plain.bias)


@pytest.mark.parametrize("output_size", [(10, 11), (11, 11), [9, 10], (2, 6, 11, 10)], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_output_size(output_size: Any, batched: bool) -> None:
    double = {"dtype": torch.float64}
    arguments: dict[str, Any] = {"kernel_size": 3, "stride": (3, 3), "dilation": (1, 1)} | double
    module = ConvTranspose2dAct(4, 6, **arguments, activation="relu")
    plain = nn.ConvTranspose2d(4, 6, **arguments)
    x = torch.randn(*((2, 4, 3, 3) if batched else (4, 3, 3)), **double)
    if not batched and len(output_size) == 4:
        output_size = output_size[1:]
    twin(module, plain)
    y = module(x, output_size)
    torch.testing.assert_close(y, plain(x, output_size).relu())
    assert y.shape[-2:] == tuple(output_size)[-2:]
    assert torch.equal(module(x, output_size=output_size), y)


def test_output_size_out_of_range_is_torchs_message() -> None:
    module = ConvTranspose2dAct(3, 4, 3, stride=2, padding=1)
    expected = r"requested an output size of \[40, 40\], but valid sizes range from \[15, 15\] to"
    with pytest.raises(ValueError, match=expected):
        module(torch.randn(1, 3, 8, 8), output_size=(40, 40))
    with pytest.raises(ValueError, match="output_size must have 2 or 4 elements"):
        module(torch.randn(1, 3, 8, 8), output_size=(40,))


def test_pickle_and_deepcopy_keep_everything() -> None:
    module = Conv2dAct(3, 4, 3, activation="leaky_relu", negative_slope=0.3, backend="aten")
    x = torch.randn(1, 3, 5, 5)
    for clone in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert (clone.activation, clone.negative_slope, clone.backend) == (
            "leaky_relu",
            0.3,
            "aten",
        )
        assert torch.equal(clone(x), module(x))


def test_repr_names_activation_and_an_explicit_backend() -> None:
    text = repr(Conv2dAct(3, 4, 3, stride=2, negative_slope=0.2))
    assert text == (
        "Conv2dAct(3, 4, kernel_size=(3, 3), stride=(2, 2), activation=leaky_relu, "
        "negative_slope=0.2)"
    )
    text = repr(ConvTranspose2dAct(3, 4, 3, activation="relu", backend="cpu"))
    assert text.endswith("activation=relu, backend=cpu)")


def test_device_and_dtype() -> None:
    module = ConvTranspose2dAct(3, 4, 3, device="meta", dtype=torch.bfloat16)
    assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.bfloat16)
    assert module(torch.empty(1, 3, 5, 5, device="meta", dtype=torch.bfloat16)).shape[1] == 4


# Constructor errors --------------------------------------------------------------------------

SHARED_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"padding": -1}, "negative padding is not supported: padding must be >= 0, got -1"),
    ({"padding": (0, -2)}, r"padding must be >= 0, got \(0, -2\)"),
    ({"stride": 0}, "non-positive stride is not supported: stride must be >= 1, got 0"),
    ({"dilation": (1, 0)}, r"dilation should be greater than zero: .* got \(1, 0\)"),
    ({"kernel_size": 0}, "kernel_size must be >= 1, got 0"),
    ({"groups": 0}, "groups must be a positive integer, got 0"),
    ({"groups": 3}, "in_channels must be divisible by groups, got in_channels=4, groups=3"),
    ({"groups": 4}, "out_channels must be divisible by groups, got out_channels=6, groups=4"),
    ({"stride": (1, 2, 3)}, r"stride must be an int or a tuple of 2 ints, got \(1, 2, 3\)"),
    ({"stride": 1.5}, "stride must be an int or a tuple of 2 ints, got 1.5"),
    ({"activation": "gelu"}, "activation must be 'none', 'relu' or 'leaky_relu', got 'gelu'"),
    ({"out_channels": 0}, "out_channels must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), SHARED_ERRORS, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("kind", [Conv2dAct, ConvTranspose2dAct])
def test_constructors_refuse(kind: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*{message}"):
        kind(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "same"}, "padding='same' is not supported by a transposed convolution"),
        ({"output_padding": -1}, "negative output_padding is not supported"),
        (
            {"output_padding": 2, "stride": 2},
            r"output padding must be smaller than either stride or dilation: .* at most \(1, 1\)",
        ),
        ({"padding_mode": "reflect"}, 'Only "zeros" padding mode is supported'),
    ],
    ids=lambda v: str(v)[:30],
)
def test_transposed_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvTranspose2dAct(4, 6, 3, **arguments)


def test_output_padding_below_dilation_is_accepted() -> None:
    module = ConvTranspose2dAct(2, 3, 3, stride=2, dilation=3, output_padding=2)
    assert module(torch.randn(1, 2, 4, 4)).shape == (1, 3, 15, 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "full"}, "Invalid padding string 'full'"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_conv_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conv2dAct(4, 6, 3, **arguments)
