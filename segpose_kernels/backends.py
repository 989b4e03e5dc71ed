# SPDX-License-Identifier: BSD-3-Clause
"""Which implementation runs a call: the ordered list of backends, and why each one can or cannot.

Importing this module loads the C++ library that registers `torch.ops.segpose.*`. When it is missing
or does not load, the reason is kept, and calls run on the next backend of the list.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from .checks import NATIVE_DTYPES

__all__ = ["BACKENDS", "CUDA_LIBRARY", "LIBRARY", "Backend", "Library", "select"]

NAMESPACE = "segpose"

_CONV2D = (
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, float negative_slope"
)
_CONV_TRANSPOSE2D = (
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt groups, "
    "SymInt[2] dilation, float negative_slope"
)
_FORWARD = "Tensor input, Tensor weight, Tensor? bias"
_BACKWARD = "Tensor grad_output, Tensor? output, Tensor input, Tensor weight"
_NEEDS = "bool need_input, bool need_weight, bool need_bias"

# What the Python side calls; a library built from another version of the sources is turned away.
SCHEMAS = {
    "conv2d_act": f"({_FORWARD}, {_CONV2D}) -> Tensor",
    "conv2d_act_backward": f"({_BACKWARD}, {_CONV2D}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    "conv_transpose2d_act": f"({_FORWARD}, {_CONV_TRANSPOSE2D}) -> Tensor",
    "conv_transpose2d_act_backward": (
        f"({_BACKWARD}, {_CONV_TRANSPOSE2D}, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
    ),
}

_PAIRS = "int[2] stride, int[2] padding, int[2] output_padding, int[2] dilation, int groups"
# Of the CPU kernels only.
_CPU_SCHEMAS = {
    "prepare_conv": (
        f"(Tensor weight, Tensor? bias, int[4] input_shape, {_PAIRS}, bool transposed, "
        "float negative_slope, int max_bytes, int[] donors) -> int"
    ),
    "conv_chain": (
        "(Tensor input, Tensor[] parameters, int[] code, float[] slopes, bool contiguous) "
        "-> Tensor[]"
    ),
    "conv_chain_backward": (
        "(Tensor grad_output, Tensor[] values, Tensor[] parameters, int[] code, float[] slopes, "
        "int[] needs) -> Tensor[]"
    ),
    "run_prepared": "(int handle, Tensor input, Tensor(a!) output) -> ()",
    "prepare_sequence": "(int[] code, int[] places, Tensor[] fixed) -> int",
    "run_sequence": "(int handle, Tensor(a!)[] given) -> (bool, Tensor[])",
    "release_sequence": "(int handle) -> ()",
    "first_stale": "(int[] handles) -> int",
    "fingerprint": "(Tensor[] tensors) -> int",
    "prepared_info": "(int handle) -> (str, int, int)",
    "release_prepared": "(int handle) -> ()",
    "entries": "() -> int[]",
    "max_pool2x2": "(Tensor input, Tensor(a!) output) -> ()",
    "max_pool2x2_backward": (
        "(Tensor grad_output, Tensor output, Tensor input, Tensor(a!) grad_input) -> ()"
    ),
    "to_contiguous": "(Tensor input) -> Tensor",
    "allocate_workspace": "(Tensor like, int bytes) -> Tensor",
    "allocate_result": "(Tensor like, int[] shape, bool channels_last) -> Tensor",
    "choose_algorithm": (
        "(int[] problem, str pass_name, str dtype, str precision, bool prepared, str algorithm) "
        "-> ()"
    ),
    "precision_of": "(Tensor weight, float flops) -> str",
}


@dataclass(frozen=True)
class Library:
    """The C++ library: where it lies, and why it is not in use (None when it is)."""

    path: Path | None
    missing: str | None

    @property
    def loaded(self) -> bool:
        return self.missing is None

    def has_kernels_for(self, dispatch_key: str) -> bool:
        """Whether every operator has a kernel for "CPU" or "CUDA"."""
        return self.loaded and all(
            torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key)
            for name in SCHEMAS
        )


def _schema_difference() -> str | None:
    """First operator whose registered schema is not the one this version calls."""
    for name, expected in {**SCHEMAS, **_CPU_SCHEMAS}.items():
        packet = getattr(getattr(torch.ops, NAMESPACE), name, None)
        if packet is None:
            return f"it has no operator {NAMESPACE}::{name}"
        found = str(packet.default._schema).removeprefix(f"{NAMESPACE}::{name}")
        if found != expected:
            return f"its {NAMESPACE}::{name} is {found}, expected {expected}"
    return None


_FOLDER = Path(__file__).resolve().parent


def _load_library() -> Library:
    # SEGPOSE_LIBRARY names another build of the same library, one with sanitizers for example.
    override = os.environ.get("SEGPOSE_LIBRARY")
    folder = _FOLDER
    found = [Path(override)] if override else sorted(folder.glob("_C.*so"))
    if not found:
        return Library(
            None,
            f"the C++ library {folder / '_C*.so'} does not exist: the package was not built; "
            "run `pip install -e .` in its source folder",
        )
    path = found[0]
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the loader says is the reason to report
        reason = f"{path.name} does not load with torch {torch.__version__}: {error}"
        return Library(path, f"{reason}; rebuild it with `pip install -e .`")
    difference = _schema_difference()
    if difference is not None:
        return Library(
            path,
            f"{path.name} was built from another version of the sources: {difference}; "
            "rebuild it with `pip install -e .`",
        )
    return Library(path, None)


LIBRARY = _load_library()


def _load_cuda_library() -> Library:
    """The library of CUDA kernels for the operators of `LIBRARY`; loading it touches no device."""
    if not LIBRARY.loaded:
        return Library(None, LIBRARY.missing)
    found = sorted(_FOLDER.glob("_C_cuda.*so"))
    if not found:
        try:
            record = json.loads((_FOLDER / "_cuda_build.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = {}
        reason = record.get("reason") or "they were not built"
        return Library(None, f"the package was built without CUDA kernels: {reason}")
    path = found[0]
    if torch.version.cuda is None:
        return Library(path, f"torch {torch.__version__} was built without CUDA")
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the loader says is the reason to report
        reason = f"{path.name} does not load with torch {torch.__version__}: {error}"
        return Library(path, f"{reason}; rebuild it with `pip install -e .`")
    return Library(path, None)


CUDA_LIBRARY = _load_cuda_library()


def tf32_allowed() -> bool:
    """torch's own switch for float32 convolutions on CUDA, whichever of its names set it."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


