# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile through the Triton operators, forward and backward, on fake CUDA tensors.

No GPU is needed: nothing runs, but everything up to the compiler's own code generation is traced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("triton")

import triton
from functorch.compile import default_partition, make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node, get_gradient_edge
from triton.backends.compiler import GPUTarget

from segpose_kernels import conv2d_act, conv_transpose2d_act, optimize
from segpose_kernels.models import CPM2DPose, SegNet

# torch.compile looks at .grad of what a hook gets.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

KERNEL = "triton_kernel_wrapper_functional"


class _Driver:
    """Stands for the driver of a GPU while kernels are traced."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def gradients_by_hand(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad over the same graph, without torch's engine.

    The engine asks the CUDA driver for streams before it runs nodes of CUDA tensors, fake or not.
    """
    wanted = [get_gradient_edge(tensor) for tensor in inputs]
    leaves = {edge.node for edge in wanted}
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        if node not in leaves:
            for following, _ in node.next_functions:
                if following is not None:
                    visit(following)
        order.append(node)

    arrived: defaultdict[Node, dict[int, Tensor]] = defaultdict(dict)

    def add(node: Node, number: int, grad: Tensor | None) -> None:
        if grad is not None:
            known = arrived[node].get(number)
            arrived[node][number] = grad if known is None else known + grad

    for output, grad in zip(outputs, grad_outputs, strict=True):
        edge = get_gradient_edge(output)
        visit(edge.node)
        add(edge.node, edge.output_nr, grad)
    for node in reversed(order):
        if node in leaves or not arrived[node]:
            continue
        arguments = [arrived[node].get(i) for i in range(max(arrived[node]) + 1)]
        run: Callable[..., Any] = getattr(node, "apply", node)
        grads = run(*arguments)
        grads = grads if isinstance(grads, tuple) else (grads,)
        for (following, number), grad in zip(node.next_functions, grads, strict=False):
            if following is not None:
                add(following, number, grad)
    return tuple(arrived[edge.node].get(edge.output_nr) for edge in wanted)


@pytest.fixture(autouse=True)
def traceable() -> Iterator[None]:
    """A compiler without remembered code, a driver's stand-in, and no need for torch's engine."""
    torch._dynamo.reset()
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Driver())
    with mock.patch.object(torch.autograd, "grad", gradients_by_hand):
        yield
    driver._active = before
    torch._dynamo.reset()


