# SPDX-License-Identifier: BSD-3-Clause
"""Models in which something other than the input chooses the layers that run.

Each has as `others` what may be set afterwards: attributes with values, dots reach into parts.
"""

from __future__ import annotations

import enum
import os
from types import SimpleNamespace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


def convolutions(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(count))


class Model(nn.Module):
    others: ClassVar[list[tuple[str, Any]]]

    def __init__(self) -> None:
        super().__init__()
        self.convs = convolutions(3)
        self.last = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU()


class ByIndex(Model):
    """A head for each task, chosen by a number."""

    others: ClassVar[list[tuple[str, Any]]] = [("task", 1), ("task", 2), ("task", -1)]

    def __init__(self) -> None:
        super().__init__()
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.convs[self.task](x)))


class ByKey(Model):
    """A head for each task, chosen by a name; some have an activation behind them."""

    others: ClassVar[list[tuple[str, Any]]] = [("task", "depth"), ("task", "edges")]

    def __init__(self) -> None:
        super().__init__()
        names = ("normals", "depth", "edges")
        self.heads = nn.ModuleDict(dict(zip(names, self.convs, strict=True)))
        self.acts = nn.ModuleDict({"normals": self.relu, "depth": nn.Identity()})
        self.acts["edges"] = nn.LeakyReLU(0.2)
        self.task = "normals"

    def forward(self, x: Tensor) -> Tensor:
        return self.acts[self.task](self.heads[self.task](x))


class ByDepth(Model):
    """Layers up to a depth, and an activation behind the last of them."""

    others: ClassVar[list[tuple[str, Any]]] = [("depth", 1), ("depth", 2)]

    def __init__(self) -> None:
        super().__init__()
        self.depth = 3

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth):
            x = self.convs[index](x)
        return self.relu(x)


class BySlice(ByDepth):
    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs[: self.depth]:
            x = conv(x)
        return self.relu(x)


class ByName(ByDepth):
    others: ClassVar[list[tuple[str, Any]]] = [("name", "last"), ("name", "second")]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.name = "first"

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(getattr(self, self.name)(x))


class ByOrder(Model):
    """An order of layers, changed as a whole or in place."""

    others: ClassVar[list[tuple[str, Any]]] = [
        ("order", [1, 0, 2]),
        ("order", [0, 2]),
        ("order", []),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.convs[0], self.relu, self.convs[1]])
        self.order = [0, 1, 2]

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x)
        return x


class ByAlias(ByIndex):
    """The number passes through a local name and a function."""

    def forward(self, x: Tensor) -> Tensor:
        number = _same(self.task)
        convs = list(self.convs)
        return self.last(self.relu(convs[number](x)))


def _same(number: int) -> int:
    return number


class ByHelper(Model):
    """A function outside the class chooses."""

    others: ClassVar[list[tuple[str, Any]]] = [("early", True)]

    def __init__(self) -> None:
        super().__init__()
        self.early = False

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(_choose(self, self.early)(x))


def _choose(model: Model, early: bool) -> nn.Module:
    return model.convs[0] if early else model.convs[1]


class ByPart(Model):
    """A part of the model holds the number."""

    others: ClassVar[list[tuple[str, Any]]] = [("relu.task", 1), ("relu.task", 2)]

    def __init__(self) -> None:
        super().__init__()
        self.relu.task = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[self.relu.task](x))


class ByConfig(Model):
    """An object of the user's holds the number."""

    others: ClassVar[list[tuple[str, Any]]] = [("config.task", 1), ("config.task", 2)]

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(task=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[self.config.task](x))


class ByConfigOrder(ByOrder):
    others: ClassVar[list[tuple[str, Any]]] = [
        ("config.order", [1, 0, 2]),
        ("config.order", [0, 2]),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(order=[0, 1, 2])

    def forward(self, x: Tensor) -> Tensor:
        for index in self.config.order:
            x = self.layers[index](x)
        return x


class LeavesEarly(Model):
    """What follows a return under a condition may run or not."""

    others: ClassVar[list[tuple[str, Any]]] = [("config.early", False)]

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(early=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.convs[0](x))
        for conv in self.convs:
            if self.config.early:
                break
            x = conv(x)
        if self.config.early:
            return x
        return self.relu(self.convs[1](x))


class ByTable(Model):
    """A table of the class holds the number."""

    table: ClassVar[dict[str, int]] = {"task": 0}
    others: ClassVar[list[tuple[str, Any]]] = [("table", {"task": 1}), ("table", {"task": 2})]

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[self.table["task"]](x))


