# SPDX-License-Identifier: BSD-3-Clause
"""Whether what a program was made from is still as it was (csrc/checks.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Unchanged:
    """Facts about objects, noted while they hold; one native call asks for all of them."""

    def __init__(self) -> None:
        # Imported here: without a build of the native code everything else of the package works.
        from .. import _checks

        self._hold = _checks.hold
        self._same: tuple[Any, ...] = ()
        self._equal: tuple[Any, ...] = ()
        self._values: tuple[Any, ...] = ()
        self._answers: tuple[Any, ...] = ()

    def same(self, table: dict[str, Any], name: str) -> None:
        """The table has the object that it has now under that name, or none."""
        self._same += (table, name, table.get(name))

    def equal(self, owner: Any, name: str, value: Any) -> None:
        """The attribute equals that value."""
        # A look into the instance's own table takes half the time, where the class has no say.
        table = getattr(owner, "__dict__", {})
        own = name in table and not hasattr(type(owner), name)
        self._equal += (table if own else owner, name, value)

    def values(self, owner: object, name: str) -> None:
        """The instance has the same table under that name, with the same values in their order."""
        self._table(owner, name, tuple(vars(owner)[name].values()))

    def empty(self, owner: object, name: str) -> None:
        """The instance has the same table under that name, and nothing in it."""
        self._table(owner, name, ())

    def _table(self, owner: object, name: str, values: tuple[Any, ...]) -> None:
        self.same(vars(owner), name)
        self._values += (vars(owner)[name], values)

    def answer(self, function: Callable[[], Any], value: Any) -> None:
        """The function returns that value."""
        self._answers += (function, value)

    def include(self, other: Unchanged) -> None:
        """What the other one has noted, each fact once."""
        self._same = _distinct(self._same + other._same, 3)
        self._equal = _distinct(self._equal + other._equal, 3)
        self._values = _distinct(self._values + other._values, 2)
        self._answers = _distinct(self._answers + other._answers, 2)

    def parameters(self, module: nn.Module) -> None:
        """The module's parameters, and what was written to them through torch."""
        self.values(module, "_parameters")
        for parameter in module._parameters.values():
            if isinstance(parameter, Tensor):
                self.equal(parameter, "_version", parameter._version)

    def hold(self) -> bool:
        return self._hold(self._same, self._equal, self._values, self._answers)


def _distinct(facts: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Without those that are the same objects as an earlier one, `size` of them to a fact."""
    found: dict[tuple[int, ...], tuple[Any, ...]] = {}
    for first in range(0, len(facts), size):
        fact = facts[first : first + size]
        found.setdefault(tuple(map(id, fact)), fact)
    return tuple(part for fact in found.values() for part in fact)
