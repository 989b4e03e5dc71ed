# SPDX-License-Identifier: BSD-3-Clause
"""Messages for bad input: torch's classes and key phrases, with argument, value, rule and fix."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import checks, conv2d_act, conv_transpose2d_act
from segpose_kernels.autograd import native_ops

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "conv2d": conv2d_act,
    "conv_transpose2d": conv_transpose2d_act,
}
TORCH: dict[str, Callable[..., Tensor]] = {
    "conv2d": F.conv2d,
    "conv_transpose2d": F.conv_transpose2d,
}


@dataclass
class Case:
    """A call that must fail; `phrases` are all in the message, torch's key phrase first."""

    name: str
    op: str
    phrases: tuple[str, ...]
    x: tuple[int, ...] = (2, 3, 8, 8)
    w: tuple[int, ...] = ()
    b: tuple[int, ...] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    torch_agrees: bool = True  # torch raises too, with the first phrase in its message

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        w = self.w or ((4, 3, 3, 3) if self.op == "conv2d" else (3, 4, 3, 3))
        bias = None if self.b is None else torch.randn(self.b)
        return torch.randn(self.x), torch.randn(w), bias

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def both(name: str, phrases: tuple[str, ...], **rest: Any) -> list[Case]:
    return [Case(name, op, phrases, **rest) for op in FUNCTIONS]


