# SPDX-License-Identifier: BSD-3-Clause
"""What is measured, chosen and kept: tuning, its files, the rule for "auto", benchmark mode."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tritonsim

import segpose_kernels
from segpose_kernels import auto, backends, conv2d_act, fastest, functional
from segpose_kernels.__main__ import main
from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.numerics import assert_results_match
from segpose_kernels.testing.spec import ConvSpec
from segpose_kernels.triton import choices, tuning
from segpose_kernels.triton.device import Device
from segpose_kernels.triton.plan import Choice, Epilogue, Operands
from segpose_kernels.triton.problem import ConvProblem
from segpose_kernels.triton.tiles import Tile

DEVICE = replace(tritonsim.device(80), name="Test GPU 40GB")
OPERANDS = Operands(torch.float16, "tf32", DEVICE)
CHOICE = Choice("igemm", Tile(64, 32, 32, 4, 3), 4)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SEGPOSE_CACHE_DIR", str(tmp_path / "cache"))
    choices.forget_loaded()
    yield tmp_path / "cache"
    choices.forget_loaded()


# Files ---------------------------------------------------------------------------------------


def test_choices_outlive_the_process() -> None:
    choices.remember(OPERANDS, "a key", CHOICE)
    choices.forget_loaded()
    assert choices.recall(OPERANDS, "a key") == CHOICE
    assert choices.recall(OPERANDS, "another") is None


def test_a_file_for_each_device_and_set_of_versions(own_folder: Path) -> None:
    choices.remember(OPERANDS, "a key", CHOICE)
    other = replace(OPERANDS, device=replace(DEVICE, name="Other"))
    assert choices.recall(other, "a key") is None
    (file,) = own_folder.iterdir()
    assert file.name.startswith("triton-Test-GPU-40GB-")
    content = json.loads(file.read_text())
    assert content["device"]["capability"] == [8, 0]
    assert set(content["versions"]) == {"torch", "cuda", "triton", "kernels"}
    changed = choices._versions() | {"triton": "0.0"}
    with mock.patch.object(choices, "_versions", return_value=changed):
        choices.forget_loaded()
        assert choices.recall(OPERANDS, "a key") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"entries": {"a key": {}}}', "\x00"])
def test_an_unreadable_file_is_measured_again(content: str) -> None:
    choices.remember(OPERANDS, "a key", CHOICE)
    choices.store_of(DEVICE).path.write_text(content)
    choices.forget_loaded()
    assert choices.recall(OPERANDS, "a key") is None
    choices.remember(OPERANDS, "a key", CHOICE)
    choices.forget_loaded()
    assert choices.recall(OPERANDS, "a key") == CHOICE


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setenv("SEGPOSE_CACHE_DIR", str(taken))
    choices.remember(OPERANDS, "a key", CHOICE)
    assert choices.recall(OPERANDS, "a key") == CHOICE


def test_readers_never_see_half_a_file(own_folder: Path) -> None:
    """Writers in threads; a reader that parses the file all the time."""
    store = choices.store_of(DEVICE)
    store.put("first", CHOICE)
    stop = threading.Event()
    failures: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads(store.path.read_text())
            except ValueError as error:
                failures.append(error)

    def write(number: int) -> None:
        for i in range(20):
            store.put(f"{number}-{i}", CHOICE)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not failures
    choices.forget_loaded()
    assert len(choices.store_of(DEVICE)) == 61
    assert [path.suffix for path in own_folder.iterdir()] == [".json"], "no partial file is left"


def _put_from_another_process(key: str) -> None:
    choices.store_of(DEVICE).put(key, CHOICE)


def test_processes_add_to_one_file() -> None:
    choices.remember(OPERANDS, "mine", CHOICE)
    process = multiprocessing.get_context("spawn").Process(
        target=_put_from_another_process, args=("theirs",)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    choices.remember(OPERANDS, "mine too", CHOICE)
    choices.forget_loaded()
    assert len(choices.store_of(DEVICE)) == 3


# Tuning --------------------------------------------------------------------------------------


def passes(label: str, needs: tuple[bool, bool, bool], r: int = 1) -> list[tuning.Pass]:
    x = torch.randn(2, 40, 5, 6).half()
    w = torch.randn(*((24, 40) if label == "conv2d" else (40, 24)), r, r).half()
    params: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1, 0.1)
    if label == "conv_transpose2d":
        params = ([1, 1], [0, 0], [0, 0], 1, [1, 1], 0.1)
    return tuning.passes_of_call(label, x, w, torch.randn(24).half(), params, needs)


@pytest.mark.parametrize("label", ["conv2d", "conv_transpose2d"])
def test_every_candidate_computes_the_same(label: str) -> None:
    """Each candidate of each pass runs, the library's among them, and agrees with the first."""
    with tritonsim.simulated(80):
        for work in passes(label, (True, True, True)):
            assert len(work.candidates) > 1
            results = []

            def keep(do: Callable[[], object], results: list[Any] = results) -> float:
                results.append(do())
                return float(len(results))

            choice, time = tuning.tune(work, measure=keep)
            assert (choice, time) == (work.candidates[0], 1.0)
            first, *rest = (r[0] if isinstance(r, tuple) else r.clone() for r in results)
            assert len(rest) == len(work.candidates) - 1
            for other in rest:
                torch.testing.assert_close(other, first, rtol=4e-3, atol=4e-3)