class Graphs:
    """A torch.compile backend that keeps forward and backward graphs and runs them as they are."""

    def __init__(self) -> None:
        self.forward: list[fx.GraphModule] = []
        self.backward: list[fx.GraphModule] = []

    def _keep(self, graph: fx.GraphModule, inputs: Any) -> Any:
        self.forward.append(graph)
        return make_boxed_func(graph.forward)

    def _partition(self, joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        parts = default_partition(joint, inputs, **options)
        self.backward.append(parts[1])
        return parts

    def backend(self) -> Any:
        return aot_autograd(
            fw_compiler=self._keep, bw_compiler=self._keep, partition_fn=self._partition
        )


def launches(graph: fx.GraphModule) -> list[str]:
    """Names of the kernels that a graph launches."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    names = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and str(node.target) == KERNEL:
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            while not isinstance(kernel, triton.JITFunction):
                kernel = kernel.fn
            names.append(kernel.__name__)
    return names


def convolutions(graph: fx.GraphModule) -> list[str]:
    """Operators of torch that convolve, and our operators left opaque: there must be none."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [t for t in targets if "convolution" in t or "segpose" in t or "leaky" in t]


def make_fake(model: nn.Module) -> None:
    """Parameters on a CUDA device that is not there; inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            setattr(module, name, nn.Parameter(fake))


@pytest.mark.parametrize(
    ("make", "shape", "convs"),
    [(lambda: SegNet(10), (4, 1, 28, 28), 6), (CPM2DPose, (1, 3, 64, 64), 31)],
    ids=["segnet", "cpm2dpose"],
)
def test_swapped_models_trace_without_a_break(
    make: Callable[[], nn.Module], shape: tuple[int, ...], convs: int
) -> None:
    model, report = optimize(make(), backend="triton")
    assert sum(row.fused for row in report.rows) == convs
    graphs = Graphs()
    with FakeTensorMode():
        make_fake(model)
        compiled = torch.compile(model, fullgraph=True, backend=graphs.backend())
        y = compiled(torch.empty(shape, device="cuda"))
    assert y.device.type == "cuda"
    (forward,), (backward,) = graphs.forward[:1], graphs.backward
    names = launches(forward)
    assert names.count("igemm_kernel") == convs
    # float32 filters of transposed layers are brought into order.
    assert set(names) <= {"igemm_kernel", "reduced_last_kernel"}
    names = launches(backward)
    # Every layer's weight has a gradient, every layer's input but the first one's too.
    assert names.count("wgrad_kernel") == convs
    assert names.count("igemm_kernel") == convs - 1
    assert not convolutions(forward)
    assert not convolutions(backward)


def test_direct_kernels_trace() -> None:
    graphs = Graphs()

    def call(x: Tensor, w: Tensor) -> Tensor:
        return conv_transpose2d_act(x, w, None, 2, groups=8, backend="triton")

    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 6, device="cuda", requires_grad=True)
        w = torch.empty(8, 1, 3, 3, device="cuda", requires_grad=True)
        y = torch.compile(call, fullgraph=True, backend=graphs.backend())(x, w)
    assert y.shape == (2, 8, 11, 13)
    assert launches(graphs.forward[0]) == ["direct_kernel"]
    assert "direct_wgrad_kernel" in launches(graphs.backward[0])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_strides_are_torchs(last: bool) -> None:
    graphs = Graphs()

    def call(x: Tensor, w: Tensor) -> Tensor:
        return conv2d_act(x, w, padding=1, backend="triton")

    with FakeTensorMode():
        x = torch.empty(2, 16, 8, 6, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        w = torch.empty(24, 16, 3, 3, device="cuda")
        y = torch.compile(call, fullgraph=True, backend=graphs.backend())(x, w)
    assert y.is_contiguous(memory_format=torch.channels_last) is last
    copies = [n for n in graphs.forward[0].graph.nodes if str(n.target) == "aten.copy.default"]
    assert bool(copies) is not last, "channels_last results need no copy"


@pytest.mark.parametrize("transposed", [False, True])
def test_one_compilation_serves_all_image_sizes(transposed: bool) -> None:
    """Extents of images are symbols, and those of weights that come as inputs: nothing in a plan
    asks for their values.
    """
    graphs = Graphs()

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        fused = conv_transpose2d_act if transposed else conv2d_act
        y: Tensor = fused(x, w, b, stride=2, backend="triton")
        return y

    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = (16, 24, 3, 3) if transposed else (24, 16, 3, 3)
        w = torch.empty(shape, device="cuda", requires_grad=True)
        b = torch.empty(24, device="cuda", requires_grad=True)
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=graphs.backend())
        for n, h, width in ((2, 9, 12), (3, 17, 20), (5, 30, 11)):
            y = compiled(torch.empty(n, 16, h, width, device="cuda", requires_grad=True), w, b)
            rows = 2 * h + 1 if transposed else (h - 3) // 2 + 1
            columns = 2 * width + 1 if transposed else (width - 3) // 2 + 1
            assert y.shape == (n, 24, rows, columns)
    assert len(graphs.backward) == 1
    assert launches(graphs.backward[0]).count("wgrad_kernel") == 1


def test_auto_chooses_while_compiling() -> None:
    """Without CUDA kernels in the library the rule takes Triton."""
    graphs = Graphs()
    with FakeTensorMode():
        x = torch.empty(2, 16, 8, 6, device="cuda")
        w = torch.empty(24, 16, 3, 3, device="cuda")
        torch.compile(conv2d_act, fullgraph=True, backend=graphs.backend())(x, w)
    from segpose_kernels import backends

    if not backends.LIBRARY.has_kernels_for("CUDA"):
        assert launches(graphs.forward[0]) == ["igemm_kernel"]


def test_compiler_sees_the_sources_of_the_kernels() -> None:
    """So that its caches know when a kernel changes."""
    from torch._library.triton import get_triton_kernels_for_op

    from segpose_kernels.triton.ops import NAMESPACE

    forward = {
        "igemm_kernel",
        "direct_kernel",
        "bias_activation_kernel",
        "reduced_last_kernel",
    }
    backward = {
        "igemm_kernel",
        "direct_kernel",
        "wgrad_kernel",
        "direct_wgrad_kernel",
        "mask_kernel",
        "reduce_kernel",
        "reduced_last_kernel",
    }
    for name in ("conv2d_act", "conv_transpose2d_act"):
        for suffix, expected in (("", forward), ("_backward", backward)):
            kernels: list[Any] = get_triton_kernels_for_op(f"{NAMESPACE}::{name}{suffix}")
            assert {kernel.__name__ for kernel in kernels} == expected