CONV, CONV_T = "conv2d", "conv_transpose2d"
CASES = [
    Case("2d-input", CONV, ("Expected 3D (unbatched) or 4D (batched) input to conv2d, but got "
                            "input of size: [8, 8]",), x=(8, 8)),
    Case("5d-input", CONV_T, ("Expected 3D (unbatched) or 4D (batched) input to conv_transpose2d",
                              "[1, 2, 3, 8, 8]"), x=(1, 2, 3, 8, 8)),
    Case("3d-weight", CONV, ("Expected 3-dimensional input for 3-dimensional weight",
                             "weight must be 4-D (out, in/groups, kH, kW), got [3, 3, 3]"),
         w=(3, 3, 3), torch_agrees=False),
    Case("3d-weight", CONV_T, ("weight must be 4-D (in, out/groups, kH, kW), got [3, 3, 3]",),
         w=(3, 3, 3), torch_agrees=False),
    Case("channels", CONV, ("expected input[2, 5, 8, 8] to have 3 channels, but got 5 channels "
                            "instead", "input.size(1)=5 but weight.size(1)=3"), x=(2, 5, 8, 8)),
    Case("channels", CONV_T, ("Given transposed=1, weight of size [3, 4, 3, 3], expected "
                              "input[2, 5, 8, 8] to have 3 channels, but got 5 channels instead",
                              "input.size(1)=5 but weight.size(0)=3"), x=(2, 5, 8, 8)),
    Case("groups-channels", CONV, ("to have 6 channels, but got 3 channels instead", "groups=2"),
         arguments={"groups": 2}),
    Case("bias-length", CONV, ("expected bias to be 1-dimensional with 4 elements, but got bias of "
                               "size [7] instead", "None"), b=(7,)),
    Case("bias-rank", CONV_T, ("Given transposed=1, weight of size [3, 4, 3, 3], expected bias to "
                               "be 1-dimensional with 4 elements, but got bias of size [4, 1] "
                               "instead",), b=(4, 1)),
    Case("groups-divide", CONV, ("expected weight to be divisible by 3 at dimension 0",
                                 "groups=3", "[4, 3, 3, 3]"),
         x=(2, 9, 8, 8), arguments={"groups": 3}),
    Case("groups-divide", CONV_T, ("expected weight to be divisible by 2 at dimension 0",
                                   "groups=2", "[3, 4, 3, 3]"), arguments={"groups": 2}),
    Case("groups-many", CONV, ("expected weight to be at least 5 at dimension 0",),
         x=(2, 15, 8, 8), arguments={"groups": 5}),
    *both("groups-zero", ("non-positive groups is not supported", "got 0"),
          arguments={"groups": 0}),
    *both("padding-negative", ("negative padding is not supported", "(0, -1)", "width"),
          arguments={"padding": (0, -1)}),
    *both("stride-zero", ("non-positive stride is not supported", "(0, 1)", "height"),
          arguments={"stride": (0, 1)}),
    *both("dilation-negative", ("dilation should be greater than zero", "(-1, -1)"),
          arguments={"dilation": -1}),
    *both("dilation-zero", ("dilation must be >= 1, got (0, 0)",), arguments={"dilation": 0},
          torch_agrees=False),
    Case("output_padding", CONV_T, ("output padding must be smaller than either stride or dilation",
                                    "(2, 2)", "stride=(2, 2)", "dilation=(1, 1)",
                                    "at most (1, 1)"),
         arguments={"stride": 2, "output_padding": 2}),
    Case("output_padding-negative", CONV_T, ("negative output_padding is not supported",
                                             "(-1, -1)"), arguments={"output_padding": -1}),
    Case("small-output", CONV_T, ("Given input size per channel: (1 x 1). Calculated output size "
                                  "per channel: (-3 x -3). Output size is too small",
                                  "(in - 1)*stride"), x=(1, 3, 1, 1), arguments={"padding": 3}),
    Case("kernel-over-input", CONV, ("Calculated padded input size per channel: (2 x 2). Kernel "
                                     "size: (7 x 7). Kernel size can't be greater than actual "
                                     "input size", "effective"),
         x=(1, 3, 2, 2), arguments={"dilation": 3}),
    *both("stride-length", ("expected stride to be a single integer value or a list of 2 values to "
                            "match the convolution dimensions, but got stride=[1, 2, 3]",),
          arguments={"stride": (1, 2, 3)}),
    Case("empty-spatial", CONV_T, ("Only zero batch or zero channel inputs are supported, but got "
                                   "input shape: [2, 3, 0, 8]",), x=(2, 3, 0, 8)),
    Case("kernel-zero", CONV, ("kernel size must be at least 1",), w=(4, 3, 0, 3),
         torch_agrees=False),
    Case("no-output-channel", CONV_T, ("no output channel",), w=(3, 0, 3, 3), torch_agrees=False),
    Case("no-output-channel", CONV, ("expected weight to be at least 1 at dimension 0",),
         w=(0, 3, 3, 3)),
    Case("padding-string", CONV, ("Invalid padding string: 'full'",),
         arguments={"padding": "full"}),
    Case("same-strided", CONV, ("padding='same' is not supported for strided convolutions",),
         arguments={"padding": "same", "stride": 2}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_message_names_argument_value_and_rule(case: Case) -> None:
    x, w, b = case.tensors()
    with pytest.raises(RuntimeError) as caught:
        FUNCTIONS[case.op](x, w, b, **case.arguments)
    message = str(caught.value)
    assert message.startswith(f"segpose_kernels.{case.op}: ")
    for phrase in case.phrases:
        assert phrase in message
    with pytest.raises(RuntimeError) as theirs:
        TORCH[case.op](x, w, b, **case.arguments)
    if case.torch_agrees:
        assert re.sub(r"\s+", " ", case.phrases[0]) in re.sub(r"[\[\]]{2}", "", str(theirs.value))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_tensors_raise_the_same(case: Case) -> None:
    x, w, b = (None if t is None else t.to("meta") for t in case.tensors())
    with pytest.raises(RuntimeError) as caught:
        FUNCTIONS[case.op](x, w, b, **case.arguments)
    assert all(phrase in str(caught.value) for phrase in case.phrases)


# From torch.testing's error inputs of conv2d: several rules broken at once; torch's order decides.
ERROR_INPUTS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = [
    ((1, 1, 4, 4), (1, 2, 2, 3), {"stride": (-1,)}, "non-positive stride is not supported"),
    ((1, 1, 4, 3), (1, 2, 2, 4), {"padding": (-1,)}, "negative padding is not supported"),
    ((1, 1, 4, 2), (1, 1, 2, 5), {"dilation": (-1,)}, "dilation should be greater than zero"),
    (
        (1, 1, 4, 3),
        (1, 2, 2),
        {"padding": "same"},
        "Expected 3-dimensional input for 3-dimensional weight",
    ),
    (
        (2, 2, 4, 3),
        (2, 2, 1, 3),
        {"groups": 3},
        "expected weight to be at least 3 at dimension 0",
    ),
    (
        (2, 2, 4, 3),
        (2, 2, 1, 3),
        {"padding": "same", "groups": 3},
        "expected weight to be at least 3 at dimension 0",
    ),
    (
        (2, 2, 4, 5),
        (2, 2, 1, 4),
        {"padding": "same", "groups": -1},
        "non-positive groups is not supported",
    ),
    (
        (2, 2, 4, 3),
        (2, 2, 4, 3),
        {"padding": "same", "groups": 0},
        "non-positive groups is not supported",
    ),
]


@pytest.mark.parametrize(("x", "w", "arguments", "phrase"), ERROR_INPUTS)
def test_torchs_error_inputs(
    x: tuple[int, ...], w: tuple[int, ...], arguments: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(phrase)):
        conv2d_act(torch.randn(x), torch.randn(w), torch.randn(w[0]), **arguments)


NUMBERS = [
    (op, name)
    for op in FUNCTIONS
    for name in ("stride", "padding", "dilation", "groups", "output_padding")
    if name != "output_padding" or op == CONV_T
]


@pytest.mark.parametrize("value", [2**31, 2**62, 2**63 - 1, 2**63, 2**70])
@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_numbers_that_kernels_cannot_count_with(op: str, name: str, value: int) -> None:
    """On one axis at a time, for tensors with and without data."""
    found = [value] if name == "groups" else [(value, 1), (1, value)]
    for device, given in itertools.product(("cpu", "meta"), found):
        x, w = torch.zeros(1, 2, 4, 4, device=device), torch.zeros(2, 2, 2, 2, device=device)
        message = f"{name} is too large: {name} must be <= 2147483647, got {given}"
        with pytest.raises(ValueError, match=re.escape(message)):
            FUNCTIONS[op](x, w, **{name: given})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "name"), [(CONV, "padding"), (CONV_T, "stride"), (CONV_T, "dilation")]
)
def test_results_whose_bytes_cannot_be_counted(op: str, name: str, device: str) -> None:
    x, w = torch.zeros(1, 2, 4, 4, device=device), torch.zeros(2, 2, 2, 2, device=device)
    with pytest.raises(
        ValueError, match=r"the result is too large: .* got size \[1, 2, \d+, \d+\]"
    ):
        FUNCTIONS[op](x, w, **{name: 2**31 - 1})


