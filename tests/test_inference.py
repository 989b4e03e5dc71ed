# SPDX-License-Identifier: BSD-3-Clause
"""`optimize(mode="inference")`: whole models give the plain model's numbers, call after call."""

from __future__ import annotations

import copy
import threading

import inference_models as nets
import pytest
import swap_flow_models as flow
import swap_models as zoo
import torch
from inference_helpers import Build, assert_same, leaves, optimized, program_of
from swap_helpers import IMAGE
from torch import Tensor, nn

from segpose_kernels import prepared_bytes
from segpose_kernels.backends import LIBRARY
from segpose_kernels.models import Autoencoder, CPM2DPose, JointRegression, SegNet
from segpose_kernels.testing.numerics import relative_l2

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]

# Model, shape of an input, and how often the program holds convolutions, pools, concatenations.
MODELS: tuple[tuple[str, Build, tuple[int, ...], tuple[int, int, int] | None], ...] = (
    ("pose machine", zoo.PoseMachine, IMAGE, (5, 1, 1)),
    ("pose machine, all stages", lambda: zoo.PoseMachine(True), IMAGE, (5, 1, 1)),
    ("U-Net", zoo.UNet, (2, 3, 15, 18), (8, 1, 1)),
    ("ResNet", zoo.ResNet, IMAGE, (6, 0, 0)),
    ("generator", zoo.generator, (2, 6, 1, 1), (2, 0, 0)),
    ("discriminator", zoo.discriminator, (2, 3, 8, 8), (2, 0, 0)),
    ("functional", zoo.Functional, (2, 4, 7, 7), None),
    ("dense", flow.Dense, IMAGE, None),
    ("residual", flow.Residual, IMAGE, None),
    ("branches", flow.Branches, IMAGE, None),
    ("grad mode", zoo.GradMode, IMAGE, None),
    ("in-place skip", zoo.InplaceSkip, IMAGE, None),
    ("taps", lambda: zoo.Taps((0, 3)), IMAGE, None),
    ("slicing", zoo.Slicing, IMAGE, None),
    ("stash", zoo.Stash, IMAGE, None),
    ("data-dependent", zoo.DataDependent, IMAGE, None),
    ("changed outside", flow.ChangedOutside, IMAGE, None),
    ("checkpointed", flow.Checkpointed, IMAGE, None),
    ("VGG with BatchNorm", nets.vgg, (2, 3, 13, 18), (3, 2, 0)),
    ("nested concatenation", nets.NestedCat, (2, 3, 9, 7), (6, 0, 4)),
    ("a value twice in a concatenation", nets.TwiceInOneCat, (1, 3, 9, 7), (3, 0, 2)),
    ("changed concatenation", nets.ChangedConcatenation, IMAGE, (4, 0, 1)),
    ("returned inputs of a concatenation", nets.Returned, (2, 3, 7, 9), (3, 1, 1)),
    ("unpooled value used too", nets.UnpooledToo, (2, 3, 13, 11), (4, 3, 1)),
    ("shared", nets.Shared, (2, 3, 16, 12), (4, 2, 0)),
    ("views", nets.Views, IMAGE, (3, 0, 0)),
    ("slices of computed size", nets.SizedSlices, (2, 3, 10, 9), (3, 0, 0)),
    ("output size", nets.OutputSize, (2, 3, 10, 9), (1, 0, 0)),
    ("paddings", nets.Padded, IMAGE, (4, 0, 0)),
    ("rows chosen by value", nets.Depending, (6, 3, 8, 8), (3, 0, 1)),
    ("branching", nets.Branching, IMAGE, None),
)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("build", "shape", "counts"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS]
)
def test_results_are_the_plain_models(
    build: Build, shape: tuple[int, ...], counts: tuple[int, int, int] | None
) -> None:
    """First and later calls, other batches and sizes in between, an earlier result kept."""
    model, plain, _ = optimized(build().double())
    shapes = [shape, shape, (shape[0] + 1, *shape[1:]), shape]
    if shape[2] > 4:
        shapes += [(*shape[:2], shape[2] + 2, shape[3] + 4), (1, *shape[1:])] * 2
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for call, size in enumerate(shapes):
            x = torch.randn(size, dtype=torch.float64)
            assert_same(model, plain, x, f"in call {call}")
            assert_same(model, plain, x.to(memory_format=torch.channels_last), f"in call {call}")
            found = leaves(model(x))
            kept += [(value, value.clone()) for value in found]
    # A result belongs to the caller: later calls leave it alone.
    assert all(torch.equal(value, before) for value, before in kept)
    if counts is not None:
        kinds = [type(step).__name__ for step in program_of(model).steps.steps]
        assert tuple(kinds.count(n) for n in ("ConvStep", "PoolStep", "CatStep")) == counts


