# SPDX-License-Identifier: BSD-3-Clause
"""The autoencoder: a 28x28 image through 64 numbers and back."""

from __future__ import annotations

from torch import Tensor, nn


def digit_encoder() -> nn.Sequential:
    """Three convolutions, [N, 1, 28, 28] -> [N, 16, 14, 14] -> [N, 32, 7, 7] -> [N, 64, 1, 1]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 7),
    )


def digit_decoder(out_channels: int, *, final_activation: bool) -> nn.Sequential:
    """Three transposed convolutions, [N, 64, 1, 1] -> 32x7x7 -> 16x14x14 -> [N, C, 28, 28].

    `output_padding=1` picks the even one of the two extents (2*in - 1 and 2*in) that a stride-2
    convolution maps to the same size.
    """
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(64, 32, 7),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, out_channels, 3, stride=2, padding=1, output_padding=1),
    ]
    if final_activation:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Autoencoder(nn.Module):
    """Convolutional autoencoder of the lecture; `encoder` and `decoder` are `nn.Sequential`.

    Input and output are [N, 1, 28, 28], float32; the final ReLU keeps the output non-negative, as
    pixels are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = digit_encoder()
        self.decoder = digit_decoder(1, final_activation=True)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 1, 28, 28] -> [N, 1, 28, 28]."""
        decoded: Tensor = self.decoder(self.encoder(image))
        return decoded
