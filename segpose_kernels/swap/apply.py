# SPDX-License-Identifier: BSD-3-Clause
"""`optimize` and `restore`: put the fused modules into a model, and take them out again."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ..backends import BACKENDS, LIBRARY
from ..pooling import MaxPool2x2, is_pool2x2
from .chains import ChainForward, holds_chain
from .eligible import JOURNAL, Fused, why_not_plain
from .filters import FilterCache
from .find import Analysis, ConvPlan, Pair, analyse
from .forward import RewrittenForward, rewrite
from .hidden import Key
from .inference import install
from .journal import Absorbed, Journal, journal_of, layers_of
from .layout import why_not_channels_last
from .lines import line_forward
from .pieces import (
    AbsorbedActivation,
    AbsorbedCall,
    FoldedBatchNorm2d,
    fold,
    fused_module,
    take_place,
)
from .report import SwapError, SwapReport
from .rows import report_rows
from .trace import UntraceableError

ModelT = TypeVar("ModelT", bound=nn.Module)

_MODES = ("train", "inference")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_FORMATS = {
    "auto": "auto",
    torch.channels_last: "channels_last",
    "channels_last": "channels_last",
    torch.preserve_format: "preserve_format",
    "preserve_format": "preserve_format",
}


def optimize(
    model: ModelT,
    *,
    mode: str = "train",
    backend: str = "auto",
    strict: bool = False,
    memory_format: str | torch.memory_format = "auto",
    max_prepared_bytes: int = 1 << 30,
) -> tuple[ModelT, SwapReport]:
    """Replace the convolutions of a model, and the activations behind them, by fused modules, in
    place.

    Every `nn.Conv2d` becomes a `Conv2dAct`, every `nn.ConvTranspose2d` a `ConvTranspose2dAct`,
    which hold the very same Parameter objects under the same names: state_dict, checkpoints and
    optimizers made before stay valid (fused ones apart, see memory_format). A ReLU or leaky ReLU
    that follows (as a module, a function held in an attribute, or a function called in `forward`)
    moves into the convolution; a convolution followed by anything else gets its bias fused. What
    may change results is left alone, and the report says why. Calling it again with the same
    arguments changes nothing. To see what runs, forwards are called without data, several times and
    with other values of attributes that choose layers; what they print, or keep in lists, tables
    and objects, is undone, what they write to files is not.

    While gradients are needed on CPU, convolutions of an nn.Sequential that follow each other, with
    or without activations, are one node of the autograd graph, which calls the same kernels with
    less in between, and so is a whole model or module that consists of nothing else; hooks on one
    of them, autocast or a transform put them back to single calls.

    The model keeps its class and identity. `model.train()`, `copy.deepcopy`, pickling and
    `torch.compile` work afterwards. Call `restore` before changing the model's structure, before
    hooking a layer to see values before its activation, and before copying the model shallowly, as
    `copy.copy` and DataParallel do: a forward that was set on a module (a rewritten one, a chain, a
    graph) belongs to that module and runs its layers, also when a shallow copy calls it. Code
    outside the model that calls an inner convolution gets its activation too. A leaky ReLU that
    ends the model saves its output for backward, so the caller must not change it in place.

    Args:
        model: any module; DataParallel and DistributedDataParallel are looked through.
        mode: "train", or "inference" for a model in eval mode, see below.
        backend: of the fused modules, see `conv2d_act`.
        strict: raise if anything is left alone; the model is then as it was.
        memory_format: "auto" converts the weights to channels_last, in place, if nothing in the
            model depends on strides; layers then pass channels_last on without conversions, and
            4-d results of the model are contiguous if the inputs were. torch.channels_last and
            torch.preserve_format decide it by hand. A fused optimizer that has stepped before holds
            its state in the format of before and must be made anew.
        max_prepared_bytes: of packed filters in inference mode, for the whole model; the layers
            that find no room pack their filters on every call, as in training.

    Inference mode, while no gradient is needed (grad mode off, or nothing requires a gradient; with
    one the modules run as in "train"):

    - Each BatchNorm2d is folded into the convolution before it. The parameters stay as they were;
      folded copies lie beside them, outside the state_dict, and are folded again when a parameter
      or statistic changes. Training such a model raises until `restore`.
    - On CPU each filter is packed (for some algorithms transformed) once, at the first call with an
      input shape, and again when the weight or bias has changed: by an optimizer, in place, by a
      checkpoint, by a conversion, or when `precision` or the number of threads chooses other
      algorithms. A write that torch does not count (through `.data` or NumPy) is seen if it reaches
      one of 16 elements spread over the tensor. `prepared_bytes(model)` tells the memory.
    - On CPU the whole graph runs at once where the forwards can be written out and the model runs
      in channels_last: 2x2 max-pools and concatenations of channels are the kernels' own,
      convolutions pool while they write where their algorithm can, layers write straight into
      concatenations, and activations that only they see lie in one arena, kept between calls
      (`release_workspace` frees it). Otherwise parts of the model or single modules run that way;
      `SwapReport.graphs` says which, and why.

    Copies, pickles and the state_dict hold none of this memory.

    Returns:
        The model itself and a `SwapReport`.

    Raises:
        TypeError: for something that is no plain module (a compiled or scripted one).
        ValueError: for an unknown option, or mode="inference" with a model in training mode.
        SwapError: with strict=True, when a candidate was left alone.
        RuntimeError: for a model that was optimized with other arguments, as by `restore`.
    """
    options = _checked_options(model, mode, backend, memory_format, max_prepared_bytes)
    inner: nn.Module = model.module if isinstance(model, _WRAPPERS) else model
    journal = journal_of(inner)
    if journal is not None and journal.options == options and journal.layers == layers_of(inner):
        if strict and journal.report.skipped:
            report = journal.report
            _restore(inner, model)
            raise SwapError(report)
        return model, journal.report
    if mode == "inference" and inner.training:
        raise ValueError(
            'segpose_kernels.optimize: mode="inference" needs a model in eval mode: '
            "call model.eval() first"
        )
    _restore(inner, model)
    journal = Journal(inner, SwapReport(mode=mode, backend=backend), options)
    analysis = analyse(inner, mode)
    forwards, refusals = _rewritten_forwards(analysis, wrapped=isinstance(model, nn.DataParallel))
    filters = None
    if mode == "inference" and backend in ("auto", "cpu") and LIBRARY.has_kernels_for("CPU"):
        filters = journal.report.filters = FilterCache(max_prepared_bytes)
    try:
        _apply(analysis, forwards, journal, backend, filters)
        _choose_format(analysis, journal, options["memory_format"], _why_weights_stay(model))
        if mode == "train" and not isinstance(model, nn.DataParallel):
            _chain(inner, journal, backend)
        if filters is not None:
            install(journal, filters, wrapped=isinstance(model, nn.DataParallel))
        journal.report.rows = report_rows(analysis, refusals, backend)
    except BaseException:
        journal.undo()
        raise
    if strict and journal.report.skipped:
        journal.undo()
        raise SwapError(journal.report)
    journal.layers = layers_of(inner)
    vars(inner)[JOURNAL] = journal
    return model, journal.report


def restore(model: ModelT) -> ModelT:
    """Undo `optimize`: modules, attributes, forwards, hooks and memory formats are what they were.

    Parameters keep their present values, and what was added to a fused module since (hooks,
    parameters, buffers, children, attributes, a weight_norm by hooks) or changed in it (stride,
    padding) is on the module that comes back; a slope that was set on all the convolutions before
    a LeakyReLU is on that one. A plain model is returned as it is. Under DistributedDataParallel,
    which holds gradients in the weights' memory format, that one stays.

    Raises:
        RuntimeError: for what the plain modules could not take over, such as a parametrization of a
            fused module; the model is then as it was, and the message says what to do.
    """
    _restore(model, model)
    return model


def _restore(model: nn.Module, outermost: nn.Module) -> None:
    keep_formats = isinstance(outermost, nn.parallel.DistributedDataParallel)
    journals = [j for j in map(journal_of, model.modules()) if j is not None]
    for journal in journals:
        journal.check()
    # A part that has its own was optimized after the whole.
    for journal in reversed(journals):
        journal.undo(keep_formats=keep_formats)


def _checked_options(
    model: Any,
    mode: str,
    backend: str,
    memory_format: str | torch.memory_format,
    max_prepared_bytes: int,
) -> dict[str, Any]:
    name = "segpose_kernels.optimize"
    # Looked at by name: torch._dynamo takes seconds to import.
    if isinstance(model, nn.Module) and (
        "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None
    ):
        raise TypeError(
            f"{name}: the model is compiled already; optimize the plain model, "
            "then call torch.compile on it"
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError(f"{name}: the model is scripted; optimize the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
    if mode not in _MODES:
        raise ValueError(f"{name}: mode must be one of {_MODES}, got {mode!r}")
    backends = ("auto", *(known.name for known in BACKENDS))
    if backend not in backends:
        raise ValueError(f"{name}: backend must be one of {backends}, got {backend!r}")
    if memory_format not in _FORMATS:
        raise ValueError(
            f"{name}: memory_format must be 'auto', torch.channels_last or torch.preserve_format, "
            f"got {memory_format!r}"
        )
    if isinstance(max_prepared_bytes, bool) or not isinstance(max_prepared_bytes, int):
        raise TypeError(
            f"{name}: max_prepared_bytes must be int, not {type(max_prepared_bytes).__name__}"
        )
    if max_prepared_bytes < 0:
        raise ValueError(
            f"{name}: max_prepared_bytes must not be negative, got {max_prepared_bytes}"
        )
    return {
        "mode": mode,
        "backend": backend,
        "memory_format": _FORMATS[memory_format],
        "max_prepared_bytes": max_prepared_bytes,
    }


def _rewritten_forwards(
    analysis: Analysis, *, wrapped: bool
) -> tuple[dict[int, RewrittenForward], dict[int, str]]:
    """Forwards for the owners of pairs that modules alone cannot fuse; the second table says why
    not.
    """
    by_owner: dict[int, list[Pair]] = {}
    for pair in analysis.pairs:
        if pair.unsafe and not pair.broken and not pair.trace.tried:
            by_owner.setdefault(id(pair.trace.owner), []).append(pair)
    forwards: dict[int, RewrittenForward] = {}
    refusals: dict[int, str] = {}
    for identity, pairs in by_owner.items():
        try:
            if wrapped:
                raise UntraceableError(
                    "DataParallel copies modules, and a forward set on one would not follow"
                )
            forwards[identity] = rewrite(pairs)
        except UntraceableError as error:
            refusals[identity] = str(error)
        else:
            for pair in pairs:
                pair.rewritten = True
    return forwards, refusals


def _apply(
    analysis: Analysis,
    forwards: dict[int, RewrittenForward],
    journal: Journal,
    backend: str,
    filters: FilterCache | None,
) -> None:
    fused: dict[int, Fused] = {}
    places = _Places(analysis.model, journal)
    for identity, plan in analysis.convs.items():
        if plan.left_alone:
            continue
        inference = journal.report.mode == "inference"
        new = fused[identity] = fused_module(
            plan.module, plan.activation, backend, inference=inference, filters=filters
        )
        if isinstance(plan.batch_norm, nn.BatchNorm2d):
            fold(new, plan.batch_norm)
            passing = FoldedBatchNorm2d.__new__(FoldedBatchNorm2d)
            # Both follow a conversion or a loaded checkpoint.
            take_place(passing, plan.batch_norm)
            places.replace(plan.batch_norm, passing)
            journal.folds.append((new, passing))
        places.replace(plan.module, new)
    if journal.folds:
        journal.hook_loading()
    modules = {id(module): module for module in analysis.model.modules()}
    owners = {id(trace.owner): trace.owner for trace in analysis.traces}
    by_key = _absorbing(analysis)
    for key, plans in by_key.items():
        inside = ", ".join(plan.names[0] for plan in plans)
        old = modules.get(key[1]) if key[0] == "module" else None
        leaky = old if isinstance(old, nn.LeakyReLU) else None
        convs = [fused[id(plan.module)] for plan in plans]
        journal.absorbed.append(Absorbed(leaky, convs, plans[0].activation.negative_slope))
        if old is not None:
            passing_on = AbsorbedActivation(f"{type(old).__name__} inside {inside}")
            take_place(passing_on, old)
            places.replace(old, passing_on)
        else:
            owner = owners[key[1]]
            text = f"{plans[0].activation} inside {inside}"
            journal.replace_attribute(owner, key[2], AbsorbedCall(text))
    for identity, forward in forwards.items():
        journal.set_forward(owners[identity], forward)
    if journal.report.mode == "train":
        for module in modules.values():
            if is_pool2x2(module) and not why_not_plain(module):
                pool = MaxPool2x2()
                take_place(pool, module)
                places.replace(module, pool)


def _chain(model: nn.Module, journal: Journal, backend: str) -> None:
    """Convolutions that follow each other become one node of the graph on CPU: those of a
    Sequential, and of a module that consists of nothing else.
    """
    if backend not in ("auto", "cpu") or not LIBRARY.has_kernels_for("CPU"):
        return
    # Children first: the forward of a line looks at those of its modules.
    for module in reversed(list(model.modules())):
        keeps_format = module is model and journal.report.memory_format == "channels_last"
        line = None
        if module is model or not isinstance(module, nn.Sequential):
            line = line_forward(module, keeps_format=keeps_format)
        if line is not None:
            journal.set_forward(module, line)
            if keeps_format:
                journal.unhook()  # its results are contiguous already
        elif holds_chain(module):
            journal.set_forward(module, ChainForward(module))


def _absorbing(analysis: Analysis) -> dict[Key, list[ConvPlan]]:
    return {
        key: [plan for identity, plan in analysis.convs.items() if identity in identities]
        for key, identities in analysis.absorbed.items()
    }


class _Places:
    """Where each module of the tree is; a module may have several names."""

    def __init__(self, model: nn.Module, journal: Journal) -> None:
        self.journal = journal
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for attribute, child in parent._modules.items():
                self.places.setdefault(id(child), []).append((parent, attribute))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """In every position."""
        for parent, attribute in self.places[id(old)]:
            self.journal.replace_module(parent, attribute, new)


def _why_weights_stay(model: nn.Module) -> str:
    """Who else holds on to the memory of the weights; empty if nobody does."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return (
            "DistributedDataParallel holds gradients in the memory format of before: "
            "optimize the model before it is wrapped"
        )
    on_cpu = (p for p in model.parameters() if type(p) is nn.Parameter and p.device.type == "cpu")
    if any(weight.is_shared() for weight in on_cpu):  # type: ignore[no-untyped-call]
        return "its parameters are in shared memory"
    return ""


def _choose_format(
    analysis: Analysis, journal: Journal, memory_format: str, why_weights_stay: str
) -> None:
    report = journal.report
    report.memory_format = memory_format
    report.memory_format_reason = "as asked"
    if memory_format == "auto":
        reason = why_weights_stay or why_not_channels_last(
            analysis.model,
            analysis.traces,
            analysis.untraceable,
            training=report.mode == "train",
        )
        report.memory_format = "preserve_format" if reason else "channels_last"
        report.memory_format_reason = reason or "nothing in the model depends on strides"
    if report.memory_format != "channels_last":
        return
    replaced = [
        new for _, _, _, new in journal.modules if isinstance(new, (nn.Conv2d, nn.ConvTranspose2d))
    ]
    for module in replaced:
        journal.to_channels_last(module)
    for conv, norm in journal.folds:
        fold(conv, norm)
    if replaced:
        journal.hook()