def test_library_is_a_candidate_where_the_gradient_is_not_masked() -> None:
    with tritonsim.simulated(80):
        forward, grad_input, grad_weight = passes("conv2d", (True, True, True))
        assert Choice("library") in forward.candidates
        assert Choice("library") not in grad_input.candidates  # 1x1: masked where it is loaded
        _, grad_input, grad_weight = passes("conv2d", (True, True, False), r=3)
        assert Choice("library") in grad_input.candidates
        assert Choice("library") in grad_weight.candidates


def tile_of(simulator: tritonsim.Simulator) -> Tile:
    """The tile of the last launch."""
    used = simulator.launches[-1].arguments
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return Tile(*(used[name] for name in names))


def test_the_fastest_is_remembered_and_used() -> None:
    with tritonsim.simulated(80) as simulator:
        work = passes("conv2d", (False, False, False))[0]
        wanted = work.candidates[1]
        assert not work.is_known

        def measure(do: Callable[[], object]) -> float:
            do()
            return -float(tile_of(simulator) == wanted.tile)

        choice, _ = tuning.tune(replace(work, candidates=work.candidates[:2]), measure=measure)
        assert choice == wanted
        assert work.is_known
        x, w = torch.randn(2, 40, 5, 6).half(), torch.randn(24, 40, 1, 1).half()
        conv2d_act(x, w, torch.randn(24).half(), negative_slope=0.1, backend="triton")
        assert tile_of(simulator) == wanted.tile


def test_candidates_that_do_not_run_are_left_out() -> None:
    with tritonsim.simulated(80):
        work = passes("conv2d", (False, False, False))[0]
        tried = []

        def measure(do: Callable[[], object]) -> float:
            tried.append(do)
            if len(tried) != 2:
                raise RuntimeError("out of resource: shared memory")
            return 1.0

        choice, _ = tuning.tune(work, measure=measure)
        assert choice == work.candidates[1]
        with pytest.raises(
            RuntimeError, match=r"no kernel runs fprop float16 fused: .*shared memory"
        ):
            tuning.tune(work, measure=mock.Mock(side_effect=RuntimeError("shared memory")))


def test_nothing_is_measured_while_a_graph_is_captured() -> None:
    with tritonsim.simulated(80):
        work = passes("conv2d", (False, False, False))[0]
        with (
            mock.patch.object(tuning, "is_capturing", return_value=True),
            pytest.raises(RuntimeError, match="while a CUDA graph is captured"),
        ):
            tuning.tune(work)


