# SPDX-License-Identifier: BSD-3-Clause
"""Numbers do not depend on threads: not on how many, not on who calls, not on the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segpose_kernels.testing.fused import call_fused, run_fused
from segpose_kernels.testing.problems import GEOMETRIES, ConvSpec, by_name

Results = dict[str, Tensor]

# Enough work to be split among threads, in each pass and algorithm.
WORK = tuple(
    by_name(name)
    for name in (
        "segnet-encoder2",
        "segnet-decoder2",
        "segnet-decoder3",
        "segnet-decoder1",
        "transposed-keypoint-rcnn",
        "transposed-simple-baseline-3",
        "transposed-fcn-x8",
        "cpm-conv4_7",
        "cpm-conv5_2",
        "cpm-conv6_7",
    )
)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_bitwise_equal(actual: Results, expected: Results, when: str) -> None:
    for name, value in expected.items():
        # As bytes: equal() would call two NaN different and +0 and -0 the same.
        assert torch.equal(as_bytes(actual[name]), as_bytes(value)), f"{name} differs {when}"


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", WORK, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    spec: ConvSpec, dtype: torch.dtype, generator: torch.Generator
) -> None:
    tensors = spec.make_tensors(dtype, generator=generator)
    torch.set_num_threads(1)
    expected = run_fused(spec, tensors)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_bitwise_equal(run_fused(spec, tensors), expected, f"with {threads} threads")


@pytest.mark.parametrize("spec", GEOMETRIES, ids=str)
def test_small_problems_too(spec: ConvSpec, generator: torch.Generator) -> None:
    tensors = spec.make_tensors(torch.float64, generator=generator)
    torch.set_num_threads(1)
    expected = run_fused(spec, tensors)
    torch.set_num_threads(3)
    assert_bitwise_equal(run_fused(spec, tensors), expected, "with 3 threads")


@pytest.mark.parametrize("spec", WORK[:5], ids=str)
def test_repeated_calls_are_bitwise_equal(spec: ConvSpec, generator: torch.Generator) -> None:
    torch.set_num_threads(2)
    tensors = spec.make_tensors(generator=generator)
    expected = run_fused(spec, tensors)
    for i in range(5):
        assert_bitwise_equal(run_fused(spec, tensors), expected, f"in repetition {i}")


def test_four_python_threads(generator: torch.Generator) -> None:
    """Four threads call different problems twenty times each, at once; no call disturbs another."""
    specs = [by_name(n) for n in ("conv-k3s2", "transposed-k4s2", "segnet-decoder3", "conv-d2s3")]
    tensors = [spec.make_tensors(generator=generator) for spec in specs]
    expected = [run_fused(s, t) for s, t in zip(specs, tensors, strict=True)]
    start = threading.Barrier(4)
    failures: list[BaseException] = []
    finished: list[int] = []

    def work(offset: int) -> None:
        try:
            start.wait(timeout=60)
            for call in range(20):
                i = (offset + call) % 4
                results = run_fused(specs[i], tensors[i])
                assert_bitwise_equal(results, expected[i], f"in thread {offset}, call {call}")
            finished.append(offset)
        except BaseException as error:  # an exception in a thread is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures, failures[0]
    assert sorted(finished) == [0, 1, 2, 3]


class Convolved(Dataset[Tensor]):
    """Item i: a problem computed inside the worker that asks for it, from seed i."""

    specs = ("conv-k3s2", "transposed-k4s2", "segnet-decoder3-reduced", "conv-depthwise")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        spec = by_name(self.specs[index % len(self.specs)])
        tensors = spec.make_tensors(generator=torch.Generator().manual_seed(index))
        results = run_fused(spec, tensors)
        return torch.cat([value.flatten() for value in results.values()])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str) -> None:
    """Workers of both kinds compute what this process computes; a hang is an error in a minute."""
    torch.set_num_threads(2)
    data = Convolved()
    # The pool of this process runs before it forks: a child must not wait for threads it lost.
    spec = by_name("segnet-decoder3")
    tensors = spec.make_tensors()
    call_fused(spec, tensors.input, tensors.weight, tensors.bias)
    expected = [data[i] for i in range(len(data))]
    loader = DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60
    )
    for i, (actual, reference) in enumerate(zip(loader, expected, strict=True)):
        assert torch.equal(actual, reference), f"item {i} differs in a {context} worker"