class InParts(Model):
    """The parts of a block are called from outside, of the block that a number chooses."""

    others: ClassVar[list[tuple[str, Any]]] = [("task", 1), ("task", 2)]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[self.task]
        return block(block.conv(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Backbone(nn.Module):
    """As common libraries write them: layers by name, a norm by a property, chosen outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_name, self.out_indices, self.layer_names = "bn1", (1, 2), []
        self.conv1, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)
        self.add_module(self.norm_name, nn.BatchNorm2d(8))
        for index in range(3):
            name = f"layer{index + 1}"
            self.add_module(name, nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
            self.layer_names.append(name)

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.relu(self.norm(self.conv1(x)))
        results = []
        for index, name in enumerate(self.layer_names):
            x = getattr(self, name)(x)
            if index in self.out_indices:
                results.append(x)
        return tuple(results)


class ByPartOfName(Model):
    """An f-string makes the name of a head."""

    others: ClassVar[list[tuple[str, Any]]] = [("task", "depth"), ("task", "edges")]

    def __init__(self) -> None:
        super().__init__()
        self.head_normals, self.head_depth, self.head_edges = self.convs
        self.task = "normals"

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(getattr(self, f"head_{self.task}")(x))


class ByStride(Model):
    """Numbers that are no indices: keys of a table in the forward."""

    others: ClassVar[list[tuple[str, Any]]] = [("stride", 16)]

    def __init__(self) -> None:
        super().__init__()
        self.up8, self.up16, _ = self.convs
        self.stride = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.relu({8: self.up8, 16: self.up16}[self.stride](x))


class ByTableMethod(ByStride):
    """A table is asked with `get`, for what an object of the user's holds."""

    others: ClassVar[list[tuple[str, Any]]] = [("config.stride", 16)]

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(stride=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu({8: self.up8, 16: self.up16}.get(self.config.stride)(x))


class ByNone(Model):
    others: ClassVar[list[tuple[str, Any]]] = [("active", 1), ("active", 2)]

    def __init__(self) -> None:
        super().__init__()
        self.active = None

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[0 if self.active is None else self.active](x))


class ByMissing(Model):
    """The attribute is set later."""

    others: ClassVar[list[tuple[str, Any]]] = [("task", 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[getattr(self, "task", 0)](x))


class ByFraction(Model):
    others: ClassVar[list[tuple[str, Any]]] = [("fraction", 0.4)]

    def __init__(self) -> None:
        super().__init__()
        self.fraction = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[int(3 * self.fraction)](x))


class Task(enum.Enum):
    NORMALS = 0
    DEPTH = 1


class ByMember(Model):
    """A member of an enumeration, of the class."""

    task = Task.NORMALS
    others: ClassVar[list[tuple[str, Any]]] = [("task", Task.DEPTH)]

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[self.task.value](x))


class ByDelegate(Model):
    """The class looks in a part for what it does not have."""

    others: ClassVar[list[tuple[str, Any]]] = [("part.task", 1)]

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.part.task = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[self.task](x))


class TwoSwitches(Model):
    """One attribute matters once the other has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.several, self.task = False, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[self.task if self.several else 0](x))


class ByEnvironment(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[int(os.getenv("SEGPOSE_TEST_TASK", "0"))](x))


class ForwardByName(Model):
    """A convolution runs once with the activation behind it, once without and uncalled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.last(x)) + self.last.forward(x)


class ActsByFunction(Model):
    """Numbers beside a function in an attribute; they choose no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.size, self.stride, self.padding, self.gain = F.relu, 3, 1, 1, 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.act(self.convs[0](x)), self.size, self.stride, self.padding)
        return self.act(self.convs[1](y)) * self.gain


class _HasShortcut(Model):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(twice=False)
        self.norm: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.config.twice:
            x = self.last(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.relu(self.convs[0](x)) + F.relu(self.last(x))


class SuperForward(_HasShortcut):
    """The forward of the class above has conditions, and other layers under them."""

    others: ClassVar[list[tuple[str, Any]]] = [("config.twice", True)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Attributes:
    """A configuration as common libraries write it; it cannot be copied or pickled as it is."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def __deepcopy__(self, memo: Any) -> Attributes:
        return Attributes(**self.values)


class ByAttributes(Model):
    others: ClassVar[list[tuple[str, Any]]] = [("config.task", 1)]

    def __init__(self) -> None:
        super().__init__()
        self.config = Attributes(task=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs[self.config.task](x))


class FlagArgument(Model):
    """The caller says what it wants; each layer is followed by its activation whatever he says."""

    def forward(self, x: Tensor, features: bool = False, deep: bool = True) -> Any:
        x = self.relu(self.convs[0](x))
        kept = [x]
        if deep:
            x = self.relu(self.convs[1](x))
            kept.append(x)
        y = self.last(x)
        return (y, kept) if features else y


class FlagLeavesActivationOut(Model):
    def forward(self, x: Tensor, logits: bool = False) -> Tensor:
        x = self.relu(self.convs[0](x))
        x = self.convs[1](x)
        return x if logits else self.relu(x)


class FlagLeavesEarly(Model):
    def forward(self, x: Tensor, early: bool = True) -> Tensor:
        x = self.relu(self.convs[0](x))
        if early:
            return x
        for conv in self.convs:
            x = conv(x)
        return self.relu(x)
