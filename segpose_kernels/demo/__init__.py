# SPDX-License-Identifier: BSD-3-Clause
"""`python -m segpose_kernels demo`: the package's main job on images, checked, timed and drawn."""
