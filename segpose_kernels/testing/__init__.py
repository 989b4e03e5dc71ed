# SPDX-License-Identifier: BSD-3-Clause
"""Shared by tests and benchmarks: named problems, tolerances, memory and operator counters."""