LECTURE: tuple[tuple[str, Build, tuple[int, ...]], ...] = (
    ("autoencoder", Autoencoder, (3, 1, 28, 28)),
    ("segnet", lambda: SegNet(10), (3, 1, 28, 28)),
    ("cpm2dpose", lambda: CPM2DPose(width=0.25), (1, 3, 72, 56)),
    ("cpm2dpose-stages", lambda: CPM2DPose(14, all_stages=True, width=0.2), (2, 3, 64, 64)),
    ("joint-regression", JointRegression, (2, 3, 128, 128)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("build", "shape"), [row[1:] for row in LECTURE], ids=[row[0] for row in LECTURE]
)
def test_lecture_models(build: Build, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """float32: within 1e-5 or twice torch's own error; the others within twice torch's."""
    model, plain, report = optimized(build().to(dtype))
    exact = copy.deepcopy(plain).double()
    assert not report.skipped
    assert report.graphs[""].startswith("one graph")
    floor = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    with torch.no_grad():
        for batch in (shape[0], shape[0], shape[0] + 2):
            x = torch.rand(batch, *shape[1:]).to(dtype)
            results = zip(
                leaves(model(x)), leaves(plain(x)), leaves(exact(x.double())), strict=True
            )
            for value, theirs, reference in results:
                assert value.shape == theirs.shape
                assert value.stride() == theirs.stride()
                error = relative_l2(value, reference)
                assert error <= max(floor, 2 * relative_l2(theirs, reference))


def test_in_place_writes_go_where_the_graph_shows_them() -> None:
    """Nothing of the pose machine is copied but what two concatenations share."""
    model, _, _ = optimized(CPM2DPose(width=0.1))
    program = program_of(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    ((_, blueprint),) = program._blueprints
    assert all(instruction.kind != "step" for instruction in blueprint.code)
    copies = [instruction.copies for instruction in blueprint.code if instruction.kind == "cat"]
    assert [len(c) for c in copies] == [1, 0] or [len(c) for c in copies] == [0, 1]
    notes = program.notes()
    assert [n for n in notes if "max-pool" in notes[n]] == ["conv1_2", "conv2_2", "conv3_4"]
    assert {"conv4_7", "conv5_2", "conv6_7"} == {n for n in notes if "concat" in notes[n]}


def test_arena_is_smaller_than_all_activations_together() -> None:
    model, _, _ = optimized(nn.Sequential(*(nets.conv(8, 8) for _ in range(10))))
    with torch.no_grad():
        model(torch.randn(1, 8, 32, 32))
    ((_, blueprint),) = program_of(model)._blueprints
    assert blueprint.arena_bytes == 2 * 8 * 32 * 32 * 4


def test_nothing_is_left_over_from_the_call_before() -> None:
    """Arenas of NaN give the same numbers: each value is written before it is read."""
    model, plain, _ = optimized(nets.NestedCat().double())
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        model(x), model(x)
        for frame in program_of(model)._idle:
            frame.arena.fill_(0xFF)
        assert program_of(model)._idle
        assert_same(model, plain, x)


def test_two_models_and_sizes_interleaved() -> None:
    first, plain_first, _ = optimized(zoo.PoseMachine().double())
    second, plain_second, _ = optimized(zoo.UNet().double())
    with torch.no_grad():
        for size in (16, 24, 16, 18, 24, 16):
            x = torch.randn(1, 3, size, size, dtype=torch.float64)
            assert_same(first, plain_first, x, f"size {size}")
            assert_same(second, plain_second, x, f"size {size}")


def test_shapes_that_differ_inside_the_model() -> None:
    """Inputs of one shape whose inner shapes are others each time."""
    model, plain, _ = optimized(nets.Depending().double())
    with torch.no_grad():
        for rows in (3, 3, 5, 1, 3, 6, 0, 3):
            x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
            x[:, 0, 0, 0] = -1
            x[:rows, 0, 0, 0] = 1
            assert_same(model, plain, x, f"{rows} rows")


def test_threads_calling_at_once() -> None:
    """Images large enough for the calls to overlap, most of one shape."""
    model, plain, _ = optimized(zoo.PoseMachine(True).double())
    inputs = [torch.randn(1, 3, 96 + 2 * (i == 5), 96).double() for i in range(6)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
    failures: list[str] = []
    start = threading.Barrier(4)

    def call(number: int) -> None:
        start.wait()
        with torch.no_grad():
            for i in range(20):
                which = (number + i) % len(inputs)
                for value, reference in zip(model(inputs[which]), expected[which], strict=True):
                    if not torch.allclose(value, reference, rtol=1e-9, atol=1e-9):
                        failures.append(f"thread {number}, call {i}")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_gradients_and_training_paths_are_untouched() -> None:
    model, plain, _ = optimized(zoo.PoseMachine().double())
    x = torch.randn(IMAGE, dtype=torch.float64)
    for net in (model, plain):
        net(x).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    assert prepared_bytes(model) == 0
    for net in (model, plain):
        net.requires_grad_(False)
    assert_same(model, plain, x, "without gradients but in grad mode")
    assert prepared_bytes(model) > 0
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(net(x).square().sum(), x)[0] for net in (model, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("how", ["inference_mode", "autocast", "vmap", "compile", "export"])
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:There is a performance drop")
def test_other_ways_to_run(how: str) -> None:
    model, plain, _ = optimized(zoo.PoseMachine())
    x = torch.randn(IMAGE)
    with torch.no_grad():
        model(x), model(x)
        expected = plain(x)
        if how == "inference_mode":
            with torch.inference_mode():
                found = model(x).clone()
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        elif how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found = model(x)
                assert found.dtype == torch.bfloat16
                expected = plain(x)
        elif how == "vmap":
            found = torch.func.vmap(model)(x.unsqueeze(1)).squeeze(1)
        elif how == "compile":
            torch._dynamo.reset()
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        else:
            found = torch.export.export(model, (x,)).module()(x)
    tolerance = 3e-2 if how == "autocast" else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_first_call_inside_inference_mode() -> None:
    """What is kept from it serves calls outside, too."""
    model, plain, _ = optimized(zoo.PoseMachine().double())
    x = torch.randn(IMAGE, dtype=torch.float64)
    with torch.inference_mode():
        model(x), model(x)
    with torch.no_grad():
        assert_same(model, plain, x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_unusual_inputs() -> None:
    model, plain, _ = optimized(zoo.PoseMachine().double())
    with torch.no_grad():
        for x in (
            torch.randn(0, 3, 16, 16),
            torch.randn(2, 16, 16, 3).permute(0, 3, 1, 2),
            torch.randn(2, 6, 16, 16)[:, ::2],
            torch.randn(1, 3, 1, 16).expand(2, 3, 16, 16),
        ):
            for _ in range(2):
                assert_same(model, plain, x.double(), str(tuple(x.shape)))
        for _ in range(2):
            assert torch.equal(model(x=x.double()), model(x.double()))
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(1, 4, 16, 16).double())
        with pytest.raises(RuntimeError, match="float32"):
            model(torch.randn(1, 3, 16, 16))
        with pytest.raises(TypeError):
            model(x, x)
    model, plain, _ = optimized(nets.vgg().double())
    with torch.no_grad():
        x = torch.randn(3, 16, 16, dtype=torch.float64)
        # torch's BatchNorm2d takes no unbatched input, so the plain model gets a batch of one.
        for _ in range(2):
            torch.testing.assert_close(model(x), plain(x.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize(
    ("build", "channels"),
    [(lambda: SegNet(3), 1), (zoo.PoseMachine, 3), (nets.Returned, 3)],
    ids=["SegNet", "PoseMachine", "Returned"],
)
def test_results_keep_the_callers_format_and_their_values(build: Build, channels: int) -> None:
    """Memory formats as without `optimize`; a later run writes into no result of an earlier one."""
    model, plain, _ = optimized(build().double())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = [torch.randn(2, channels, 28, 28, dtype=torch.float64) for _ in range(4)]
        images = [image.contiguous(memory_format=memory_format) for image in images]
        with torch.no_grad():
            results = [leaves(model(image)) for image in images]
            for image, found in zip(images, results, strict=True):
                for value, expected in zip(found, leaves(plain(image)), strict=True):
                    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
                    if image.is_contiguous():
                        assert value.is_contiguous()