@pytest.mark.parametrize("op", FUNCTIONS)
def test_extents_without_memory(op: str) -> None:
    """An expanded tensor may have any."""
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**31, 2**31)
    with pytest.raises(ValueError, match="the result is too large"):
        FUNCTIONS[op](x, torch.zeros(1, 1, 1, 1))


def test_the_largest_stride() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 2, 2)
    y = conv2d_act(x, w, stride=2**31 - 1, activation="none")
    torch.testing.assert_close(y, F.conv2d(x, w, stride=2**31 - 1))


# Tensors: types, dtypes, devices, layouts ----------------------------------------------------


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "value"), [("input", None), ("input", np.ones((1, 3, 8, 8))), ("weight", 3.0)]
)
def test_arguments_that_are_no_tensors(op: str, name: str, value: object) -> None:
    arguments: dict[str, Any] = {
        "input": torch.randn(1, 3, 8, 8),
        "weight": torch.randn(3, 3, 3, 3),
    }
    arguments[name] = value
    expected = f"argument '{name}' must be Tensor, not {type(value).__name__}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        FUNCTIONS[op](**arguments)


def test_bias_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="argument 'bias' must be Tensor or None, not float"):
        conv2d_act(torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("stride", 1.5, "float"),
        ("stride", (1.0, 1.0), "float"),
        ("stride", True, "bool"),
        ("stride", None, "NoneType"),
        ("dilation", "2", "str"),
        ("groups", 1.0, "float"),
        ("groups", True, "bool"),
        ("negative_slope", "0.1", "str"),
    ],
)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_wrong_types_of_numbers(op: str, name: str, value: object, found: str) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(TypeError, match=rf"argument '{name}' must be .*, not {found}"):
        FUNCTIONS[op](torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3), **arguments)


def test_padding_string_on_transposed_convolution() -> None:
    padding: Any = "same"
    with pytest.raises(TypeError, match="argument 'padding' must be an int or a tuple of 2 ints"):
        conv_transpose2d_act(torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3), padding=padding)


def test_numpy_integers_are_integers() -> None:
    x, w = torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3)
    stride: Any = np.int64(2)
    assert torch.equal(conv2d_act(x, w, stride=stride), conv2d_act(x, w, stride=2))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_dtype_mismatch_names_both(op: str) -> None:
    x, w = torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3)
    with pytest.raises(RuntimeError, match="should be the same: input is float64, weight float32"):
        FUNCTIONS[op](x.double(), w)
    with pytest.raises(RuntimeError, match="should be the same: input is float32, bias float64"):
        FUNCTIONS[op](x, w, torch.randn(3).double())


