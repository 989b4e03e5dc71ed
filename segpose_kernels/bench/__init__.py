# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks: this package beside everything a user would take instead.

What is measured is in `cases`, `series` and `catalogue` (`subjects` and `work` build it and count
it), who takes part in `contenders`, how in `timing`, `measure`, `limits` and `machine`. `results`
holds the figures; `table`, `report` (of `document` and `charts`), `goals`, `gate` and `compare` are
what is made of them. `gpu` is the page for GPUs, `run` the command `segpose bench`.
"""
