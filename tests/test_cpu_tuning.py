# SPDX-License-Identifier: BSD-3-Clause
"""Algorithms chosen by measuring on the CPU: what is chosen runs, is right, is kept, and by key."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import segpose_kernels
from segpose_kernels import _plan, cpu_choices, cpu_tuning, fastest, optimize, stored_choices
from segpose_kernels.__main__ import main
from segpose_kernels.backends import LIBRARY
from segpose_kernels.cpu_choices import PassKey
from segpose_kernels.testing.fused import call_fused, run_fused
from segpose_kernels.testing.numerics import assert_results_match
from segpose_kernels.testing.plans import problem_of
from segpose_kernels.testing.problems import ConvSpec, by_name

pytestmark = [
    pytest.mark.skipif(not LIBRARY.has_kernels_for("CPU"), reason="the C++ library is not loaded"),
    pytest.mark.usefixtures("own_cache"),
]

SPEC = replace(by_name("cpm-conv3_1"), h=20, w=17, c_in=40, c_out=48)  # winograd, igemm and more


def key_of(spec: ConvSpec, op: str = "fprop", *, prepared: bool = False) -> PassKey:
    return PassKey(tuple(problem_of(spec).numbers), op, "float32", "highest", prepared)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[PassKey, str]]]:
    """Passes as they are measured; benchmark mode is on."""
    found: list[tuple[PassKey, str]] = []

    def watch(key: PassKey, algorithm: str, seconds: float) -> None:
        assert seconds > 0
        found.append((key, algorithm))

    monkeypatch.setattr(fastest, "enabled", True)
    monkeypatch.setattr(fastest, "_winners", {})
    cpu_tuning.watchers.append(watch)
    yield found
    cpu_tuning.watchers.remove(watch)


def algorithms(spec: ConvSpec) -> list[str]:
    return cpu_tuning._candidates(problem_of(spec), key_of(spec))


def test_a_choice_decides_what_runs() -> None:
    """Each algorithm rounds in its own way, and forced it gives the same bits as chosen."""
    tensors = SPEC.make_tensors(torch.float32)
    names = algorithms(SPEC)
    assert len(names) >= 2
    for name in names:
        torch.ops.segpose.set_algorithm(name)
        forced = call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)
        torch.ops.segpose.set_algorithm("")
        cpu_choices.choose(key_of(SPEC), name)
        chosen = call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)
        assert torch.equal(forced, chosen), name
    cpu_choices.choose(key_of(SPEC), "")
    predicted = call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)
    torch.ops.segpose.set_algorithm(names[0])
    assert torch.equal(predicted, call_fused(SPEC, tensors.input, tensors.weight, tensors.bias))
    torch.ops.segpose.set_algorithm("")


@pytest.mark.parametrize(
    "other",
    [
        key_of(replace(SPEC, h=21)),
        key_of(SPEC, "dgrad"),
        key_of(SPEC, prepared=True),
        replace(key_of(SPEC), dtype="bfloat16"),
        replace(key_of(SPEC), precision="medium"),
    ],
    ids=["problem", "pass", "prepared", "dtype", "precision"],
)
def test_a_choice_holds_for_its_key_only(other: PassKey) -> None:
    tensors = SPEC.make_tensors(torch.float32)
    names = algorithms(SPEC)
    before = call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)
    cpu_choices.choose(key_of(SPEC), names[1])
    assert not torch.equal(before, call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)), (
        "the test needs an algorithm that rounds differently"
    )
    cpu_choices.choose(key_of(SPEC), "")
    cpu_choices.choose(other, names[1])
    assert torch.equal(before, call_fused(SPEC, tensors.input, tensors.weight, tensors.bias))
    cpu_choices.choose(other, "")


@pytest.mark.parametrize("name", ["conv-k3s2", "conv-groups2", "transposed-k4s2"])
def test_tuned_passes_are_right(
    name: str, measured: list[tuple[PassKey, str]], generator: torch.Generator
) -> None:
    spec = by_name(name)
    tensors = spec.make_tensors(torch.float32, generator=generator)
    results = run_fused(spec, tensors, backend="auto")
    assert_results_match(spec, tensors, results)
    ops = {key.op for key, _ in measured}
    assert ops == {"fprop", "dgrad", "wgrad"}
    again = run_fused(spec, tensors, backend="auto")
    assert len(measured) == 3, "measured once"
    for label, tensor in results.items():
        assert torch.equal(tensor, again[label]), label


def test_choices_outlive_the_process(own_cache: Path, measured: list[tuple[PassKey, str]]) -> None:
    tensors = SPEC.make_tensors(torch.float32)
    with torch.no_grad():
        call_fused(SPEC, tensors.input, tensors.weight, tensors.bias, backend="auto")
    ((key, algorithm),) = measured
    (file,) = own_cache.iterdir()
    assert json.loads(file.read_text())["entries"] == {str(key): algorithm}
    # As a new process reads it.
    other = next(name for name in algorithms(SPEC) if name != algorithm)
    content = json.loads(file.read_text())
    content["entries"] = {str(key): other, "nonsense": 3, "fprop float32 highest: 1 2": "igemm"}
    file.write_text(json.dumps(content))
    cpu_choices.store.cache_clear()
    cpu_choices.apply_stored()
    torch.ops.segpose.set_algorithm(other)
    forced = call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)
    torch.ops.segpose.set_algorithm("")
    assert torch.equal(forced, call_fused(SPEC, tensors.input, tensors.weight, tensors.bias))


def test_prepared_filters_follow(measured: list[tuple[PassKey, str]]) -> None:
    """In inference mode the pass with a packed filter is measured, and what is chosen runs."""
    layer = nn.Conv2d(40, 48, 3, padding=1)
    model, _ = optimize(nn.Sequential(layer, nn.ReLU()).eval(), mode="inference")
    x = torch.randn(1, 40, 20, 17)
    with torch.no_grad():
        y = model(x)
        assert [key.prepared for key, _ in measured] == [True]
        torch.testing.assert_close(y, torch.relu(layer(x)), rtol=1e-4, atol=1e-5)
        key, algorithm = measured[0]
        other = next(name for name in algorithms(SPEC) if name != algorithm)
        cpu_choices.remember(key, other)  # prepared anew, without measuring
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        assert not torch.equal(model(x), y)
    assert len(measured) == 1


def test_a_failure_leaves_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_tuning, "_time", fail)
    tensors = SPEC.make_tensors(torch.float32)
    before = call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)
    with pytest.raises(KeyboardInterrupt):
        cpu_tuning.tune_call(
            "conv2d",
            tensors.input,
            tensors.weight,
            tensors.bias,
            ((1, 1), (1, 1), (1, 1), 1, 0.01),
            (False, False, False),
        )
    assert torch.equal(before, call_fused(SPEC, tensors.input, tensors.weight, tensors.bias))
    assert len(cpu_choices.store()) == 0


def test_the_predicted_one_stays_unless_another_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = SPEC.make_tensors(torch.float32)
    names = algorithms(SPEC)

    def tuned(advantage: float) -> str | None:
        """With times that the last candidate beats by so much."""
        times = dict.fromkeys(names, 1.0) | {names[-1]: advantage}
        turn = {"at": -1}

        def time(call: object, repeats: int) -> float:
            turn["at"] += 1
            return times[names[turn["at"] % len(names)]]

        monkeypatch.setattr(cpu_tuning, "_time", time)
        cpu_choices.forget()
        params = ((1, 1), (1, 1), (1, 1), 1, 0.01)
        operands = tensors.input, tensors.weight, tensors.bias
        cpu_tuning.tune_call("conv2d", *operands, params, (False, False, False))
        return cpu_choices.recall(key_of(SPEC))

    assert tuned(0.5) == names[-1]
    assert tuned(0.92) == names[0]


def test_choosing_while_others_run() -> None:
    """Every call sees one choice or the other, never a mixture."""
    tensors = SPEC.make_tensors(torch.float32)
    names = algorithms(SPEC)[:2]
    expected = []
    for name in names:
        cpu_choices.choose(key_of(SPEC), name)
        expected.append(call_fused(SPEC, tensors.input, tensors.weight, tensors.bias))
    wrong: list[int] = []

    def run() -> None:
        for i in range(60):
            y = call_fused(SPEC, tensors.input, tensors.weight, tensors.bias)
            if not any(torch.equal(y, one) for one in expected):
                wrong.append(i)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        cpu_choices.choose(key_of(SPEC), names[i % 2])
    for thread in threads:
        thread.join()
    cpu_choices.choose(key_of(SPEC), "")
    assert wrong == []


def test_keys_are_text_and_back() -> None:
    for key in (key_of(SPEC), key_of(SPEC, "wgrad", prepared=True)):
        assert PassKey.parse(str(key)) == key
    with pytest.raises(ValueError, match="unpack"):
        PassKey.parse("fprop")


@pytest.mark.parametrize(
    ("key", "algorithm", "words"),
    [
        (key_of(SPEC), "fast", "algorithm"),
        (replace(key_of(SPEC), op="forward"), "igemm", "op must be"),
        (replace(key_of(SPEC), dtype="int8"), "igemm", "dtype must be"),
        (replace(key_of(SPEC), precision="low"), "igemm", "precision must be"),
        (replace(key_of(SPEC), numbers=(1, 2)), "igemm", "problem must have 16 numbers, got 2"),
    ],
)
def test_bad_choices_are_refused(key: PassKey, algorithm: str, words: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=words):
        cpu_choices.choose(key, algorithm)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("tune", "segnet", "--device", "cpu", "--input", "2,1,28,28")
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    # Two decoders are the encoders' problems the other way round; the first layer has no dgrad.
    assert lines[-1].startswith("11 passes measured, kept in ")
    assert sum("wgrad" in line for line in lines) == 4
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("0 passes measured")
    assert main((*arguments, "--inference", "--force", "--dtype", "bfloat16")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("6 passes measured")
    assert all("bfloat16" in line and "prepared" in line for line in lines[:-1])
    # What does not come up is kept, also by --force.
    assert len(cpu_choices.store()) == 17
    assert main((*arguments, "--force")) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("11 passes measured")
    assert len(cpu_choices.store()) == 17
    assert not segpose_kernels.benchmark


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is imported all the same: a folder for temporary files takes the choices."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SEGPOSE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert stored_choices.cache_folder() == Path(tempfile.gettempdir()) / "segpose_kernels"


def test_another_precision_is_measured_anew(
    measured: list[tuple[PassKey, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(fastest, "measure_ms", lambda do: float(timed.append("") or len(timed)))
    tensors = SPEC.make_tensors(torch.float32)
    operands = tensors.input, tensors.weight, tensors.bias
    with torch.no_grad():
        call_fused(SPEC, *operands, backend="auto")
        with segpose_kernels.precision("exact"):
            call_fused(SPEC, *operands, backend="auto")
        call_fused(SPEC, *operands, backend="auto")
    assert [key.precision for key, _ in measured] == ["highest", "exact"]
    assert len(timed) == 4, "ours and torch's, in each precision"


def test_plans_know_problems_by_the_same_numbers() -> None:
    numbers = _plan.ConvProblem(2, 5, 7, 6, 8, 3, 2, (2, 1), (1, 0), (1, 2), 2).numbers
    assert numbers[:4] == [2, 5, 7, 6]
    assert numbers[6:] == [8, 3, 2, 2, 1, 1, 0, 1, 2, 2]
