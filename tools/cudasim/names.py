# SPDX-License-Identifier: BSD-3-Clause
"""Names of kernels as plans and the table of kernels write them."""

from __future__ import annotations

import re

_DTYPES = {"6__half": "f16", "13__nv_bfloat16": "bf16", "f": "f32", "d": "f64"}
_MANGLED = re.compile(
    r"_ZN7segpose4cuda(\d+)(.*)I(6__half|13__nv_bfloat16|f|d)((?:L[ib]\d+E)*)E[vE]"
)


def kernel_name(mangled: str) -> str:
    """`gather_mma_f16_128x64_narrow` for the mangled name of a kernel template's instance."""
    match = _MANGLED.match(mangled)
    if match is None:
        raise ValueError(f"not a kernel of csrc/cuda: {mangled}")
    length, rest, dtype, values = match.groups()
    base = rest[: int(length)]
    dtype = _DTYPES[dtype]
    numbers = [int(value) for value in re.findall(r"L[ib](\d+)E", values)]
    if base.endswith("_mma"):
        dtype = "tf32" if dtype == "f32" else dtype
        block_m, block_n, narrow, _ = numbers
        return f"{base}_{dtype}_{block_m}x{block_n}" + ("_narrow" if narrow else "")
    if base.endswith("_fma"):
        return f"{base}_{dtype}_{numbers[0]}x{numbers[1]}"
    if base == "direct":
        return f"{base}_{dtype}_{numbers[0]}" + ("_vector" if numbers[1] > 1 else "")
    if base == "depthwise":
        return f"{base}_{dtype}" + ("_vector" if numbers[0] > 1 else "")
    if base == "pack_filter":
        return f"{base}_{'tf32' if numbers[0] else dtype}"
    return f"{base}_{dtype}"
