# SPDX-License-Identifier: BSD-3-Clause
"""The GPU page: what is known of the GPU kernels without a GPU, and what is measured with one.

Static are the kernels' resources, as the compiler reports them, and for each problem the time that
a GPU's data sheet allows. Neither is a measurement, and the page says so; on a machine with a GPU
`segpose bench --gpu` adds measured times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..testing.kernelbench import KERNELBENCH
from ..testing.problems import CPM2DPOSE, SEGNET, TRANSPOSED
from ..testing.spec import ConvSpec
from . import charts
from .cases import Case
from .document import Block, Heading, Picture, Table, Text
from .series import distinct, gpu_layers, gpu_models
from .table import three_figures

__all__ = ["GPUS", "ROOFS", "Gpu", "gpu_cases", "kernel_facts", "roofs", "static_page"]


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of the SXM form, without sparsity.

    Attributes:
        flops: operations a second of the unit that computes a dtype; float32 is TF32 on tensor
            cores, which is torch's default for convolutions.
        bandwidth: bytes a second of its memory.
    """

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float

    def floor(self, spec: ConvSpec, dtype: torch.dtype) -> tuple[float, bool]:
        """Least seconds for a problem, and whether memory decides it."""
        arithmetic = spec.flops / self.flops[dtype]
        memory = spec.bytes(dtype) / self.bandwidth
        return max(arithmetic, memory), memory > arithmetic


def _gpu(name: str, bf16: float, tf32: float, terabytes: float) -> Gpu:
    rates = {torch.float16: bf16, torch.bfloat16: bf16, torch.float32: tf32}
    return Gpu(name, {dtype: rate * 1e12 for dtype, rate in rates.items()}, terabytes * 1e12)


GPUS = (
    _gpu("A100 80GB", 312, 156, 2.04),
    _gpu("H100", 989, 495, 3.35),
    _gpu("H200", 989, 495, 4.8),
    _gpu("B200", 2250, 1100, 8.0),
)


GPU_PROBLEMS = (*TRANSPOSED, *distinct(CPM2DPOSE), *SEGNET, *KERNELBENCH)


def gpu_cases() -> list[Case]:
    """What is measured on a GPU: models with large batches, layers, KernelBench at full size."""
    return [
        *gpu_models(),
        *gpu_layers("transposed", TRANSPOSED),
        *gpu_layers("cpm-layers", distinct(CPM2DPOSE)),
        *gpu_layers("segnet-layers", SEGNET),
        *gpu_layers("kernelbench", KERNELBENCH),
    ]


ROOFS = "gpu-roofs"
"""Name of the picture in `static_page`."""


def roofs() -> charts.Draw:
    """The picture: float16 on the tensor cores of each GPU."""
    half = torch.float16
    return charts.gpu_roofs(
        [(gpu.name, gpu.flops[half], gpu.bandwidth) for gpu in GPUS],
        [spec.flops / spec.bytes(half) for spec in GPU_PROBLEMS],
        "Data sheets, float16; each dot a problem (static)",
    )


def static_page() -> list[Block]:
    """Kernel table and floors; every heading says that nothing in them was measured.

    It shows a picture called `ROOFS`, which `roofs` draws.
    """
    blocks: list[Block] = [
        Heading("GPU kernels: what is known without a GPU", 1),
        Text(
            "Nothing on this page was measured on a GPU unless its heading says so. Static figures "
            "are what the compiler reports and what data sheets allow."
        ),
        *_kernels(),
        Heading("Floors by data sheet (static)"),
        Text(
            "Microseconds that the operations of the direct definition take on the tensor cores, "
            "or that moving each tensor once takes, whichever is longer; m marks the problems "
            "where memory decides. float32 stands for TF32. No kernel reaches them."
        ),
        Picture(ROOFS, "Most operations a second that data sheets of four GPUs allow"),
    ]
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        blocks += [Heading(f"{name} (static)", 3), floor_table(GPU_PROBLEMS, dtype)]
    return blocks


def floor_table(specs: Sequence[ConvSpec], dtype: torch.dtype) -> Table:
    """Floors of the problems on each of `GPUS`."""
    rows = []
    for spec in specs:
        cells = [spec.name, three_figures(spec.flops / 1e9), three_figures(spec.bytes(dtype) / 1e6)]
        for gpu in GPUS:
            seconds, memory = gpu.floor(spec, dtype)
            cells.append(three_figures(seconds * 1e6) + (" m" if memory else ""))
        rows.append(cells)
    return Table(("problem", "GFLOP", "MB", *(f"{gpu.name} us" for gpu in GPUS)), rows)


def kernel_facts() -> tuple[list[dict[str, Any]], str]:
    """What `segpose kernels --json` lists; and, if that is not to be had, why."""
    command = [sys.executable, "-m", "segpose_kernels", "kernels", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line), "it failed")
        return (
            [],
            f"not available: `segpose kernels`, the table of CUDA and Triton kernels ({reason})",
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows, ""


_FACTS = (
    ("name", "kernel"),
    ("backend", "backend"),
    ("arch", "arch"),
    ("registers", "registers"),
    ("spill_bytes", "spilled bytes"),
    ("stack_bytes", "stack bytes"),
    ("shared_bytes", "shared bytes"),
    ("ctas_per_sm", "CTAs an SM"),
)


def _kernels() -> list[Block]:
    rows, missing = kernel_facts()
    heading = Heading("Kernels as compiled (static)")
    if missing:
        return [heading, Text(f"{missing[0].upper()}{missing[1:]}.")]
    simulated = [key for key in _simulated_keys(rows) if key not in dict(_FACTS)]
    cells = [
        [str(row.get(key, "-")) for key, _ in _FACTS] + [_figure(row, key) for key in simulated]
        for row in rows
    ]
    header = [*(title for _, title in _FACTS), *(key.replace("_", " ") for key in simulated)]
    blocks: list[Block] = [heading, Table(header, cells, labels=3)]
    backends = {str(row.get("backend")) for row in rows}
    lacking = [name for name in ("cuda", "triton") if name not in backends]
    if lacking:
        blocks.append(Text(f"Not in the table: kernels of the {' and '.join(lacking)} backend."))
    return blocks


def _simulated_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the figures that a simulation counted, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row.get("simulated") or {}))


def _figure(row: dict[str, Any], key: str) -> str:
    value = (row.get("simulated") or {}).get(key)
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