@pytest.mark.parametrize("op", FUNCTIONS)
def test_device_mismatch_names_both(op: str) -> None:
    x, w = torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3)
    with pytest.raises(RuntimeError, match="input is on cpu, weight on meta"):
        FUNCTIONS[op](x, w.to("meta"))
    with pytest.raises(RuntimeError, match="input is on cpu, bias on meta"):
        FUNCTIONS[op](x, w, torch.randn(3, device="meta"))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_sparse_tensors_are_refused(op: str) -> None:
    x, w = torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3)
    with pytest.raises(RuntimeError, match=r"input has layout torch.sparse_coo.*to_dense"):
        FUNCTIONS[op](x.to_sparse(), w)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_unsupported_dtypes_are_listed(op: str) -> None:
    x, w = torch.ones(1, 3, 8, 8).bool(), torch.ones(3, 3, 3, 3).bool()
    with pytest.raises(NotImplementedError, match=r"not implemented for 'Bool'.*supported dtypes"):
        FUNCTIONS[op](x, w)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_unknown_activation_and_backend(op: str) -> None:
    x, w = torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3)
    with pytest.raises(ValueError, match=r"activation must be .*, got 'gelu'"):
        FUNCTIONS[op](x, w, activation="gelu")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cudnn'"):
        FUNCTIONS[op](x, w, backend="cudnn")


# The checks against torch, and against themselves --------------------------------------------


def random_call(
    rng: np.random.Generator, op: str
) -> tuple[Tensor, Tensor, Tensor | None, list[Any]]:
    """A call near the border between valid and invalid."""

    def pick(*values: int) -> int:
        return int(rng.choice(values))

    groups = pick(1, 1, 1, 2, 2, 0)
    c_in, c_out = pick(2, 4, 4, 4, 3), pick(2, 4, 4, 3)
    inner = c_out if op == "conv_transpose2d" else c_in
    outer = c_in if op == "conv_transpose2d" else c_out
    if groups == 2 and rng.random() < 0.8:
        inner //= 2
    kernel = pick(1, 1, 2, 2, 3, 3, 0), pick(1, 2, 3)
    x = torch.randn(pick(0, 1, 2), c_in, pick(1, 2, 3, 4), pick(1, 2, 5))
    w = torch.randn(outer, inner, *kernel)
    b = torch.randn(pick(c_out, c_out, c_out, 1)) if rng.random() < 0.5 else None

    def pair(*values: int) -> tuple[int, int]:
        return pick(*values), pick(*values)

    stride = pair(1, 1, 1, 2, 2, 3, 3, 0)
    padding = pair(0, 0, 0, 0, 1, 1, 2, -1)
    dilation = pair(1, 1, 1, 1, 1, 2, 2, 0)
    if op == "conv2d":
        return x, w, b, [stride, padding, dilation, groups]
    return x, w, b, [stride, padding, pair(0, 0, 0, 0, 0, 1, 2, -1), groups, dilation]


def fails(call: Callable[..., object], *arguments: Any) -> bool:
    try:
        call(*arguments)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("op", FUNCTIONS)
def test_accepts_exactly_what_torch_accepts(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the expression on the good path never passes what the rules reject."""
    rng = np.random.default_rng(0)
    check = getattr(checks, f"check_{op}")
    accepted = 0
    for _ in range(1500):
        x, w, b, arguments = random_call(rng, op)
        quick = fails(check, x, w, b, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(checks, "_plainly_valid", lambda *_: False)
            walked = fails(check, x, w, b, *arguments)
        described = x.shape, w.shape, None if b is None else b.shape, arguments
        assert quick == walked, described
        # For an empty batch torch leaves out rules.
        x = x if len(x) else torch.randn(1, *x.shape[1:])
        try:
            expected = TORCH[op](x, w, b, *arguments).numel() == 0
        except RuntimeError:
            expected = True
        # torch leaves these two to oneDNN, which refuses or returns something empty.
        dilation = arguments[2] if op == "conv2d" else arguments[4]
        expected = expected or 0 in dilation or 0 in w.shape[2:]
        assert walked == expected, described
        accepted += not walked
    assert accepted > 50


@pytest.mark.parametrize("op", FUNCTIONS)
def test_plain_operators_raise_on_malformed_calls(op: str) -> None:
    """What does not pass through the public functions must not crash either."""
    native = native_ops[op]
    x, w = torch.randn(1, 5, 8, 8), torch.randn(3, 3, 3, 3)
    tail: tuple[Any, ...] = ((1, 1), (0, 0), (1, 1), 1, 0.1)
    if op == "conv_transpose2d":
        tail = ((1, 1), (0, 0), (0, 0), 1, (1, 1), 0.1)
    with pytest.raises(RuntimeError):
        native.forward(x, w, None, *tail)
    with pytest.raises(RuntimeError):
        native.forward(torch.randn(1, 3, 8, 8), w.double(), None, *tail)
