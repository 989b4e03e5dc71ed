# SPDX-License-Identifier: BSD-3-Clause
"""The operators under inference mode by themselves: prepared convolutions and the 2x2 pool."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from segpose_kernels.backends import LIBRARY

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
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
