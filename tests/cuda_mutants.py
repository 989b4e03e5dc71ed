# SPDX-License-Identifier: BSD-3-Clause
"""Faults to plant in the CUDA backend, and a program that runs one mutant.

    python tests/cuda_mutants.py NAME

builds the library with the fault in it, runs the mutant's problems in the simulator and says what
was found: exit code 1 when something was, 0 when the mutant survived.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """In csrc/<file>, `old` becomes `new`. `problems` are names of scenarios and GPU problems; with
    "+inf" behind it, one pixel of the input is infinite.
    """

    name: str
    file: str
    old: str
    new: str
    problems: tuple[str, ...]


GATHER = ("tile-64x64", "transposed-k3s2")
NARROW = ("narrow-128x32-c3",)
WGRAD = ("wgrad-64x128", "wgrad-64x64")

MUTANTS = (
    # Waits and barriers of the pipeline.
    Mutant(
        "wait-too-few-groups",
        "cuda/pipeline.cuh",
        "wait_copies<kStages - 2>();",
        "wait_copies<kStages - 1>();",
        GATHER,
    ),
    Mutant(
        "no-barrier-in-mainloop",
        "cuda/pipeline.cuh",
        "      __syncthreads();\n      next(ahead);",
        "      next(ahead);",
        GATHER,
    ),
    Mutant(
        "copies-into-the-next-stage",
        "cuda/pipeline.cuh",
        "(stage + kStages - 1) % kStages",
        "(stage + 1) % kStages",
        GATHER,
    ),
    Mutant(
        "one-k-block-too-many",
        "cuda/pipeline.cuh",
        "if (i + stage >= k_blocks) return;",
        "if (i + stage > k_blocks) return;",
        GATHER,
    ),
    Mutant(
        "one-k-block-too-few",
        "cuda/pipeline.cuh",
        "const bool more = ahead < k_blocks;",
        "const bool more = ahead + 1 < k_blocks;",
        GATHER,
    ),
    Mutant(
        "registers-never-land",
        "cuda/pipeline.cuh",
        "      if (more) land(kFree);\n",
        "",
        NARROW,
    ),
    # Predicates and indices of the source operand.
    Mutant(
        "taps-behind-the-last",
        "cuda/gather_source.cuh",
        "const int height = tap_h_ < taps_h_ ? p.source.h : 0;",
        "const int height = p.source.h;",
        ("tile-64x64+inf",),
    ),
    Mutant(
        "one-column-past-the-edge",
        "cuda/gather_source.cuh",
        "(static_cast<unsigned>(w[row] + dw) < static_cast<unsigned>(width))",
        "(static_cast<unsigned>(w[row] + dw) <= static_cast<unsigned>(width))",
        GATHER,
    ),
    Mutant(
        "rows-not-checked",
        "cuda/gather_source.cuh",
        "return (static_cast<unsigned>(h[row] + dh) < static_cast<unsigned>(height)) &",
        "return",
        GATHER,
    ),
    Mutant(
        "one-pixel-too-many",
        "cuda/gather_source.cuh",
        "if (m < p.m_total) {",
        "if (m <= p.m_total) {",
        ("conv-k1s1", "tile-64x64"),
    ),
    Mutant(
        "tap-row-never-ends",
        "cuda/gather_source.cuh",
        "if (++tap_w_ == taps_w_) {",
        "if (++tap_w_ > taps_w_) {",
        GATHER,
    ),
    Mutant(
        "steps-swapped",
        "cuda/gather_source.cuh",
        "    const int dw = tap_w_ * p.tap_step_w;",
        "    const int dw = tap_w_ * p.tap_step_h + (p.tap_step_w - p.tap_step_h) * tap_h_;",
        ("conv-asymmetric",),
    ),
    Mutant(
        "channels-of-the-wrong-group",
        "cuda/gather_source.cuh",
        "const int64_t channel = int64_t{block.group} * p.depth * p.source.stride_c;",
        "const int64_t channel = 0;",
        ("conv-groups2",),
    ),
    Mutant(
        "narrow-tap-check",
        "cuda/gather_source.cuh",
        "const bool valid = tap_h < taps_h_ && rows_",
        "const bool valid = rows_",
        ("narrow-128x32-c3+inf",),
    ),
    Mutant(
        "narrow-channel-carry",
        "cuda/gather_source.cuh",
        "if (++channel == static_cast<uint32_t>(p.depth)) {",
        "if (++channel > static_cast<uint32_t>(p.depth)) {",
        NARROW,
    ),
    Mutant(
        "narrow-odd-elements",
        "cuda/elements.cuh",
        "word = element % 2 == 0 ? bits : word | bits << 16;",
        "word = element % 2 == 0 ? bits : word | bits << 15;",
        NARROW,
    ),
    Mutant(
        "filter-columns-not-checked",
        "cuda/gather_mma.cuh",
        "bytes_[i] = column + i * (kThreads / kChunksPerRow) < p.columns ? kChunkBytes : 0;",
        "bytes_[i] = kChunkBytes;",
        GATHER,
    ),
    # Fragments.
    Mutant(
        "fragment-a-lanes",
        "cuda/warp_tile.cuh",
        "swizzled(row_ + lane % 16, lane / 16)",
        "swizzled(row_ + lane % 16, lane / 8 % 2)",
        GATHER,
    ),
    Mutant(
        "fragment-b-lanes",
        "cuda/warp_tile.cuh",
        "swizzled(column_ + lane % 8 + lane / 16 * 8, lane / 8 % 2)",
        "swizzled(column_ + lane % 16, lane / 16)",
        GATHER,
    ),
    Mutant(
        "fragment-second-step",
        "cuda/warp_tile.cuh",
        "lane / 16) ^ (step * 2 * kChunkBytes));",
        "lane / 16) + (step * 2 * kChunkBytes));",
        GATHER,
    ),
    Mutant(
        "fragment-rows-of-the-sums",
        "cuda/warp_tile.cuh",
        "fn(m + 8, n,",
        "fn(m + 4, n,",
        GATHER,
    ),
    Mutant(
        "swizzle-of-one-side",
        "cuda/gather_source.cuh",
        "target_ = target + swizzled(threadIdx.x / kChunksPerRow, threadIdx.x % kChunksPerRow);\n"
        "    keep(target_);",
        "target_ = target + threadIdx.x * kChunkBytes;\n    keep(target_);",
        GATHER,
    ),
    # Epilogue and destination.
    Mutant(
        "bias-of-the-neighbour",
        "cuda/gather_mma.cuh",
        "activate(v1 + tables.bias[n + 1],",
        "activate(v1 + tables.bias[n],",
        GATHER,
    ),
    Mutant(
        "activation-inverted",
        "cuda/numeric.cuh",
        "act == Act::relu ? Acc(0) : value * negative_slope",
        "act == Act::relu ? value * negative_slope : Acc(0)",
        ("tile-64x64",),
    ),
    Mutant(
        "slab-read-before-written",
        "cuda/gather_mma.cuh",
        "      __syncthreads();\n      store_slab",
        "      store_slab",
        GATHER,
    ),
    Mutant(
        "slab-overwrites-the-stages",
        "cuda/gather_mma.cuh",
        "first_column += SLAB_N) {\n      __syncthreads();",
        "first_column += SLAB_N) {",
        ("tile-64x64", "tile-128x64"),
    ),
    Mutant(
        "ragged-phases-not-cropped",
        "cuda/gather_pixels.cuh",
        "if (h >= p.destination.h || w >= p.destination.w) return -1;",
        "",
        ("transposed-k3s2", "transposed-k2s3"),
    ),
    Mutant(
        "columns-not-cropped",
        "cuda/gather_pixels.cuh",
        "if (n < static_cast<uint32_t>(p.columns)) {",
        "if (n <= static_cast<uint32_t>(p.columns)) {",
        ("tile-64x64", "narrow-128x32-c3", "conv-k7s1"),
    ),
    Mutant(
        "split-sums-in-one-place",
        "cuda/gather_mma.cuh",
        "(int64_t{blockIdx.y} * gridDim.x + blockIdx.x)",
        "(int64_t{blockIdx.x})",
        ("split-k",),
    ),
    Mutant(
        "split-forgets-a-piece",
        "cuda/finish.cuh",
        "for (int j = 0; j < pieces; ++j) sum += partial[j * piece + i];",
        "for (int j = 1; j < pieces; ++j) sum += partial[j * piece + i];",
        ("split-k",),
    ),
    # Filters.
    Mutant(
        "filter-taps-in-the-wrong-order",
        "cuda/pack.cuh",
        "const int s = phase.s + static_cast<int>(tap_w) * p.filter.s_step;",
        "const int s ="
        " phase.s + (phase.taps > 1 ? 1 - static_cast<int>(tap_w) : 0) * p.filter.s_step;",
        ("transposed-k4s2",),
    ),
    Mutant(
        "filter-padding-not-zero",
        "cuda/pack.cuh",
        "if (tap < phase.taps && channel",
        "if (channel",
        ("tile-64x64", "narrow-128x32-c3"),
    ),
    # wgrad.
    Mutant(
        "wgrad-pixels-of-one-block",
        "cuda/wgrad_mma.cuh",
        "pixels[k_block % kPixelBlocks].locate(",
        "pixels[0].locate(",
        WGRAD,
    ),
    Mutant(
        "wgrad-one-pixel-too-many",
        "cuda/wgrad_pixels.cuh",
        "if (index < end) {",
        "if (index <= end) {",
        WGRAD,
    ),
    Mutant(
        "wgrad-padding-forgotten",
        "cuda/wgrad_pixels.cuh",
        "static_cast<int>(row) * p.stride_h - p.pad_h;",
        "static_cast<int>(row) * p.stride_h;",
        ("wgrad-64x128",),
    ),
    Mutant(
        "wgrad-dilation-of-the-other-axis",
        "cuda/wgrad_pixels.cuh",
        "dw = static_cast<int>(tap_w) * p.dilation_w;",
        "dw = static_cast<int>(tap_w) * p.dilation_h;",
        ("conv-asymmetric",),
    ),
    Mutant(
        "wgrad-filters-not-checked",
        "cuda/wgrad_source.cuh",
        "first + Output::column(i) < p.filters ? kChunkBytes : 0;",
        "kChunkBytes;",
        WGRAD,
    ),
    Mutant(
        "wgrad-odd-rows-not-turned",
        "cuda/wgrad_source.cuh",
        "output_target_[i] = target + Output::target(i);",
        "output_target_[i] = target + Output::target(i ^ 1);",
        WGRAD,
    ),
    Mutant(
        "wgrad-fragment-lanes",
        "cuda/wgrad_warp_tile.cuh",
        "ActivationLayout::chunk(lane % 8 + lane / 8 % 2 * 8, column_ / 8 + 2 * j + lane / 16)",
        "ActivationLayout::chunk(lane % 8 + lane / 16 * 8, column_ / 8 + 2 * j + lane / 8 % 2)",
        WGRAD,
    ),
    Mutant(
        "wgrad-sums-of-the-wrong-half",
        "cuda/wgrad_warp_tile.cuh",
        "c_[i][j][2 * half], c_[i][j][2 * half + 1]",
        "c_[i][j][0], c_[i][j][1]",
        ("wgrad-128x128",),
    ),
    # The gradient pass, direct and depthwise kernels.
    Mutant(
        "mask-lets-zero-pass",
        "cuda/rows.cuh",
        "return output <= Acc(0) ? Acc(0) : gradient;",
        "return output < Acc(0) ? Acc(0) : gradient;",
        ("conv-relu-no-bias",),
    ),
    Mutant(
        "rows-no-barrier",
        "cuda/rows.cuh",
        "        tile[at_c][at_m] = value;\n      });\n      __syncthreads();",
        "        tile[at_c][at_m] = value;\n      });",
        ("rows-any",),
    ),
    Mutant(
        "bias-sums-without-barrier",
        "cuda/rows.cuh",
        "sum[e];\n    __syncthreads();",
        "sum[e];",
        ("wgrad-64x128",),
    ),
    Mutant(
        "direct-filters-without-barrier",
        "cuda/direct.cuh",
        "        load_filters(p, block, phase, k, k_total);\n        __syncthreads();",
        "        load_filters(p, block, phase, k, k_total);",
        ("direct-8-vector",),
    ),
    Mutant(
        "direct-filter-columns",
        "cuda/direct.cuh",
        "< k_total && column < static_cast<uint32_t>(p.columns)) {",
        "< k_total) {",
        ("direct-8",),
    ),
    Mutant(
        "depthwise-filter-stays",
        "cuda/depthwise.cuh",
        "      filter += p.columns;\n",
        "",
        ("depthwise-vector",),
    ),
    Mutant(
        "depthwise-wgrad-without-barrier",
        "cuda/depthwise.cuh",
        "[threadIdx.x % 32] = sums[t];\n  __syncthreads();",
        "[threadIdx.x % 32] = sums[t];",
        ("depthwise-wgrad",),
    ),
    # Host code.
    Mutant(
        "grid-without-groups",
        "cuda/passes.cpp",
        "plan.m_tiles * plan.n_tiles * problem.groups * static_cast<int64_t>(count);",
        "plan.m_tiles * plan.n_tiles * static_cast<int64_t>(count);",
        ("conv-groups2",),
    ),
    Mutant(
        "too-little-shared-memory",
        "cuda/launchers.cuh",
        "launch(gather_mma<T, BLOCK_M, BLOCK_N, kNarrow>, p.grid.blocks, p.grid.splits, 1, "
        "Kernel::kThreads,\n                Kernel::kSharedBytes,",
        "launch(gather_mma<T, BLOCK_M, BLOCK_N, kNarrow>, p.grid.blocks, p.grid.splits, 1, "
        "Kernel::kThreads,\n                Kernel::kSharedBytes - 256,",
        GATHER,
    ),
    Mutant(
        "workspace-too-small",
        "cuda/plan.cpp",
        "elements += pitch * plan.columns * problem.groups;",
        "elements += pitch * (plan.columns - 1) * problem.groups;",
        GATHER,
    ),
    Mutant(
        "vector-stores-on-ragged-channels",
        "cuda/passes.cpp",
        "store_channels % (kChunkBytes / plan.element()) == 0;",
        "store_channels > 0;",
        ("conv-groups2-ragged",),
    ),
)


def write(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc in `folder` with the fault in it; raises if the code is not there once."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    path = sources / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {text.count(mutant.old)} places to plant it, not one")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return sources


def main(mutant_name: str) -> int:
    import cudasim
    import torch
    from cuda_scenarios import SCENARIOS, check_infinite_pixel
    from ptxsim import KernelFault, PtxSimError

    from segpose_kernels.testing.fused import run_fused
    from segpose_kernels.testing.gpu_problems import GPU_LAYERS, GPU_PROBLEMS
    from segpose_kernels.testing.numerics import assert_results_match
    from segpose_kernels.testing.poison import poisoned_memory

    mutant = next(m for m in MUTANTS if m.name == mutant_name)
    scenarios = {str(s): s for s in SCENARIOS}
    problems = {s.name: s for s in (*GPU_PROBLEMS, *GPU_LAYERS)}
    with tempfile.TemporaryDirectory() as folder:
        sources = write(mutant, Path(folder))
        # One element type carries the fault; the others are compiled already.
        others = [ROOT / "csrc" / kernel for kernel in cudasim.KERNELS[1:]]
        cudasim.configure(sources, [sources / cudasim.KERNELS[0], *others])
        for problem in mutant.problems:
            name, infinite, _ = problem.partition("+")
            scenario = scenarios.get(name)
            spec = scenario.spec if scenario else problems[name]
            layout = scenario.layout if scenario else "channels_last"
            tensors = spec.make_tensors(
                torch.float16,
                generator=torch.Generator().manual_seed(3),
                input_layout=layout,
                weight_layout=layout,
                grad_layout=layout,
            )
            try:
                with (
                    poisoned_memory(),
                    cudasim.simulated(scenario.multiprocessors if scenario else 4),
                ):
                    if infinite:
                        check_infinite_pixel(spec, tensors)
                    else:
                        results = run_fused(spec, tensors, backend="cuda")
                        assert_results_match(spec, tensors, results)
            except (KernelFault, AssertionError, RuntimeError, ValueError, PtxSimError) as error:
                print(f"{problem}: {type(error).__name__}: {str(error)[:600]}")
                return 1
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "ptxsim")]
    sys.exit(main(sys.argv[1]))
