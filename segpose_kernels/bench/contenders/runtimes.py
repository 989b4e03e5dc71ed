# SPDX-License-Identifier: BSD-3-Clause
"""onnxruntime and OpenVINO, both from the ONNX model that torch exports."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from .base import Contender, Prepared, Unavailable, require

__all__ = ["RUNTIMES"]


@functools.lru_cache(maxsize=1)
def _onnx_model(case: Case) -> bytes:
    """The subject in float32, exported for its input's shape; kept for the next runtime."""
    require("onnxscript")
    subject = case.subject
    with _quiet():
        program: Any = torch.onnx.export(
            subject.module, (subject.input,), dynamo=True, verbose=False
        )
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _inference_only(case: Case) -> None:
    if case.training:
        raise Unavailable("inference only")


def _onnxruntime(case: Case, device: str, threads: int) -> Prepared:
    _inference_only(case)
    if case.dtype != torch.float32:
        raise Unavailable(f"no CPU convolution in {case.dtype}".replace("torch.", ""))
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(_onnx_model(case), options, providers=["CPUExecutionProvider"])
    x = case.subject.input.numpy()
    y = torch.empty(_output_shape(case)).numpy()
    # Bound once: no allocation, no copy and no lookup by name in a call.
    binding = session.io_binding()
    for bind, name, array in (
        (binding.bind_input, session.get_inputs()[0].name, x),
        (binding.bind_output, session.get_outputs()[0].name, y),
    ):
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def call() -> object:
        return session.run_with_iobinding(binding)

    def results() -> dict[str, Tensor]:
        y.fill(float("nan"))
        call()
        return {"output": torch.from_numpy(y.copy())}

    return Prepared(call, results)


def _openvino(case: Case, device: str, threads: int) -> Prepared:
    _inference_only(case)
    ov = require("openvino")
    core = ov.Core()
    model = core.read_model(io.BytesIO(_onnx_model(case)))
    element = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}.get(case.dtype)
    if element is None:
        raise Unavailable(f"not asked for {case.dtype}".replace("torch.", ""))
    if case.dtype == torch.bfloat16:
        # Tensors in bfloat16 at both ends, as for everyone else.
        steps = ov.preprocess.PrePostProcessor(model)
        steps.input().tensor().set_element_type(element)
        steps.output().tensor().set_element_type(element)
        model = steps.build()
    compiled = core.compile_model(
        model,
        "CPU",
        {
            # Left to itself it computes float32 models in bfloat16 where the processor has it.
            "INFERENCE_PRECISION_HINT": element.get_type_name(),
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        },
    )
    request = compiled.create_infer_request()
    x = case.subject.input.to(case.dtype).contiguous()
    y = torch.empty(_output_shape(case), dtype=case.dtype)
    # Both share the memory of a torch tensor; numpy knows no bfloat16, so as bits.
    for set_tensor, tensor in (
        (request.set_input_tensor, x),
        (request.set_output_tensor, y),
    ):
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        set_tensor(ov.Tensor(bits.numpy(), list(tensor.shape), element))

    def call(_keep_alive: Tensor = x) -> object:
        return request.infer()

    def results() -> dict[str, Tensor]:
        y.fill_(float("nan"))
        call()
        return {"output": y.clone()}

    return Prepared(call, results)


def _output_shape(case: Case) -> tuple[int, ...]:
    return tuple(case.subject.grad_output.shape)


RUNTIMES = (
    Contender("onnxruntime", "onnxruntime", frozenset({"cpu"}), _onnxruntime),
    Contender("openvino", "OpenVINO", frozenset({"cpu"}), _openvino),
)
