# SPDX-License-Identifier: BSD-3-Clause
"""One training loop for every model here: batches in, history out, a progress bar on the way."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")


@dataclass
class Evaluation:
    """Metrics after `step` optimizer steps."""

    step: int
    metrics: dict[str, float]


@dataclass
class History:
    """The loss of every step, the evaluations, the wall time in seconds (evaluations included)."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last evaluation; empty if there was none."""
        return self.evaluations[-1].metrics if self.evaluations else {}


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    progress: bool = False,
    title: str = "training",
) -> History:
    """Take `steps` optimizer steps, one a batch, and return the history.

    Args:
        model: trained in place; in train mode on return.
        batches: at least `steps` of them; more are not read.
        loss_of: scalar loss of the model on a batch.
        optimizer, scheduler: the scheduler, if any, is stepped after every optimizer step.
        steps: number of optimizer steps.
        evaluate: metrics by name, called in eval mode under no_grad every `evaluate_every` steps
            (0: never before the end) and after the last one.
        progress: show a progress bar, with rich if it is installed and as plain lines if not.
        title: what the progress bar calls this.

    Raises:
        RuntimeError: if the loss is not finite, or the batches end early.
    """
    history = History()
    start = time.perf_counter()
    source = iter(batches)
    model.train()
    with _progress_bar(title, steps, progress) as advance:
        for step in range(1, steps + 1):
            batch = next(source, None)
            if batch is None:
                raise RuntimeError(f"{title}: the batches ended after {step - 1} of {steps} steps")
            loss = loss_of(model, batch)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            history.losses.append(loss.item())
            if not torch.isfinite(loss):
                raise RuntimeError(f"{title}: the loss became {loss.item()} at step {step}")
            if evaluate and (step == steps or (evaluate_every and step % evaluate_every == 0)):
                model.eval()
                with torch.no_grad():
                    history.evaluations.append(Evaluation(step, evaluate(model)))
                model.train()
            advance({"loss": history.losses[-1], **history.last})
    history.seconds = time.perf_counter() - start
    return history


@contextmanager
def _progress_bar(
    title: str, steps: int, show: bool
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields a function to call after each step with the numbers to show."""
    if not show:
        yield lambda numbers: None
        return
    try:
        from rich import progress as rich_progress
    except ImportError:
        yield _line_printer(title, steps)
        return
    columns: list[Any] = [
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=14),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[numbers]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    ]
    with rich_progress.Progress(*columns) as bar:
        task = bar.add_task(title, total=steps, numbers="")
        yield lambda numbers: bar.update(task, advance=1, numbers=_format(numbers))


def _line_printer(title: str, steps: int) -> Callable[[dict[str, float]], None]:
    """Ten lines over the whole training, on stderr."""
    done = 0

    def advance(numbers: dict[str, float]) -> None:
        nonlocal done
        done += 1
        if done == steps or done % max(1, steps // 10) == 0:
            print(f"{title} {done}/{steps} {_format(numbers)}", file=sys.stderr, flush=True)

    return advance


def _format(numbers: dict[str, float]) -> str:
    """The loss and the first metric; more would not fit a terminal's width."""
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in list(numbers.items())[:2]
    )
