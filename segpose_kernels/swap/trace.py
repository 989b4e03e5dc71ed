# SPDX-License-Identifier: BSD-3-Clause
"""One forward at a time as a graph: `torch.fx` with every child module left as one node.

A module whose forward cannot be traced thus costs only its own level. The trace runs on a shallow
copy, so that a forward which writes attributes leaves no trace of its own in the model.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import io
import operator
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

from .activation import is_activation_function
from .contents import Contents, generator_copy, is_users_object, shallow_copy
from .pieces import AbsorbedCall

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Missing:
    """Stands for the value of an attribute that is not there."""


class AttributeCall:
    """Stands for a callable attribute: the graph tells `self.relu(x)` from `F.leaky_relu(x)`."""

    def __init__(self, attribute: str, function: Callable[..., Any]) -> None:
        self.attribute = attribute
        self.function = function
        self.__name__ = attribute
        self.__module__ = __name__

    def __repr__(self) -> str:
        """The same in every trace, so that graphs can be compared."""
        return f"self.{self.attribute}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", self, args, kwargs)
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Site:
    """Where in the model's own code a node was made.

    Attributes:
        frames: (code, line) of each frame of the model's code, innermost first; none for
            torch's containers.
        names: for each argument node, the local variables (code, name) that hold it at this
            moment.
        holders: for a module call, the local variables that hold the module.
        modes: grad mode, inference mode and autocast at this moment.
    """

    frames: tuple[tuple[CodeType, int], ...]
    names: dict[fx.Node, frozenset[tuple[CodeType, str]]]
    holders: frozenset[tuple[CodeType, str]]
    modes: tuple[bool, ...]


@dataclass
class ForwardTrace:
    """The graph of one module's forward, for one value of `training`.

    Attributes:
        stashed: nodes that the forward stored on the module, with the attribute.
        reads: plain-data attributes of the module that the forward read, with their values.
        opaque_reads: other objects it read, whose content the trace may depend on.
        draws: whether it drew random numbers, which do not depend on its input.
        entered: code of functions that ran, with their globals, those of torch, of this package and
            of Python left out; None where another profiler watched, which keeps its place.
        handed: those of them that were given a module.
        direct: modules whose `forward` ran by its name instead of by a call, which leaves no node.
        tried: the attribute that had another value than in the model, or the argument with another
            one than its default; empty for the model as it is.
        arguments: of the forward that had values, where no trace could do without.
    """

    owner: nn.Module
    name: str
    training: bool
    graph: fx.Graph
    sites: dict[fx.Node, Site]
    called: dict[fx.Node, nn.Module]
    modes: tuple[bool, ...]
    stashed: dict[fx.Node, str] = field(default_factory=dict)
    reads: dict[str, Any] = field(default_factory=dict)
    opaque_reads: set[str] = field(default_factory=set)
    constants: bool = False
    draws: bool = False
    entered: dict[CodeType, dict[str, Any]] | None = None
    handed: frozenset[CodeType] = frozenset()
    direct: tuple[nn.Module, ...] = ()
    tried: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module a `call_module` node calls, else None."""
        return self.called.get(node)


class UntraceableError(Exception):
    """The forward cannot be written as a graph; the message says why."""