_CPU_PRECISIONS = {"ieee": "highest", "tf32": "high", "bf16": "medium"}


def cpu_float32_precision() -> str:
    """torch's own switch for float32 convolutions on CPU: highest, high or medium.

    `torch.backends.mkldnn.conv.fp32_precision` (which follows `torch.backends.fp32_precision`)
    decides; where it is "none", `torch.get_float32_matmul_precision()` does.
    """
    # What torch.backends.mkldnn.conv.fp32_precision calls, in 0.14 us instead of 0.91: every call
    # of an inference model asks.
    switch = torch._C._get_fp32_precision_getter("mkldnn", "conv")
    return _CPU_PRECISIONS.get(switch) or torch.get_float32_matmul_precision()


if LIBRARY.loaded:
    # The kernels ask through the dispatcher: a switch counts when a pass runs, in compiled graphs
    # and backward threads too.
    for _switch in (tf32_allowed, cpu_float32_precision):
        torch.library.impl(f"{NAMESPACE}::{_switch.__name__}", "CompositeExplicitAutograd")(_switch)


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators."""

    name: str
    devices: frozenset[str] | None  # torch device types; None: all
    dtypes: frozenset[torch.dtype] | None  # None: all that torch's own operators take
    missing: str | None  # why it cannot run anything here

    def supports(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run a call on tensors of this device and dtype; None when it can.

        What a GPU is too old for is up to auto.py, which knows the device.
        """
        if self.missing is not None:
            return self.missing
        if self.devices is not None and device_type not in self.devices:
            return f"it runs tensors on {' or '.join(sorted(self.devices))}, got {device_type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            names = sorted(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"it computes {', '.join(names)}, got {str(dtype).removeprefix('torch.')}"
        return None


def _missing_cpu() -> str | None:
    if not LIBRARY.loaded:
        return LIBRARY.missing
    return None if LIBRARY.has_kernels_for("CPU") else "the library was built without CPU kernels"


def _triton_missing() -> str | None:
    """Triton itself is imported by the first call that it runs."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; get it with: pip install triton (Linux only)"
    return None


# Fastest first; the first that supports a call runs it, on CUDA by the rule in auto.py. Meta
# tensors have the CPU's fakes.
BACKENDS = (
    Backend("cuda", frozenset({"cuda"}), NATIVE_DTYPES, CUDA_LIBRARY.missing),
    Backend("triton", frozenset({"cuda"}), NATIVE_DTYPES, _triton_missing()),
    Backend("cpu", frozenset({"cpu", "meta"}), NATIVE_DTYPES, _missing_cpu()),
    Backend("aten", None, None, None),
)

_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _default_backend() -> str:
    """What "auto" means: SEGPOSE_BACKEND, or the first of the list that supports a call."""
    name = os.environ.get("SEGPOSE_BACKEND", "auto")
    if name != "auto" and name not in _BY_NAME:
        warnings.warn(
            f"SEGPOSE_BACKEND={name!r} is not one of auto, {', '.join(_BY_NAME)}; using auto",
            stacklevel=2,
        )
        return "auto"
    return name


DEFAULT_BACKEND = _default_backend()

_selected: dict[tuple[str, str, torch.dtype], str] = {}


def select(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend that runs a call.

    `requested` is a backend's name or "auto". Raises ValueError for an unknown name, RuntimeError
    with the reason when the backend asked for cannot run the call.
    """
    key = requested, device_type, dtype
    name = _selected.get(key)
    if name is None:
        name = _selected[key] = _select(requested, device_type, dtype)
    return name


def _select(requested: str, device_type: str, dtype: torch.dtype) -> str:
    if requested != "auto" and requested not in _BY_NAME:
        names = ", ".join(repr(name) for name in ("auto", *_BY_NAME))
        raise ValueError(f"segpose_kernels: backend must be one of {names}, got {requested!r}")
    asked = DEFAULT_BACKEND if requested == "auto" else requested
    if asked == "auto":
        return next(b.name for b in BACKENDS if b.supports(device_type, dtype) is None)
    reason = _BY_NAME[asked].supports(device_type, dtype)
    if reason is not None:
        source = "" if requested == asked else " (from SEGPOSE_BACKEND)"
        raise RuntimeError(
            f"segpose_kernels: backend {asked!r}{source} cannot run this call: {reason}; "
            "use backend='auto' to fall back"
        )
    return asked


def select_for_compile(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """`select` as a constant of the graph, so that no guard on the table is left behind."""
    return _select(requested, device_type, dtype)


# What torch.compiler.assume_constant_result sets; calling it would import all of torch._dynamo.
select_for_compile._dynamo_marked_constant = True  # type: ignore[attr-defined]