def test_keys_tell_variants_apart() -> None:
    p = ConvProblem(1, 8, 8, 16, 8, 8, 16, 1, 1)
    keys = {
        choices.gather_key(p, "fprop", OPERANDS, Epilogue()),
        choices.gather_key(p, "dgrad", OPERANDS, Epilogue()),
        choices.gather_key(p, "fprop", OPERANDS, Epilogue(bias=True)),
        choices.gather_key(p, "fprop", OPERANDS, Epilogue(mask_slope=0.1)),
        choices.gather_key(p, "fprop", replace(OPERANDS, dtype=torch.float32), Epilogue()),
        choices.gather_key(
            p, "fprop", replace(OPERANDS, dtype=torch.float32, precision="ieee"), Epilogue()
        ),
        choices.gather_key(replace(p, n=2), "fprop", OPERANDS, Epilogue()),
        choices.wgrad_key(p, OPERANDS, False),
        choices.wgrad_key(p, OPERANDS, True),
    }
    assert len(keys) == 9
    assert choices.gather_key(p, "fprop", OPERANDS, Epilogue(slope=0.1)) in keys


# The rule for "auto" -------------------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends a device, and kernels for the backends named."""

    def pretend(capability: tuple[int, int], *built: str) -> None:
        table = tuple(
            replace(b, missing=None if b.name in built else "not built")
            if b.name in ("cuda", "triton")
            else b
            for b in backends.BACKENDS
        )
        monkeypatch.setattr(auto, "BACKENDS", table)
        monkeypatch.setattr(backends, "BACKENDS", table)
        monkeypatch.setattr(backends, "_BY_NAME", {b.name: b for b in table})
        monkeypatch.setattr(backends, "_selected", {})
        monkeypatch.setattr(auto, "device_of", lambda _: Device.generic(capability))

    return pretend


F16, F32, F64 = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "large", "expected"),
    [
        ((8, 0), ("cuda", "triton"), F16, True, "cuda"),
        ((8, 6), ("cuda", "triton"), F32, True, "cuda"),
        ((9, 0), ("cuda", "triton"), F16, True, "triton"),
        ((9, 0), ("cuda", "triton"), F32, True, "triton"),
        ((9, 0), ("cuda", "triton"), F16, False, "cuda"),
        ((10, 0), ("cuda", "triton"), F16, True, "triton"),
        ((12, 0), ("cuda", "triton"), F16, True, "cuda"),
        ((9, 0), ("cuda", "triton"), F64, True, "cuda"),
        ((8, 0), ("triton",), F16, False, "triton"),
        ((8, 0), ("triton",), F64, False, "aten"),
        ((9, 0), ("cuda",), F16, True, "cuda"),
        ((7, 5), ("cuda", "triton"), F16, True, "aten"),
        ((8, 0), (), F16, True, "aten"),
        ((8, 0), ("cuda", "triton"), torch.int32, True, "aten"),
        ((8, 0), ("cuda", "triton"), torch.complex64, True, "aten"),
    ],
)
def test_rule(
    gpu: Callable[..., None],
    capability: tuple[int, int],
    built: tuple[str, ...],
    dtype: torch.dtype,
    large: bool,
    expected: str,
) -> None:
    gpu(capability, *built)
    assert auto.choose("auto", CUDA, dtype, large) == expected


def test_true_float32_has_no_tensor_cores_to_prefer(gpu: Callable[..., None]) -> None:
    gpu((9, 0), "cuda", "triton")
    with mock.patch.object(auto, "float32_precision", return_value="ieee"):
        assert auto.choose("auto", CUDA, F32, True) == "cuda"