def trace_forward(
    owner: nn.Module,
    name: str,
    training: bool,
    *,
    seed: int = 0,
    given: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    contents: Contents | None = None,
) -> ForwardTrace:
    """Trace `owner.forward` alone; `seed` is for what it draws without looking at its input, the
    attributes in `given` have other values than in the module, and `arguments` of the forward have
    values. `contents`: the owner's, for many traces of it.

    Raises:
        UntraceableError: with the first line of what went wrong.
    """
    reads: dict[str, Any] = {}
    opaque: set[str] = set()
    contents = contents or Contents(owner)
    clone, recorded = _recording_copy(owner, training, reads, opaque)
    vars(clone).update(given or {})
    tracer = _OneLevelTracer()
    before = set(vars(clone))
    entered: dict[CodeType, dict[str, Any]] = {}
    handed: set[CodeType] = set()
    direct: list[nn.Module] = []

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        if frame.f_code.co_name == "forward":
            ran = frame.f_locals.get("self")
            if isinstance(ran, nn.Module) and ran is not clone:
                direct.append(ran)
        if frame.f_code.co_filename.startswith((_TORCH, _HERE)):
            return
        # What was generated, such as a dataclass's __init__, has no file.
        name = str(frame.f_globals.get("__name__", ""))
        home = name.partition(".")[0]
        known = home in sys.stdlib_module_names or home == "torch" or name == __name__
        if known or home.startswith("namedtuple_"):
            return
        entered[frame.f_code] = frame.f_globals
        if any(map(_holds_module, frame.f_locals.values())):
            handed.add(frame.f_code)

    watched = sys.getprofile() is not None
    # What other packages do whenever garbage is collected is not the forward's doing.
    collecting = gc.isenabled()
    # Numbers drawn by code that does not depend on the input must not move the caller's generators.
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as silence:
        # A forward may print, and ask.
        silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
        silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
        silence.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = io.StringIO()
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        numpy_state = _numpy_state()
        try:
            start = _modes()
            gc.disable()
            if not watched:
                tracer.begin = functools.partial(sys.setprofile, enter)
            graph = tracer.trace(clone, concrete_args=dict(arguments) if arguments else None)
        except Exception as error:  # a model's forward may raise anything when it meets proxies
            first = (str(error).strip() or "no message").splitlines()[0].partition(". ")[0]
            raise UntraceableError(f"{type(error).__name__}: {first}") from error
        finally:
            if not watched:
                sys.setprofile(None)
            if collecting:
                gc.enable()
            recorded.clear()
            draws = _have_drawn(seed, numpy_state)
            random.setstate(python_state)
            if draws and numpy_state is not None:
                sys.modules["numpy"].random.set_state(numpy_state)
            # Only as it is put back does one see where else values were kept.
            stored = list(contents.put_back())
    trace = ForwardTrace(
        owner, name, training, graph, tracer.sites, tracer.called, start, {}, reads, opaque
    )
    trace.constants = any(key not in before and "constant" in key for key in vars(clone)) or any(
        node.op == "get_attr" and "_constant" in str(node.target) for node in graph.nodes
    )
    trace.draws = draws
    trace.entered, trace.handed = None if watched else entered, frozenset(handed)
    trace.direct = tuple(direct)
    trace.tried = ", ".join(given or {})
    trace.arguments = arguments or {}
    for attribute, value in vars(clone).items():
        for proxy in _kept_proxies(value):
            trace.stashed[proxy.node] = attribute
    for place, value in stored:
        for proxy in _kept_proxies(value):
            trace.stashed.setdefault(proxy.node, place)
    return trace


def _have_drawn(seed: int, numpy_state: Any) -> bool:
    """Whether numbers were drawn since the generators were seeded."""
    own = torch.Generator()
    own.manual_seed(seed)
    python = random.getstate()
    random.seed(seed)
    return (
        python != random.getstate()
        or not torch.equal(own.get_state(), torch.default_generator.get_state())
        or _comparable(numpy_state) != _comparable(_numpy_state())
    )


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return numpy.random.get_state() if numpy is not None else None


def _comparable(numpy_state: Any) -> Any:
    """The array among it as bytes."""
    return numpy_state and [
        part.tobytes() if hasattr(part, "tobytes") else part for part in numpy_state
    ]


def _holds_module(value: Any, depth: int = 2) -> bool:
    if isinstance(value, nn.Module):
        return True
    if depth and type(value) in (list, tuple, dict):
        items = value.values() if isinstance(value, dict) else value
        return any(_holds_module(item, depth - 1) for item in list(items))
    return False


class _InplaceProxy(fx.Proxy):
    """Records `y += x` as what it is; fx's own proxy would turn it into `y = y + x`."""


