# SPDX-License-Identifier: BSD-3-Clause
"""A case: one subject, one dtype, forward alone or a training step; and the work it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ..testing.spec import ConvSpec
from .subjects import Subject, make_subject

__all__ = ["DTYPES", "Case", "Mode", "Tier", "dtype_name"]

Mode = Literal["inference", "training"]
Tier = Literal["quick", "full", "extra"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One line of a results table.

    Attributes:
        name: of the problem, or of the model with its input, such as `cpm2dpose-1x3x256x256`.
        group: the family that the geometric means are taken over.
        mode: "inference" is a forward under no_grad; "training" is a forward and a backward from a
            given gradient to every parameter (and to the input of a layer). Loss and optimizer are
            left out: they are the same for all.
        dtype: of every tensor; in bfloat16 or float16 training, of autocast over float32
            parameters, as such models are trained.
        what: a convolution problem, or the name of a model.
        input_shape: [N, C, H, W].
        flops: of one call, 2 per multiply-add, over input positions for transposed convolutions; a
            training step counts three passes.
        bytes: compulsory traffic of one call, each operand and result once; None for a model, whose
            activations need not touch memory.
        tier: "quick" is in `segpose bench --quick`, "full" in `segpose bench`, "extra" runs only
            when it is selected by name.
        note: what else a reader has to know, such as "1 image of 128".
        sweep: the quantity that a series of cases varies, and its value here.
        contenders: names of those that take part; empty for all.
        sizes: how many sizes of input take turns, call by call; inference only.
    """

    name: str
    group: str
    mode: Mode
    dtype: torch.dtype
    what: ConvSpec | str
    input_shape: tuple[int, int, int, int]
    flops: float
    bytes: float | None
    tier: Tier = "full"
    note: str = ""
    sweep: tuple[str, int] | None = None
    contenders: tuple[str, ...] = ()
    sizes: int = 1

    @property
    def spec(self) -> ConvSpec | None:
        """The problem of a single layer; None for a model."""
        return self.what if isinstance(self.what, ConvSpec) else None

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def id(self) -> str:
        """Unique name, for tables, tests and `--only`."""
        return f"{self.name} {dtype_name(self.dtype)} {self.mode}"

    @cached_property
    def subject(self) -> Subject:
        """Module, input and gradient; the same numbers each time."""
        return make_subject(self.what, self.dtype, input_shape=self.input_shape)

    def forget(self) -> None:
        """Free the subject's memory; `subject` makes it again."""
        self.__dict__.pop("subject", None)

    def __str__(self) -> str:
        return self.id
