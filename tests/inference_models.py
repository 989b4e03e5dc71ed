# SPDX-License-Identifier: BSD-3-Clause
"""Small models whose values meet pools, concatenations and other code, for inference tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(c_in: int, c_out: int, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, k, padding=k // 2)


def vgg() -> nn.Sequential:
    """BatchNorm, activation and pool in a row, as torchvision's VGG."""
    return nn.Sequential(
        conv(3, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=2, stride=2),
        conv(8, 5),
        nn.BatchNorm2d(5),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2, 2),
        nn.ConvTranspose2d(5, 6, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
    )


class NestedCat(nn.Module):
    """A concatenation inside another, of values of every kind, each read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 5), conv(9, 3)
        self.d, self.e = conv(15, 4), conv(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.leaky_relu(self.b(a), 0.1)
        inner = torch.cat((a, b), dim=1)
        c = self.c(inner)
        outer = torch.cat([inner, c, x], 1)
        d = self.d(outer)
        return self.e(torch.cat((d, c), dim=1)) + self.e(torch.cat((a, c), 1))


class TwiceInOneCat(nn.Module):
    """One value twice in a concatenation, and in a second one at another place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(8, 4)
        self.c = conv(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(torch.cat((a, a), 1)))
        return self.c(torch.cat((b, a, b), dim=1))


class ChangedConcatenation(nn.Module):
    """A concatenation that is changed in place while one of its inputs is still to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(3, 4), conv(8, 4)
        self.d = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        both = torch.cat((a, self.b(x)), 1)
        both = both.mul_(2).clamp_(-1, 1)
        return self.c(both) + self.d(a)


class Returned(nn.Module):
    """Returns the inputs of a concatenation, the concatenation and a pool of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(3, 5), conv(9, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        a, b = F.relu(self.a(x)), self.b(x)
        both = torch.cat((a, b), 1)
        return {"parts": (a, b), "both": both, "pooled": F.max_pool2d(a, 2), "c": self.c(both)}


class UnpooledToo(nn.Module):
    """The value before a pool is read again, the pooled one twice; pools of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(8, 4)
        self.pool = nn.MaxPool2d(2)
        self.other = nn.MaxPool2d(2, stride=1, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        low = self.pool(a)
        up = self.up(F.relu(self.b(low)) + low)
        up = F.pad(up, (0, a.shape[3] - up.shape[3], 0, a.shape[2] - up.shape[2]))
        y = self.c(torch.cat((a, up), 1))
        return F.max_pool2d(self.other(y), 2, ceil_mode=True) + self.pool(self.pool(y)).mean()


class Shared(nn.Module):
    """One convolution at three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = F.relu(self.a(F.max_pool2d(x, 2)))
        return self.a(x).mean() + F.relu(self.a(F.max_pool2d(y, 2)))


class Views(nn.Module):
    """Values that other code keeps views of, and the caller gets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.drop(F.relu(self.a(x)))
        b = self.b(a)
        return a[:, :2], b.flatten(2), b.transpose(0, 1), self.b(b)


class OutputSize(nn.Module):
    """A transposed convolution that is told its size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)), output_size=[x.size(2), x.size(3)])


class SizedSlices(nn.Module):
    """Slices whose ends are computed from sizes, and arguments in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)
        self.c = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        rows, columns = a.size(2) // 2, a.size(3) - 2
        cut = a[:, :, :rows, 1:columns]
        b = F.relu(self.b(cut))
        return self.c(torch.stack([b, cut[:, :, :rows]])[0][..., : columns - 1])


class Padded(nn.Module):
    """Paddings that run before the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(4, 4, (3, 2), padding="same")
        self.c = nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2)
        self.d = nn.Conv2d(4, 4, 3, padding="valid", groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


class Depending(nn.Module):
    """How many rows go on depends on the numbers, which a graph cannot show."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)
        self.c = conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        rows = a[x[:, 0, 0, 0] > 0]
        b = F.relu(self.b(rows))
        return self.c(torch.cat((b, rows), 1))


class Branching(nn.Module):
    """A forward that cannot be written out around parts that can."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.ReLU())
        self.head = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.head(x) if x.sum() > 0 else self.head(-x)
