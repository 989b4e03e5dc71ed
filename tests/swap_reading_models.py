# SPDX-License-Identifier: BSD-3-Clause
"""Models that read, or keep, something beside their input while they run.

Each has as `others` what may be set afterwards: attributes with values, dots reach into parts.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from swap_choice_models import Block, ByMissing, Model
from torch import Tensor, nn


class ArgumentAsNumber(Model):
    """What it computes from an argument outside of a condition."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = F.relu(self.convs[0](x)) * (1.0 + (skip is None))
        return F.relu(self.convs[1](y))


class ArgumentKind(Model):
    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        return F.relu(self.convs[0](x)) + float(isinstance(skip, Tensor))


class ArgumentAttribute(Model):
    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        return F.relu(self.convs[0](x)) + float(hasattr(skip, "shape"))


class ArgumentInHelper(Model):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return _weight(skip) * F.relu(self.convs[0](x))


def _weight(skip: Tensor | None) -> float:
    return {True: 2.0, False: 3.0}[skip is None]


class GradMode(Model):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * (2.0 if torch.is_grad_enabled() else 3.0)


class GradModeAsNumber(Model):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * (1.0 + torch.is_grad_enabled())


SCALE = {"value": 2.0}


scale = 2.0


def _scaled(x: Tensor) -> Tensor:
    return x * scale


def _scaled_by_table(x: Tensor) -> Tensor:
    return x * SCALE["value"]


class GlobalBehindHelper(Model):
    def forward(self, x: Tensor) -> Tensor:
        return _scaled(F.relu(self.convs[0](x)))


class TableBehindHelper(Model):
    def forward(self, x: Tensor) -> Tensor:
        return _scaled_by_table(F.relu(self.convs[0](x)))


class PartsNumber(Model):
    """A number of a part of a part."""

    others: ClassVar[list[tuple[str, Any]]] = [("block.relu.scale", 3.0)]

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.block.relu.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * self.block.relu.scale


class PartsNumberByName(PartsNumber):
    """The part has a local name."""

    def forward(self, x: Tensor) -> Tensor:
        part = self.block.relu
        return F.relu(self.convs[0](x)) * part.scale


class ClassTable(Model):
    table: ClassVar[dict[str, float]] = {"scale": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * self.table["scale"]


class SharedLeaky(Model):
    """One activation for all, so that the forward is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.relu(self.convs[0](x)))


class SharedFunction(Model):
    def __init__(self) -> None:
        super().__init__()
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.act(self.convs[0](x)))


class BecomesTensor(Model):
    others: ClassVar[list[tuple[str, Any]]] = [
        ("gain", torch.full((3, 1, 1), 0.5, dtype=torch.float64)),
        ("gain", None),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.convs[0](x))
        return y if self.gain is None else y * self.gain


class KeepsInObject(Model):
    """Puts the values before the activation into an object of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = SimpleNamespace(before=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](x)
        self.seen.before = y
        return self.relu(y)


class MissingNumber(ByMissing):
    others: ClassVar[list[tuple[str, Any]]] = [("gain", 3.0)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * getattr(self, "gain", 2.0)


class Gauge(nn.Module):
    """A part that has plain data in several forms, under names that tensors have too."""

    offset = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.table, self.pair = 2.0, {"gain": 2.0}, (2.0,)

    def forward(self, x: Tensor) -> Tensor:
        return x


class ReadsPart(Model):
    """What it reads of a part, as text; a graph would freeze it."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.parts = Gauge(), nn.ModuleList([Gauge()])


class PartsClassNumber(ReadsPart):
    others: ClassVar[list[tuple[str, Any]]] = [("part.offset", 3.0)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * self.part.offset


class PartsMean(ReadsPart):
    others: ClassVar[list[tuple[str, Any]]] = [("part.mean", 3.0)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * self.part.mean


class PartsTable(ReadsPart):
    others: ClassVar[list[tuple[str, Any]]] = [("part.table", {"gain": 3.0})]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * self.part.table["gain"]


class PartsPair(ReadsPart):
    others: ClassVar[list[tuple[str, Any]]] = [("part.pair", (3.0,))]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * self.part.pair[0]


class PartsMode(ReadsPart):
    others: ClassVar[list[tuple[str, Any]]] = [("part.training", True)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * (1.0 + self.part.training)


class PartInList(ReadsPart):
    """`relu` is only where the tests can reach the part."""

    others: ClassVar[list[tuple[str, Any]]] = [("relu.part.mean", 3.0)]

    def __init__(self) -> None:
        super().__init__()
        self.relu.part = self.parts[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[0](x)) * self.parts[0].mean


class ClassNumber(Model):
    """A number of the class, read from the class."""

    task: ClassVar[int] = 0
    gain: ClassVar[float] = 2.0

    @classmethod
    def scaled(cls, x: Tensor) -> Tensor:
        return x * cls.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.relu(self.convs[self.__class__.task](x)))


TAPS: list[Tensor] = []


class Keeps(Model):
    """Puts the values before the activation wherever a model may have a place for them."""

    log: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.lists: dict[str, list[Tensor]] = {"before": []}
        self.queue: deque[Tensor] = deque(maxlen=3)
        self.tables: OrderedDict[str, Tensor] = OrderedDict()
        self.block = Block()
        self.seen = SimpleNamespace(items=[])

    def kept(self) -> list[Tensor]:
        found = [*self.lists["before"], *self.queue, *self.tables.values(), *self.seen.items]
        return [*found, *vars(self.block).get("before", ()), *self.log, *TAPS]

    def keep(self, y: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](x)
        self.keep(y)
        return self.relu(y)


class KeepsInLists(Keeps):
    def keep(self, y: Tensor) -> None:
        self.lists["before"].append(y)


class KeepsInQueue(Keeps):
    def keep(self, y: Tensor) -> None:
        self.queue.append(y)


class KeepsInTable(Keeps):
    def keep(self, y: Tensor) -> None:
        self.tables["before"] = y


class KeepsInPart(Keeps):
    def keep(self, y: Tensor) -> None:
        self.block.before = [y]


class KeepsInListOfObject(Keeps):
    def keep(self, y: Tensor) -> None:
        self.seen.items.append(y)


class KeepsInClass(Keeps):
    def keep(self, y: Tensor) -> None:
        self.log.append(y)


class KeepsInFile(Keeps):
    def keep(self, y: Tensor) -> None:
        TAPS.append(y)


class DrawsAndPrints(Model):
    """Has generators of its own, uses those of all, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.tensors = np.random.default_rng(0), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        print("drawing")
        gain = self.numbers.random() + torch.rand(1, generator=self.tensors).item()
        return self.relu(self.convs[0](x)) * (gain + np.random.rand())