def _record_inplace(operation: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(_InplaceProxy, f"__{_name}__", _record_inplace(getattr(operator, _name)))


def _nothing() -> None:
    pass


class _OneLevelTracer(fx.Tracer):
    """Every module is a leaf; each node remembers where it was made."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[fx.Node, Site] = {}
        self.called: dict[fx.Node, nn.Module] = {}
        # Called when all is ready for the forward.
        self.begin: Callable[[], None] = _nothing

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        ready = super().create_args_for_root(*args, **kwargs)
        self.begin()
        return ready

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InplaceProxy(node, self)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        node = proxy.node
        if kind == "call_module":
            self.called[node] = self.root.get_submodule(str(node.target))
        self.sites[node] = _site(set(node.all_input_nodes), self.called.get(node))
        return proxy


def _site(nodes: set[fx.Node], called: nn.Module | None) -> Site:
    frames: list[tuple[CodeType, int]] = []
    names: dict[fx.Node, set[tuple[CodeType, str]]] = {}
    holders: set[tuple[CodeType, str]] = set()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not trace_forward.__code__:
        code = frame.f_code
        if not code.co_filename.startswith((_TORCH, _HERE)):
            frames.append((code, frame.f_lineno))
            for name, value in frame.f_locals.items():
                if called is not None and value is called:
                    holders.add((code, name))
                for proxy in _proxies(value):
                    if proxy.node in nodes:
                        names.setdefault(proxy.node, set()).add((code, name))
        frame = frame.f_back
    bound = {node: frozenset(found) for node, found in names.items()}
    return Site(tuple(frames), bound, frozenset(holders), _modes())


def _proxies(value: Any, depth: int = 2) -> Iterator[fx.Proxy]:
    if isinstance(value, fx.Proxy):
        # An attribute proxy such as `x.shape` makes its node on the first access: looking must not
        # add one.
        if isinstance(vars(value).get("node"), fx.Node):
            yield value
    elif depth and isinstance(value, dict):
        for item in list(value.values()):
            yield from _proxies(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, deque)):
        for item in list(value):
            yield from _proxies(item, depth - 1)


def _kept_proxies(value: Any) -> Iterator[fx.Proxy]:
    """Those in a value and, if it is a user's object, in its attributes."""
    yield from _proxies(value)
    if is_users_object(value):
        yield from _proxies(vars(value))


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _recording_copy(
    owner: nn.Module, training: bool, reads: dict[str, Any], opaque: set[str]
) -> tuple[nn.Module, list[bool]]:
    """A copy that shares children and tensors, and notes which attributes are read.

    The second value switches the recording off when it is emptied.
    """
    recording = [True]
    base = type(owner)

    def read(self: Any, attribute: str) -> Any:
        value = object.__getattribute__(self, attribute)
        if recording and not attribute.startswith("__") and attribute not in MODULE_STATE:
            _note(
                attribute,
                value,
                attribute in object.__getattribute__(self, "__dict__"),
                reads,
                opaque,
            )
        return value

    def read_missing(self: Any, attribute: str) -> Any:
        """What a class with a `__getattr__` of its own finds elsewhere, or nothing."""
        tables = (object.__getattribute__(self, name) for name in _TABLES)
        noted = recording and not attribute.startswith("__") and attribute not in MODULE_STATE
        noted = noted and not any(attribute in table for table in tables)
        try:
            value = base.__getattr__(self, attribute)
        except AttributeError:
            if noted:
                reads.setdefault(attribute, Missing)
            raise
        if noted:
            _note(attribute, value, True, reads, opaque)
        return value

    members = {"__getattribute__": read, "__getattr__": read_missing, "__module__": base.__module__}
    kind = type(base.__name__, (base,), members)
    clone: nn.Module = object.__new__(kind)
    state = object.__getattribute__(clone, "__dict__")
    for key, value in vars(owner).items():
        if type(value) in (list, dict, set):
            value = value.copy()
        elif is_activation_function(value):
            value = AttributeCall(key, value)
        elif is_users_object(value):
            # A forward may put values into it.
            value = shallow_copy(value)
        else:
            value = generator_copy(value)
        state[key] = value
    state["training"] = training
    state.pop("forward", None)
    return clone, recording


def _note(
    attribute: str, value: Any, on_instance: bool, reads: dict[str, Any], opaque: set[str]
) -> None:
    if isinstance(value, (*PLAIN, enum.Enum)):
        reads.setdefault(attribute, value)
    elif isinstance(value, (tuple, list)) and all(isinstance(item, PLAIN) for item in value):
        reads.setdefault(attribute, value.copy() if isinstance(value, list) else value)
    elif isinstance(value, (AttributeCall, AbsorbedCall, nn.Module, fx.Proxy)):
        return
    # Of a class, tables and objects; its methods and properties are code.
    elif on_instance or isinstance(value, (tuple, list, dict, set)) or is_users_object(value):
        opaque.add(attribute)


_TABLES = ("_parameters", "_buffers", "_modules")
# Read by nn.Module itself on every call; `training` has a graph for each of its values.
MODULE_STATE = frozenset(vars(nn.Module())) | {"training"}
