# SPDX-License-Identifier: BSD-3-Clause
"""Small models in the ways people write them, for the tests of `optimize`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PoseMachine(nn.Module):
    """The lecture's way: the activation is a function held in an attribute."""

    def __init__(self, all_stages: bool = False) -> None:
        super().__init__()
        self.relu = F.leaky_relu
        self.all_stages = all_stages
        self.maxpool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 4, 1)
        self.conv4 = nn.Conv2d(10, 6, 7, padding=3)
        self.conv5 = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.relu(self.conv1(x))
        x = self.maxpool(x)
        encoding = self.relu(self.conv2(x))
        scoremap3 = self.conv3(encoding)
        x = torch.cat((scoremap3, encoding), dim=1)
        x = self.relu(self.conv4(x))
        scoremap5 = self.conv5(x)
        if self.all_stages:
            return scoremap3, scoremap5
        return scoremap5


class DoubleConv(nn.Module):
    """A U-Net's block as a Sequential with in-place activations."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """Skips by concatenation, transposed convolutions up, the sizes evened out by F.pad."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = DoubleConv(3, 4)
        self.down2 = DoubleConv(4, 8)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.conv = DoubleConv(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down1(x)
        x2 = self.up(self.down2(self.pool(x1)))
        dy, dx = x1.size(2) - x2.size(2), x1.size(3) - x2.size(3)
        x2 = F.pad(x2, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.out(self.conv(torch.cat([x1, x2], dim=1)))


class BasicBlock(nn.Module):
    """ResNet's block: one ReLU used behind a BatchNorm and behind an addition."""

    def __init__(self, c: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.layer1 = nn.Sequential(BasicBlock(4), BasicBlock(4, shortcut))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer1(x))
        return self.fc(torch.flatten(x, 1))


def generator(norm: bool = True) -> nn.Sequential:
    """A DCGAN generator of 8x8 images."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False)]
    layers += [nn.BatchNorm2d(8), nn.ReLU(True)] if norm else [nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Dropout2d(0.3),
        nn.Conv2d(4, 1, 4),
    )


class Functional(nn.Module):
    """Every functional way to write the two activations, and dropout that reads `self.training`."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(7))
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.p = 0.4

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convs[0](x))
        x = torch.relu(self.convs[1](x))
        x = self.convs[2](x).relu()
        x = F.leaky_relu(self.convs[3](x), 0.2)
        x = F.leaky_relu(self.convs[4](x), negative_slope=0.1, inplace=True)
        x = F.dropout(x, self.p, training=self.training)
        x = F.relu_(self.convs[5](x))
        x = self.convs[6](x)
        x = F.relu(x, inplace=True)
        return F.relu(self.up(x, output_size=[2 * x.size(2), 2 * x.size(3)]))


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = partial(F.leaky_relu, negative_slope=0.3)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Flagged(nn.Module):
    """The activation runs under a flag that a user may change at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.use_act = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.use_act:
            x = self.act(x)
        return x


class EarlyExit(nn.Module):
    """A branch not taken reads the value before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.logits = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.logits:
            return y
        return self.act(y)


class SafeFlag(nn.Module):
    """A branch after the pair, on a name that no longer holds the value before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.LeakyReLU(0.2)
        self.pool: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.act(x)
        if self.pool is not None:
            x = self.pool(x)
        return x


class OtherMethod(nn.Module):
    """Another method calls the convolution without its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DataDependent(nn.Module):
    """A forward that no tracer can follow, around a block that one can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if x.sum() > 0:
            return self.act(self.conv(x))
        return self.conv(x)


class Slicing(nn.Module):
    """A forward that takes a Sequential apart."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) + self.features[:3](x)


class Taps(nn.Module):
    """A loop over layers that collects some of the values on the way."""

    def __init__(self, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()]
        )
        self.taps = taps

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                kept.append(x)
        return x + sum(kept)


class Loop(nn.Module):
    """A loop over layers and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class InplaceSkip(nn.Module):
    """A skip added in place to a leaky ReLU's result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        y += x
        return y


class Stash(nn.Module):
    """Keeps the value before the activation for somebody else to read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.before = self.conv(x)
        return self.act(self.before)


class HeldInList(nn.Module):
    """Plain list beside the registered modules: a replacement in the module tree would not reach
    it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.act = nn.ReLU()
        self.order = [self.conv, self.act]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


class Twice(nn.Module):
    """One convolution called twice; `second` says whether the second call is activated too."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()
        self.other = nn.Identity() if not second else self.act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        return self.other(self.conv(x))


class GradMode(nn.Module):
    """The activation runs without gradients, the convolution with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.no_grad():
            y = self.act(y)
        return y


class Conditional(nn.Module):
    """The activation in one arm of a conditional expression."""

    def __init__(self, act: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) if self.act is not None else y


class Helper(nn.Module):
    """The pair inside a helper method that gets the layer as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3)
        self.b = nn.Conv2d(3, 3, 3)
        self.act = nn.LeakyReLU()

    def activated(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.act(layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(self.b, self.activated(self.a, x))
