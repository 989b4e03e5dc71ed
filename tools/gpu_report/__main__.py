# SPDX-License-Identifier: BSD-3-Clause
"""Everything to do on a machine with a GPU, in one go: python tools/gpu_report [--out FOLDER].

Builds the kernels for the GPUs that are there, runs every test that needs one and those in the
simulator, runs compute-sanitizer's tools where it is installed, times the layers of the models
against torch's, and writes report.md and report.json. Each part is reported by name, also when it
fails or cannot run; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Small problems that reach every kernel family; racecheck slows kernels a hundredfold.
SANITIZED = "tests/test_cuda_device.py::test_runs_repeat_bit_by_bit"


@dataclass(frozen=True)
class Part:
    """One step: its name, how it ended, how long it took, and the end of what it printed."""

    name: str
    outcome: str  # "passed", "failed" or why it was left out
    seconds: float
    output: str

    @property
    def failed(self) -> bool:
        return self.outcome == "failed"


def run(name: str, command: Sequence[str], **environment: str) -> Part:
    """Run a command in the source tree and keep the end of its output."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    outcome = "failed" if done.returncode else "passed"
    part = Part(name, outcome, time.monotonic() - began, done.stdout[-4000:])
    print(f"   {outcome} in {part.seconds:.0f} s", flush=True)
    return part


def steps() -> list[Part]:
    """Build, tests and sanitizers."""
    python = sys.executable
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    parts = [run("build", build, SEGPOSE_CUDA="1", TORCH_CUDA_ARCH_LIST="")]
    if parts[0].failed:
        return parts
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    device = "tests/test_cuda_device.py"
    parts.append(run("tests on the GPU", [*pytest, "-m", "cuda"]))
    parts.append(run("full extents on the GPU", [*pytest, device, "--slow", "-k", "full_extent"]))
    parts.append(
        run("tests in the simulator", [*pytest, "tests", "-k", "(cuda or triton) and not device"])
    )
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS:
        if sanitizer is None:
            parts.append(Part(tool, "left out: compute-sanitizer is not on PATH", 0.0, ""))
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", *pytest, SANITIZED]
        parts.append(run(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return parts


def facts() -> dict[str, Any]:
    """The machine and the commit that the figures belong to."""
    import torch

    def output(*command: str) -> str:
        tool = shutil.which(command[0])
        if tool is None:
            return "unknown"
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown"

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join(sys.argv),
    }


def markdown(machine: dict[str, Any], parts: Sequence[Part], rows: Sequence[dict[str, Any]]) -> str:
    lines = ["# Report of a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "| part | outcome | seconds |", "|---|---|---:|"]
    lines += [f"| {part.name} | {part.outcome} | {part.seconds:.0f} |" for part in parts]
    if rows:
        contenders = list(dict.fromkeys(name for row in rows for name in row["ms"]))
        titles = [*contenders, "TFLOP/s", "GB/s", "ratio", "error"]
        lines += [
            "",
            "Median milliseconds; the ratio is that of the fastest other to our fastest, and the",
        ]
        lines += ["error the largest one over that of torch's own in the same dtype.", ""]
        lines += ["| layer | dtype | pass | " + " | ".join(titles) + " |"]
        lines += ["|---|---|---|" + "---:|" * len(titles)]
        for row in rows:
            times = [f"{row['ms'][c]:.3f}" if c in row["ms"] else "-" for c in contenders]
            figures = [f"{row[k]:.3g}" for k in ("tflops", "gbytes", "ratio", "error")]
            cells = [row["layer"], row["dtype"], row["pass"], *times, *figures]
            lines.append("| " + " | ".join(cells) + " |")
    for part in parts:
        if part.failed:
            lines += ["", f"## {part.name}", "", "```", part.output, "```"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_report")
    parser.add_argument("--quick", action="store_true", help="fewer layers and rounds")
    parser.add_argument("--only", choices=["tests", "bench"], help="leave the other out")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("gpu_report: there is no CUDA device here (torch.cuda.is_available() is False)")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = [] if arguments.only == "bench" else steps()
    rows: list[dict[str, Any]] = []
    if arguments.only != "tests" and not any(
        part.name == "build" and part.failed for part in parts
    ):
        from measure import benchmark

        rows = benchmark(torch.device("cuda"), quick=arguments.quick)
    machine = facts()
    report = {"machine": machine, "parts": [asdict(part) for part in parts], "rows": rows}
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    text = markdown(machine, parts, rows)
    (arguments.out / "report.md").write_text(text, encoding="utf-8")
    print(f"wrote {arguments.out / 'report.md'}")
    return int(any(part.failed for part in parts))


if __name__ == "__main__":
    sys.exit(main())
