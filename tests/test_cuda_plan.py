# SPDX-License-Identifier: BSD-3-Clause
"""Plans of the CUDA backend: pure, so every architecture is tested without one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from segpose_kernels import _plan
from segpose_kernels.swap import explain, optimize
from segpose_kernels.testing.gpu_problems import GPU_PROBLEMS
from segpose_kernels.testing.plans import problem_of
from segpose_kernels.testing.problems import (
    AUTOENCODER,
    CPM2DPOSE,
    KERNEL_PROBLEMS,
    SEGNET,
    TRANSPOSED,
    ConvSpec,
    by_name,
)

LAYERS = tuple(dict.fromkeys((*AUTOENCODER, *SEGNET, *CPM2DPOSE, *TRANSPOSED)))
ALL = tuple(spec for spec in (*KERNEL_PROBLEMS, *GPU_PROBLEMS, *LAYERS) if spec.n)
OPS = ("fprop", "dgrad", "wgrad")
DTYPES = ("float16", "bfloat16", "float32", "float64")
ARCHS = _plan.cuda_archs()
# Shared memory of a block (KiB, opted in) and of a multiprocessor: CUDA C++ Programming Guide.
SHARED = {"sm_80": (163, 164), "sm_86": (99, 100), "sm_89": (99, 100), "sm_120": (99, 100)}


def plan(
    spec: ConvSpec, op: str = "fprop", dtype: str = "float16", **options: Any
) -> _plan.CudaPlan:
    return _plan.cuda_plan(problem_of(spec), op, dtype, **options)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_every_problem_has_a_plan_that_fits(op: str, arch: str) -> None:
    per_block, per_sm = SHARED.get(arch, (227, 228))
    for spec, dtype, last in itertools.product(ALL, DTYPES, (False, True)):
        found = plan(spec, op, dtype, arch=arch, channels_last=last)
        line = str(found)
        assert "\n" not in line
        for word in (op, found.algorithm, dtype, arch):
            assert word in line
        assert found.shared_bytes <= per_block * 1024, line
        assert found.blocks_per_sm >= 1
        assert found.blocks_per_sm * (found.shared_bytes + 1024) <= per_sm * 1024, line
        assert found.threads <= 1024
        assert 1 <= found.splits <= 65535
        assert found.flops == spec.flops
        assert found.moved_bytes >= found.bytes > 0
        assert found.kernels


@pytest.mark.parametrize("spec", [s for s in ALL if s.groups == 1], ids=str)
def test_tiles_cover_the_gemm_once(spec: ConvSpec) -> None:
    """Blocks and K blocks reach every pixel, column and tap; padding is what the plan says."""
    problem = problem_of(spec)
    for op in OPS:
        found = plan(spec, op)
        block_m, block_n = found.tile
        pixels = {
            "fprop": spec.n * problem.p * problem.q,
            "dgrad": spec.n * problem.h * problem.w,
            "wgrad": problem.k,
        }[op]
        columns = {"fprop": problem.k, "dgrad": problem.c, "wgrad": problem.c}[op]
        if op == "wgrad":
            columns *= math.prod(spec.kernel)
            k_total = spec.n * problem.p * problem.q
            assert found.splits * found.k_per_split >= k_total
            assert (found.splits - 1) * found.k_per_split < k_total
        elif not found.shuffle:
            assert sum(phase.rows * phase.cols for phase in found.phases) * spec.n == pixels
        assert found.blocks * block_m * block_n >= pixels * columns
        if op == "fprop":
            assert found.issued_flops >= found.flops


def test_one_phase_for_each_residue_or_one_gemm() -> None:
    assert len(plan(by_name("transposed-k3s2"), "dgrad").phases) == 4
    for name in ("transposed-unet-up", "transposed-dcgan-1", "segnet-decoder1"):
        shuffled = plan(by_name(name), "dgrad")
        assert shuffled.shuffle
        assert len(shuffled.phases) == 1
        # Only the batch (16 of 64 rows) and 100 channels (of 128) are padded, never the taps.
        assert shuffled.issued_flops < 5.2 * shuffled.flops, str(shuffled)
    cropped = by_name("transposed-k2s2")  # kernel equals stride, but padding crops the patches
    assert not plan(cropped, "dgrad").shuffle


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("segnet-encoder1", "fprop"),  # 1 -> 16
        ("autoencoder-decoder3", "dgrad"),  # 16 -> 1
        ("segnet-decoder3", "dgrad"),  # 16 -> 10
        ("cpm-conv1_1", "fprop"),  # 3 -> 64
    ],
)
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
def test_few_channels_run_direct_where_that_is_memory_bound(name: str, op: str, arch: str) -> None:
    found = plan(by_name(name), op, arch=arch)
    assert found.algorithm == "direct", str(found)
    assert found.moved_bytes < 1.1 * found.bytes


def test_few_channels_on_tensor_cores_are_not_padded_in_memory() -> None:
    """Where multiply-adds would bound a direct kernel: gemm_k is (tap, channel) without gaps."""
    found = plan(by_name("cpm-conv1_1"), arch="sm_80")
    assert (found.algorithm, found.narrow, found.copy_source) == ("mma", True, False)
    assert found.moved_bytes < 1.01 * found.bytes
    assert found.issued_flops < 1.2 * found.flops  # 27 of 32 K steps are real


@pytest.mark.parametrize("op", OPS)
def test_depthwise_is_not_a_gemm(op: str) -> None:
    for name in ("conv-depthwise", "transposed-depthwise"):
        assert plan(by_name(name), op).algorithm == "depthwise"


def test_depthwise_threads_are_numbered_in_32_bits() -> None:
    """8.6 G elements of odd channels: as many blocks of another kernel instead."""
    for n, expected in ((1 << 10, "depthwise"), (1 << 12, "direct")):
        huge = _plan.ConvProblem.for_conv2d((n, 37, 300, 300), (37, 1, 3, 3), groups=37)
        found = _plan.cuda_plan(huge)
        assert found.algorithm == expected
        assert found.blocks * found.splits < 1 << 31


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_decides_the_algorithm(dtype: str) -> None:
    """float32 uses tensor cores only as tf32; float64 never does."""
    spec = by_name("cpm-conv4_1")
    for tf32 in (False, True):
        found = plan(spec, dtype=dtype, tf32=tf32)
        tensor_cores = dtype in ("float16", "bfloat16") or (dtype == "float32" and tf32)
        assert found.algorithm == ("mma" if tensor_cores else "fma")


def test_small_grids_are_split() -> None:
    """One image of 32 x 32 fills a GPU only when its reduction is cut."""
    found = plan(by_name("cpm-conv6_2"))
    assert found.splits > 1
    assert found.kernels[-1] == "finish_gather_f16"
    alone = plan(by_name("cpm-conv6_2"), multiprocessors=1)
    assert alone.splits == 1


def test_layout_decides_what_is_copied() -> None:
    spec = by_name("cpm-conv6_2")
    assert not plan(spec).copy_source
    assert plan(spec, channels_last=False).copy_source
    ragged = plan(by_name("cpm-conv6_1"))  # 149 channels, read 49 times
    assert ragged.copy_source
    once = plan(by_name("cpm-conv6_7"), "dgrad")  # 21 channels, read once or twice
    assert not once.copy_source


def test_filters_in_rows_are_read_where_they_lie() -> None:
    spec = by_name("cpm-conv6_2")
    assert not plan(spec, dtype="bfloat16").pack_filter
    assert plan(spec, dtype="bfloat16", channels_last=False).pack_filter
    assert plan(spec, dtype="float32").pack_filter  # rounded to tf32 on the way
    assert plan(spec, "dgrad").pack_filter


def test_plan_is_a_pure_function() -> None:
    assert len({str(plan(by_name("cpm-conv6_1"))) for _ in range(5)}) == 1


def test_workspace_holds_every_piece() -> None:
    spec = by_name("cpm-conv6_1")
    found = plan(spec, "wgrad", channels_last=False)
    assert found.workspace_bytes >= found.splits * math.prod(spec.weight_shape) * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"op": "backward"}, "fprop, dgrad or wgrad"),
        ({"dtype": "int8"}, "float32, float64, bfloat16 or float16"),
        ({"arch": "sm_75"}, "from sm_80 on"),
        ({"arch": "hopper"}, "from sm_80 on"),
        ({"multiprocessors": 0}, "must be positive, got 0"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _plan.cuda_plan(problem_of(by_name("conv-k3s1")), **arguments)


def test_too_many_pixels_raise() -> None:
    huge = _plan.ConvProblem.for_conv2d((1, 8, 1 << 15, 1 << 16), (8, 8, 1, 1))
    with pytest.raises(ValueError, match="pixels of the activation must be below"):
        _plan.cuda_plan(huge)


def test_explain_shows_cuda_plans_without_a_gpu() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.LeakyReLU(), nn.ConvTranspose2d(64, 21, 2, 2)
    )
    optimize(model)
    for arch in ARCHS:
        conv, up = explain(model, torch.randn(1, 3, 16, 16), arch=arch, show=False)
        assert (conv.backend, up.backend) == ("cuda", "cuda")
        for layer, op in ((conv, "fprop"), (up, "dgrad")):
            assert layer.algorithm.startswith(op)
            assert arch in layer.algorithm
        assert up.flops == 2 * 64 * 21 * 4 * 16 * 16
    with pytest.raises(ValueError, match="from sm_80 on"):
        explain(model, torch.randn(1, 3, 16, 16), arch="sm_70", show=False)
