# SPDX-License-Identifier: BSD-3-Clause
"""What tuning measures, chooses and keeps, its files, and `segpose tune`."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import tritonsim

from segpose_kernels import conv2d_act
from segpose_kernels.__main__ import main
from segpose_kernels.triton import choices, tuning
from segpose_kernels.triton.plan import Choice, Epilogue, Operands
from segpose_kernels.triton.problem import ConvProblem
from segpose_kernels.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("own_cache")

DEVICE = replace(tritonsim.device(80), name="Test GPU 40GB")
OPERANDS = Operands(torch.float16, "tf32", DEVICE)
CHOICE = Choice("igemm", Tile(64, 32, 32, 4, 3), 4)


# Files ---------------------------------------------------------------------------------------


def test_choices_outlive_the_process() -> None:
    choices.remember(OPERANDS, "a key", CHOICE)
    choices.forget_loaded()
    assert choices.recall(OPERANDS, "a key") == CHOICE
    assert choices.recall(OPERANDS, "another") is None


def test_a_file_for_each_device_and_set_of_versions(own_cache: Path) -> None:
    choices.remember(OPERANDS, "a key", CHOICE)
    other = OPERANDS._replace(device=replace(DEVICE, name="Other"))
    assert choices.recall(other, "a key") is None
    (file,) = own_cache.iterdir()
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


def test_readers_never_see_half_a_file(own_cache: Path) -> None:
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
    assert [path.suffix for path in own_cache.iterdir()] == [".json"], "no partial file is left"


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
    params: tuple[Any, ...] = ((1, 1), (0, 0), (1, 1), 1, 0.1)
    if label == "conv_transpose2d":
        params = ((1, 1), (0, 0), (0, 0), 1, (1, 1), 0.1)
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


def test_random_numbers_are_the_programs() -> None:
    x, w = torch.randn(2, 40, 5, 6).half(), torch.randn(24, 40, 1, 1).half()
    state = torch.get_rng_state()
    params = (1, 1), (0, 0), (1, 1), 1, 0.1
    with tritonsim.simulated(80):
        for work in tuning.passes_of_call("conv2d", x, w, None, params, (True, True, False)):
            tuning.tune(work, measure=lambda do: float(do() is None))
    assert torch.equal(torch.get_rng_state(), state)


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
        choices.gather_key(p, "fprop", OPERANDS._replace(dtype=torch.float32), Epilogue()),
        choices.gather_key(
            p, "fprop", OPERANDS._replace(dtype=torch.float32, precision="ieee"), Epilogue()
        ),
        choices.gather_key(replace(p, n=2), "fprop", OPERANDS, Epilogue()),
        choices.wgrad_key(p, OPERANDS, False),
        choices.wgrad_key(p, OPERANDS, True),
    }
    assert len(keys) == 9
    assert choices.gather_key(p, "fprop", OPERANDS, Epilogue(slope=0.1)) in keys


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
    assert run("segnet", "--device", "cuda") == 1
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
        assert tune.tune_calls(calls, torch.float16, training=True, force=False) == 0
        out = capsys.readouterr().out
        assert "3 passes measured" in out
        assert "fprop float16 fused" in out
        assert tune.tune_calls(calls, torch.float16, training=True, force=False) == 0
        assert "0 passes measured" in capsys.readouterr().out
