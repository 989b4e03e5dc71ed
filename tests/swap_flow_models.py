# SPDX-License-Identifier: BSD-3-Clause
"""Small models whose Python code decides what runs, for the tests of `optimize`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def conv3() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


class Pair(nn.Module):
    """One convolution and one activation, and a flag that starts off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3()
        self.act = nn.ReLU()
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class LocalName(Pair):
    """A branch uses the convolution through a local variable."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        y = self.act(conv(x))
        if self.flag:
            y = conv(y)
        return y


class OtherValue(Pair):
    """A branch puts another value under the name that the activation reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.flag:
            y = -x
        return self.act(y)


class KeptName(Pair):
    """A branch after the activation returns the value before it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.act(y)
        if self.flag:
            return y
        return z


class Collected(Pair):
    """A branch reads the value before the activation out of a list."""

    def forward(self, x: Tensor) -> Tensor:
        values = [self.conv(x)]
        z = self.act(values[0])
        return values[-1] * z if self.flag else z


class BothArms(Pair):
    """The convolution is called in both arms, with and without its activation."""

    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            return self.conv(x)
        return self.act(self.conv(x))


class ActivationReused(Pair):
    """A branch calls the activation on another value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        if self.flag:
            y = self.act(-x)
        return y


class ShortCircuit(Pair):
    """The activation hides in a boolean expression."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (not self.flag and self.act(y)) or y if self.flag else self.act(y)


class Inherited(Pair):
    """The pair is in the base class's forward; the convolution is used once more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.conv(x)


class Instance(Pair):
    """Takes a tensor or a list of them; the list gets no activation."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(x, Tensor):
            return self.act(self.conv(x))
        return [self.conv(part) for part in x]


class FunctionalFlag(Pair):
    """A functional activation behind a flag."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.flag else F.leaky_relu(y, 0.3)


class Counted(nn.Module):
    """Loops whose number of turns is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3()
        self.act = nn.ReLU()
        self.layers = nn.ModuleList([conv3(), nn.ReLU(), conv3(), nn.ReLU()])
        self.flag = 4

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.flag):
            x = self.act(self.conv(x))
        for i in range(self.flag):
            x = self.layers[i](x)
        return x


class Dense(nn.Module):
    """Features collected in a list and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 * i, 3, 3, padding=1) for i in (1, 2, 3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs:
            features.append(self.relu(conv(torch.cat(features, 1))))
        return torch.cat(features, 1)


class Branches(nn.Module):
    """A comprehension over layers, and pairs by `zip`."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, k, padding=k // 2) for k in (1, 3))
        self.more = nn.ModuleList(conv3() for _ in range(2))
        self.acts = nn.ModuleList(nn.LeakyReLU(s) for s in (0.1, 0.2))
        self.act = nn.LeakyReLU(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = sum([self.act(conv(x)) for conv in self.convs])
        for conv, act in zip(self.more, self.acts, strict=True):
            x = act(conv(x))
        return x


class Auxiliary(nn.Module):
    """A second result in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.aux = conv3(), conv3(), conv3()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.relu(self.conv(x))
        if self.training:
            return self.head(x), self.relu(self.aux(x))
        return self.head(x)


class Residual(nn.Module):
    """Functional activations, one of them behind an in-place addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3(), conv3()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x))
        y = self.conv2(y)
        y += x
        return F.relu(y)


class NoGrad(nn.Module):
    """A forward that a decorator runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = Residual(), conv3()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(self.inner(x)))


class ChangedOutside(nn.Module):
    """A block's leaky result changed in place by the module that called it, through an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv3(), nn.LeakyReLU(0.1))
        self.same = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(self.block(x))
        y.add_(x)
        return y


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv3(), nn.ReLU(inplace=True), conv3())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class StochasticDepth(Pair):
    """Skips its layers at random."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return F.relu(self.act(self.conv(x)))


class RandomScale(Pair):
    """A number drawn in Python, which a graph would freeze."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) * torch.rand(1).item()
