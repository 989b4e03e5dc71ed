# SPDX-License-Identifier: BSD-3-Clause
"""What the tests and the benchmarks share: named problems, tolerances, memory and operator counters."""
