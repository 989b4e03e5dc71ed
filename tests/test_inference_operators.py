# SPDX-License-Identifier: BSD-3-Clause
"""The operators under inference mode by themselves: prepared convolutions, the 2x2 pool, memory
formats, and all of them in one call.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inference_helpers import run_steps

from segpose_kernels.backends import LIBRARY
from segpose_kernels.pooling import contiguous
from segpose_kernels.swap.blueprint import (
    CONV,
    COPY,
    FIXED,
    GIVEN,
    POOL,
    RESULT,
    SLICE,
    TRANSPOSE,
)

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 21])
def test_pool_operator(dtype: torch.dtype, channels: int) -> None:
    """torch's answer for NaN, infinities, zeros of both signs and odd sizes, in slices too."""
    x = torch.randn(2, channels, 7, 10).to(dtype)
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf"), -0.0, 0.0):
        x[torch.rand_like(x) < 0.05] = value
    x[0, :, :2, :2] = -float("inf")
    buffer = torch.zeros(2, channels + 5, 3, 5, dtype=dtype).to(memory_format=torch.channels_last)
    out = buffer[:, 2 : 2 + channels]
    torch.ops.segpose.max_pool2x2(x.to(memory_format=torch.channels_last), out)
    torch.testing.assert_close(out, F.max_pool2d(x, 2), rtol=0, atol=0, equal_nan=True)
    assert not buffer[:, :2].any()
    assert not buffer[:, 2 + channels :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 10, 28, 28), (3, 33, 17, 13), (1, 1, 5, 1), (2, 64, 1, 1)])
