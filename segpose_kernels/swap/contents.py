# SPDX-License-Identifier: BSD-3-Clause
"""What a forward may write to while it is traced, and how that is put back.

A forward may keep values in lists, tables and objects of the model's, of its parts, of its classes
and of its file. In a trace these values are proxies, which must not stay there.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from .source import methods_of

_KINDS = (list, dict, set, deque)
_STATE = frozenset(vars(nn.Module()))
# Items of a list or table up to which it is looked after, and how far into what it holds.
_ITEMS = 4096
_DEPTH = 3


def is_users_object(value: Any) -> bool:
    """Whether it is a plain object with attributes, of a class written in Python."""
    kind = type(value)
    return (
        kind.__module__.partition(".")[0] not in ("torch", "builtins", __name__.partition(".")[0])
        and inspect.getattr_static(kind, "__reduce_ex__") is vars(object)["__reduce_ex__"]
        and not isinstance(value, (type, nn.Module, torch.Tensor, fx.Proxy, random.Random))
        and not hasattr(kind, "__slots__")
        and bool(kind.__dictoffset__)
    )


def shallow_copy(value: Any) -> Any:
    """Of a user's object, without running code of its class; itself where that cannot be."""
    kinds = (OrderedDict, dict, list, set)
    base = next((kind for kind in kinds if isinstance(value, kind)), object)
    try:
        copied = base.__new__(type(value))
    except TypeError:  # of a class that extends one written in C
        return value
    if base is not object:
        (base.extend if base is list else base.update)(copied, value)  # type: ignore[attr-defined]
    own = object.__getattribute__(value, "__dict__")
    object.__setattr__(copied, "__dict__", copied if own is value else dict(own))
    return copied


class Contents:
    """What the owner's parts, its classes and its file hold, noted to be put back after each of any
    number of traces.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.noted: dict[int, tuple[str, Any, Any]] = {}
        for name, module in owner.named_modules():
            if module is owner:
                continue
            own = vars(module)
            self.noted[id(own)] = name, own, dict(own)
            if not type(module).__module__.startswith("torch."):
                for attribute in own.keys() - _STATE:
                    self._note(name, own[attribute], 1)
        for name, value in (*vars(owner).items(), *_of_classes(owner), *_of_files(owner)):
            if name not in _STATE:
                self._note(name, value, _DEPTH)

    def _note(self, name: str, value: Any, depth: int) -> None:
        if is_users_object(value):
            own = object.__getattribute__(value, "__dict__")
            if own is not value:
                self._note(name, own, depth)
        if not isinstance(value, _KINDS) or id(value) in self.noted or len(value) > _ITEMS:
            return
        items = dict(value.items()) if isinstance(value, dict) else list(value)
        self.noted[id(value)] = name, value, items
        if depth:
            for item in items.values() if isinstance(items, dict) else items:
                self._note(name, item, depth - 1)

    def put_back(self) -> Iterator[tuple[str, Any]]:
        """Undo what was written; gives what that was, with the name of where."""
        for name, value, items in self.noted.values():
            if isinstance(value, dict):
                if not _alike(value.keys(), items) or not _alike(value.values(), items.values()):
                    for key, item in dict.items(value):
                        if key not in items or items[key] is not item:
                            yield name, item
                    # An OrderedDict keeps its order elsewhere; a subclass may do more than that.
                    kind = OrderedDict if isinstance(value, OrderedDict) else dict
                    kind.clear(value)
                    kind.update(value, items)
            elif not _alike(value, items):
                yield name, list(value)
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(items)


def _alike(values: Iterable[Any], items: Iterable[Any]) -> bool:
    return [*map(id, values)] == [*map(id, items)]


def _of_classes(owner: nn.Module) -> Iterator[tuple[str, Any]]:
    for kind in type(owner).__mro__:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            yield from vars(kind).items()


def _of_files(owner: nn.Module) -> Iterator[tuple[str, Any]]:
    """Globals that the owner's methods name."""
    for function in methods_of(owner, overridden=True):
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, _KINDS) or is_users_object(value):
                yield name, value


def generator_copy(value: Any) -> Any:
    """A copy of a generator of random numbers, so that the caller's does not move; else `value`."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random,)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    return copy.deepcopy(value) if isinstance(value, kinds) else value