def test_argument_and_environment_overrule(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0), "cuda", "triton")
    assert auto.choose("aten", CUDA, F16, True) == "aten"
    assert auto.choose("cuda", CUDA, F16, True) == "cuda"
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "aten")
    assert auto.choose("auto", CUDA, F16, True) == "aten"
    assert auto.choose("triton", CUDA, F16, True) == "triton"


def test_a_backend_that_cannot_run_says_why(gpu: Callable[..., None]) -> None:
    gpu((7, 5), "triton")
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 .*has 7.5"):
        auto.choose("triton", CUDA, F16, True)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: not built"):
        auto.choose("cuda", CUDA, F16, True)
    with pytest.raises(ValueError, match="backend must be one of"):
        auto.choose("cudnn", CUDA, F16, True)


@pytest.mark.parametrize(
    ("shape", "groups", "large"),
    [((64, 64, 3, 3), 1, True), ((64, 63, 3, 3), 1, False), ((128, 64, 1, 1), 2, False)],
)
def test_large(shape: tuple[int, ...], groups: int, large: bool) -> None:
    assert auto.is_large(torch.empty(shape), groups) is large


# Benchmark mode ------------------------------------------------------------------------------


@pytest.fixture
def benchmark_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fastest, "_winners", {})
    segpose_kernels.benchmark = True
    yield
    segpose_kernels.benchmark = False


def runners(label: str) -> dict[str, Any]:
    return {"conv2d": functional._CONV2D, "conv_transpose2d": functional._CONV_TRANSPOSE2D}[
        label
    ].runners


def choose(x: Tensor, w: Tensor, b: Tensor | None = None, default: str = "default") -> str:
    params = (1, 1), (0, 0), (1, 1), 1, 0.1
    return fastest.choose("conv2d", runners("conv2d"), x, w, b, params, default)