def test_contiguous_results(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As torch's copies, from slices of more channels too."""
    n, c, h, w = shape
    wide = torch.randn(n, c + 3, h, w).to(dtype).to(memory_format=torch.channels_last)
    for x in (wide[:, 3:].contiguous(memory_format=torch.channels_last), wide[:, 2:-1]):
        out = torch.empty(shape, dtype=dtype)
        run_steps([TRANSPOSE, 0, 0, 1], [x, out])
        assert torch.equal(out, x)
        found = contiguous(x)
        assert found.is_contiguous()
        assert torch.equal(found, x)


def test_contiguous_results_of_any_strides() -> None:
    """Those of extents of one say nothing."""
    for shape, strides in (((2, 8, 1, 5), (40, 1, 3, 8)), ((2, 8, 5, 1), (40, 1, 8, 3))):
        x = torch.randn(80).as_strided(shape, strides)
        assert torch.equal(contiguous(x), x)
        out = torch.empty(shape)
        run_steps([TRANSPOSE, 0, 0, 1], [x, out])
        assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_in_one_call(dtype: torch.dtype) -> None:
    """A convolution into a concatenation, a copy beside it, a pool, and a contiguous result."""
    ops = torch.ops.segpose
    x, other = torch.randn(2, 3, 8, 6).to(dtype), torch.randn(2, 5, 8, 6).to(dtype)
    weight = torch.randn(4, 3, 3, 3).to(dtype)
    attributes = ([1, 1], [1, 1], [0, 0], [1, 1], 1, False, 0.0, 1 << 20, [])
    handle = ops.prepare_conv(weight, None, list(x.shape), *attributes)
    joined = torch.empty(2, 9, 8, 6, dtype=dtype).to(memory_format=torch.channels_last)
    pooled = torch.empty(2, 9, 4, 3, dtype=dtype).to(memory_format=torch.channels_last)
    out = torch.empty(2, 9, 4, 3, dtype=dtype)
    steps = [
        (CONV, handle, 0, 3),
        (COPY, 0, 1, 4),
        (POOL, 0, 2, 5),
        (TRANSPOSE, 0, 5, 6),
    ]
    code = [number for step in steps for number in step]
    assert run_steps(code, [x, other, joined, joined[:, :4], joined[:, 4:], pooled, out])
    expected = torch.cat([F.conv2d(x, weight, padding=1).relu(), other], 1)
    torch.testing.assert_close(joined, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(joined[:, 4:], other)
    assert torch.equal(out, F.max_pool2d(joined, 2))
    assert out.is_contiguous()
    ops.release_prepared(handle)


@pytest.mark.parametrize("change", ["value", "memory", "bias", "algorithm"])
def test_steps_do_not_run_with_what_is_no_longer_so(change: str) -> None:
    """Nothing is written where a weight or the choice of algorithms has changed since."""
    ops = torch.ops.segpose
    x = torch.randn(1, 3, 5, 4).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    attributes = ([1, 1], [1, 1], [0, 0], [1, 1], 1, False, 0.0, 1 << 20, [])
    handle = ops.prepare_conv(weight, bias, list(x.shape), *attributes)
    out = torch.zeros(1, 4, 5, 4).to(memory_format=torch.channels_last)
    previous = ops.set_algorithm("")
    try:
        if change == "value":
            weight.data[0, 0, 0, 0] += 1
        elif change == "memory":
            weight.data = weight.data.clone()
        elif change == "bias":
            bias.data[0] += 1
        else:
            ops.set_algorithm("igemm")
        assert not run_steps([CONV, handle, 0, 1], [x, out])
        assert not out.any()
        assert ops.first_stale([handle]) == 0
    finally:
        ops.set_algorithm(previous)
        ops.release_prepared(handle)


def test_sequences_allocate_their_results() -> None:
    """A given tensor into channels of a result, the rest copied from one that is there; that result
    in the other memory format too.
    """
    ops = torch.ops.segpose
    x, other = torch.randn(2, 3, 8, 6), torch.randn(2, 5, 8, 6)
    weight = torch.randn(4, 3, 3, 3)
    attributes = ([1, 1], [1, 1], [0, 0], [1, 1], 1, False, 0.0, 1 << 20, [])
    conv = ops.prepare_conv(weight, None, list(x.shape), *attributes)
    places = [
        *(RESULT, 1, 2, 9, 8, 6, 1),
        *(RESULT, 1, 2, 9, 8, 6, 0),
        *(SLICE, 0, 0, 4, 0, 0, 0),
        *(SLICE, 0, 4, 5, 0, 0, 0),
        *(FIXED, 0, 0, 0, 0, 0, 0),
        *(GIVEN, 0, 0, 0, 0, 0, 0),
    ]
    code = [*(CONV, conv, 5, 2), *(COPY, 0, 4, 3), *(TRANSPOSE, 0, 0, 1)]
    handle = ops.prepare_sequence(code, places, [other, torch.empty(0)])
    for _ in range(2):
        x = torch.randn_like(x)
        done, (joined, planes) = ops.run_sequence(handle, [x])
        assert done
        expected = torch.cat([F.conv2d(x, weight, padding=1).relu(), other], 1)
        torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-4)
        assert joined.is_contiguous(memory_format=torch.channels_last)
        assert planes.is_contiguous()
        assert torch.equal(planes, joined)
    ops.release_prepared(conv)
    done, results = ops.run_sequence(handle, [x])  # its packed filter is gone
    assert not done
    assert not results
    ops.release_sequence(handle)
    with pytest.raises(RuntimeError, match=f"no sequence has the handle {handle}"):
        ops.run_sequence(handle, [x])


def test_sequences_refuse_what_does_not_fit() -> None:
    x = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="4 numbers for each step, got 3"):
        run_steps([COPY, 0, 0], [x])
    with pytest.raises(RuntimeError, match="uses place 1 of 1"):
        run_steps([COPY, 0, 0, 1], [x])
    with pytest.raises(RuntimeError, match="no step has the kind 9"):
        run_steps([9, 0, 0, 0], [x])
    with pytest.raises(RuntimeError, match="no prepared convolution has the handle -1"):
        run_steps([CONV, -1, 0, 0], [x])
    with pytest.raises(RuntimeError, match="same shape and dtype"):
        run_steps([COPY, 0, 0, 1], [x, x[:, :2]])
    with pytest.raises(RuntimeError, match="output must be contiguous"):
        run_steps([TRANSPOSE, 0, 0, 1], [x, torch.empty_like(x)])
    with pytest.raises(RuntimeError, match="input must be channels_last"):
        run_steps([TRANSPOSE, 0, 0, 1], [x.contiguous(), x.contiguous()])
    with pytest.raises(RuntimeError, match="must be 4-D, got 3 dimensions"):
        run_steps([COPY, 0, 0, 0], [x[0]])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([FIXED, 0, 0], "7 numbers for each place, got 3"),
        ([5, 0, 0, 0, 0, 0, 0], "no place has the kind 5"),
        ([FIXED, 1, 0, 0, 0, 0, 0], "uses fixed tensor 1 of 1"),
        ([RESULT, -1, 1, 3, 4, 4, 1], "uses fixed tensor -1 of 1"),
        ([RESULT, 0, 1, -3, 4, 4, 1], "must not be negative, got -3"),
        ([GIVEN, -1, 0, 0, 0, 0, 0], "negative number -1"),
        ([SLICE, 0, 0, 1, 0, 0, 0], "uses place 0 of 0"),
        ([GIVEN, 1, 0, 0, 0, 0, 0], "uses tensor 1 of 1 that are given"),
        ([FIXED, 0, 0, 0, 0, 0, 0, SLICE, 0, 2, 2, 0, 0, 0], "channels 2 to 4 of 3"),
    ],
)
def test_sequences_refuse_wrong_places(places: list[int], message: str) -> None:
    ops = torch.ops.segpose
    x = torch.randn(1, 3, 4, 4)

    def run() -> None:
        ops.run_sequence(ops.prepare_sequence([], places, [x]), [x])

    with pytest.raises(RuntimeError, match=message):
        run()


def test_raw_operators_refuse_what_does_not_fit() -> None:
    ops = torch.ops.segpose
    w, x = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 8, 8)
    attributes = ([1, 1], [1, 1], [0, 0], [1, 1], 1, False, 0.0, 1 << 20, [])
    handle = ops.prepare_conv(w, None, [1, 3, 8, 8], *attributes)
    out = torch.empty(1, 4, 8, 8)
    with pytest.raises(RuntimeError, match="input must have the prepared shape 1 x 3 x 8 x 8"):
        ops.run_prepared(handle, x[:, :, :7], out)
    with pytest.raises(RuntimeError, match="output must have the prepared shape 1 x 4 x 8 x 8"):
        ops.run_prepared(handle, x, out[:, :3])
    with pytest.raises(RuntimeError, match="input must have the dtype of weight"):
        ops.run_prepared(handle, x.double(), out)
    ops.release_prepared(handle)
    with pytest.raises(RuntimeError, match="no prepared convolution has the handle"):
        ops.run_prepared(handle, x, out)
    with pytest.raises(RuntimeError, match="half the extents"):
        ops.max_pool2x2(x, torch.empty(1, 3, 4, 5))
    with pytest.raises(RuntimeError, match="channels of input and output must be adjacent"):
        ops.max_pool2x2(x, torch.empty(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="empty problem"):
        ops.prepare_conv(w, None, [0, 3, 8, 8], *attributes)
