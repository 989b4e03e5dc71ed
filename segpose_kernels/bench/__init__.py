# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks: this package beside everything a user would take instead.

`cases` and `catalogue` say what is measured, `contenders` who takes part, `timing` and `measure`
how, `results` holds the figures, `table` prints them; `run` is `segpose bench`.
"""
