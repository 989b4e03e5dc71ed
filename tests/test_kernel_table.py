# SPDX-License-Identifier: BSD-3-Clause
"""The shipped table of GPU kernels: current, complete, and what the kernels promise in it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from segpose_kernels import kernel_facts
from segpose_kernels.__main__ import main

TABLE = kernel_facts.load()
ROWS = [row for entry in TABLE.values() for row in entry["kernels"]]
FIELDS = {
    "name",
    "backend",
    "arch",
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_bytes",
    "ctas_per_sm",
    "sass",
    "simulated",
    "problem",
    "note",
}


def rows(backend: str, *archs: str, name: str = "") -> list[dict[str, Any]]:
    return [
        row
        for row in ROWS
        if row["backend"] == backend
        and (not archs or row["arch"] in archs)
        and row["name"].startswith(name)
    ]


def test_the_table_is_of_these_sources() -> None:
    assert kernel_facts.stale(TABLE) == []


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_change_of_the_sources_is_noticed(
    backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = copy.deepcopy(TABLE)
    old[backend]["sources"] = "of another day"
    monkeypatch.setattr(kernel_facts, "load", lambda: old)
    assert main(["kernels", "--arch", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stale = [line for line in lines if line.startswith("stale:")]
    assert len(stale) == 1
    assert f"the {backend} kernels" in stale[0]


@pytest.mark.parametrize(
    ("suffix", "same", "other"),
    [
        (".cuh", "int a = 1;  // one\nint b;", "int a = 2;\nint b;"),
        (".py", "a = 1  # one\n\nint_b = 2", "a = 1\n  int_b = 2"),
    ],
)
def test_comments_are_no_change(suffix: str, same: str, other: str) -> None:
    plain = {".cuh": "int a = 1;\nint b;", ".py": "a = 1\nint_b = 2"}[suffix]
    assert kernel_facts._code(suffix, same) == kernel_facts._code(suffix, plain)
    assert kernel_facts._code(suffix, other) != kernel_facts._code(suffix, plain)


def test_every_row_is_whole() -> None:
    assert {(row["backend"], row["arch"]) for row in ROWS} == {
        ("cuda", "sm_80"),
        ("cuda", "sm_90"),
        *(("triton", arch) for arch in ("sm_80", "sm_90", "sm_100", "sm_120")),
    }
    assert len({(row["backend"], row["arch"], row["name"]) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert set(row) == FIELDS, row["name"]
        assert row["registers"] > 0
        assert row["ctas_per_sm"] >= 1
        assert {"tensor", "load", "local"} <= set(row["sass"])
        assert bool(row["simulated"]) == bool(row["problem"]), row["name"]


def test_nothing_spills() -> None:
    """On the default architectures; elsewhere the table says so."""
    for row in ROWS:
        found = row["spill_bytes"], row["stack_bytes"], row["sass"]["local"]
        if row["arch"] in ("sm_80", "sm_90"):
            assert found == (0, 0, 0), (row["name"], row["arch"])
        elif found != (0, 0, 0):
            assert "local memory" in row["note"], (row["name"], row["arch"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_main_loops_reach_their_goals_or_say_why_not(backend: str) -> None:
    goals = {
        "wavefronts_ldmatrix": 1.0,
        "wavefronts_cp_async": 1.0,
        "instructions_per_mma": 1.5,
    }
    seen = 0
    for row in rows(backend):
        figures = row["simulated"]
        if "instructions_per_mma" not in figures:
            continue
        seen += 1
        over = [name for name, most in goals.items() if figures.get(name, 0) > most]
        if figures.get("sector_efficiency", 1) < 0.95:
            over.append("sector_efficiency")
        assert not over or row["note"], (row["name"], row["arch"], figures)
    assert seen >= 30


def test_largest_tiles_of_cuda_reach_every_goal() -> None:
    for row in rows("cuda", name="gather_mma"):
        if row["name"].endswith(("f16_128x128", "f16_256x64", "tf32_128x128", "tf32_256x64")):
            figures = row["simulated"]
            assert figures["wavefronts_ldmatrix"] == figures["wavefronts_cp_async"] == 1
            assert figures["sector_efficiency"] >= 0.95
            assert figures["instructions_per_mma"] <= 1.5, row["name"]


def test_triton_reaches_wgmma_on_hopper() -> None:
    """Every tile of fprop and dgrad with 64 rows or more, and the large ones of wgrad."""
    seen = 0
    for row in rows("triton", "sm_90"):
        kind, dtype, *rest = row["name"].split("_")
        extents = rest[0].split("x") if rest else []
        if len(extents) != 3 or dtype == "ieee" or "flat" in row["name"]:
            continue
        if kind == "wgrad" and (dtype == "tf32" or int(extents[0]) < 64):
            continue
        assert row["sass"].get("HGMMA", 0) > 0, row["name"]
        seen += 1
    assert seen >= 20


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_command(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--json", "--backend", backend]) == 0
    assert json.loads(capsys.readouterr().out) == rows(backend)
    assert main(["kernels", "--backend", backend, "--arch", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["kernel", "arch", "regs"]
    names = [line.split()[0] for line in lines[2:] if "sm_80" in line]
    assert names == [row["name"] for row in rows(backend, "sm_80")]


@pytest.mark.parametrize(
    "arguments", [("--arch", "sm_70"), ("--backend", "metal")], ids=["arch", "backend"]
)
def test_command_refuses(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["kernels", *arguments])
    assert raised.value.code == 2
    assert "must be one of" in capsys.readouterr().err