@pytest.mark.usefixtures("benchmark_mode")
class TestBenchmark:
    """On simulated kernels: CPU tensors stand for CUDA ones, and given numbers for times."""

    @pytest.fixture(autouse=True)
    def simulated_gpu(
        self, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        gpu((8, 0), "triton")
        monkeypatch.setattr(fastest, "device_of", lambda _: tritonsim.device(80))
        monkeypatch.setattr(tuning, "measure_ms", lambda do: float(do() is None))
        with tritonsim.simulated(80):
            yield

    def test_the_setting_is_the_packages(self) -> None:
        assert segpose_kernels.benchmark is True
        assert fastest.is_wanted("auto")
        assert not fastest.is_wanted("triton")
        segpose_kernels.benchmark = False
        assert not fastest.is_wanted("auto")

    @pytest.mark.parametrize("winner", ["triton", "aten"])
    def test_the_fastest_is_kept(self, winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
        timed: list[int] = []

        def measure(do: Callable[[], object]) -> float:
            do()
            timed.append(len(timed))
            # The order of the candidates: triton, aten.
            return {"triton": len(timed), "aten": -len(timed)}[winner]

        monkeypatch.setattr(fastest, "measure_ms", measure)
        x, w = torch.randn(1, 16, 5, 5).half(), torch.randn(8, 16, 1, 1).half()
        assert choose(x, w) == winner
        assert len(timed) == 2
        assert choose(x.clone(), w) == winner
        assert len(timed) == 2, "a known problem is not measured again"
        choose(x[:, :, 1:], w)
        assert len(timed) == 4, "another shape is another problem"

    def test_gradients_are_measured_with_the_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results: list[object] = []
        monkeypatch.setattr(fastest, "measure_ms", lambda do: float(results.append(do()) is None))
        x, w = torch.randn(1, 16, 5, 5).half(), torch.randn(8, 16, 1, 1).half().requires_grad_()
        choose(x, w, torch.randn(8).half().requires_grad_())
        assert [[g.shape for g in r] for r in results] == [[w.shape, (8,)]] * 2  # type: ignore[attr-defined]
        with torch.no_grad():
            choose(x, w, torch.randn(8).half())
        assert isinstance(results[-1], Tensor)

    def test_nothing_is_measured_where_nothing_may_be(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            fastest, "measure_ms", mock.Mock(side_effect=AssertionError("measured"))
        )
        x, w = torch.randn(1, 16, 5, 5).half(), torch.randn(8, 16, 1, 1).half()
        with mock.patch.object(fastest, "is_capturing", return_value=True):
            assert choose(x, w) == "default"
        torch.use_deterministic_algorithms(True)
        try:
            assert choose(x, w) == "default"
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.func.vmap(lambda x: torch.tensor(len(choose(x, w))), out_dims=None)(
            x[None]
        ) == len("default")

    def test_what_was_chosen_is_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever tuning chose for each pass, the gradients are."""
        order = iter(range(10_000))
        # The last candidate of each pass: the library, where it is one.
        monkeypatch.setattr(tuning, "measure_ms", lambda do: (do(), -float(next(order)))[1])
        monkeypatch.setattr(fastest, "measure_ms", lambda do: (do(), 1.0)[1])
        spec = ConvSpec("library", "conv2d", 2, 16, 24, 6, 5, (3, 3), padding=(1, 1))
        tensors = spec.make_tensors(torch.float16, input_layout="channels_last")
        leaves = [
            t.requires_grad_()
            for t in (tensors.input, tensors.weight, tensors.bias)
            if t is not None
        ]
        params = (1, 1), (1, 1), (1, 1), 1, 0.01
        name = fastest.choose(
            "conv2d", runners("conv2d"), leaves[0], leaves[1], leaves[2], params, ""
        )
        assert name == "triton"
        results = run_fused(spec, tensors, backend="triton")
        assert_results_match(spec, tensors, results)


# The command ---------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    try:
        return main(("tune", *arguments))
    except SystemExit as error:
        return int(error.code or 0)


def test_command_lists_layers_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("segnet", "--list", "--input", "8,1,28,28") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0] == "conv2d of 8x1x28x28 by 16x1x3x3"
    assert lines[-1] == "conv_transpose2d of 8x16x14x14 by 16x10x3x3"


def tiny() -> torch.nn.Module:
    """What MODULE:CALLABLE may name."""
    return torch.nn.Sequential(torch.nn.Conv2d(16, 24, 1), torch.nn.ReLU())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "MODEL must be one of autoencoder, segnet, cpm2dpose"),
        (("os:nothing",), "cannot make os:nothing"),
        (("os:getcwd",), "gave str, not a torch.nn.Module"),
        (("segnet", "--input", "1,2"), "must be N,C,H,W, got '1,2'"),
        ((f"{__name__}:tiny",), "--input N,C,H,W is needed"),
    ],
    ids=["unknown", "no-attribute", "not-a-module", "shape", "no-shape"],
)
def test_command_refuses(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("segnet") == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_command_tunes_and_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On simulated kernels: tensors on the CPU, given numbers for times."""
    pytest.importorskip("rich")
    from segpose_kernels.triton import tune

    monkeypatch.setattr(tune, "device_of", lambda _: tritonsim.device(80))
    monkeypatch.setattr(tuning, "is_capturing", lambda: False)
    monkeypatch.setattr(tuning, "measure_ms", lambda do: float(do() is None))
    draw = torch.randn
    monkeypatch.setattr(tune.torch, "randn", lambda shape, dtype, device: draw(shape).to(dtype))
    calls = tune.calls_of_model(tiny(), (1, 16, 4, 4), torch.float16)
    with tritonsim.simulated(80):
        assert tune._tune_calls(calls, torch.float16, training=True, force=False) == 0
        out = capsys.readouterr().out
        assert "3 passes measured" in out
        assert "fprop float16 fused" in out
        assert tune._tune_calls(calls, torch.float16, training=True, force=False) == 0
        assert "0 passes measured" in capsys.readouterr().out
