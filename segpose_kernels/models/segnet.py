# SPDX-License-Identifier: BSD-3-Clause
"""SegNet: semantic segmentation by the autoencoder's shape with one output channel for each class.

The lecture's listing has three slips. They are named here because each costs whoever copies it
something:

1. `super(Autoencoder, self).__init__()` inside class SegNet raises TypeError (SegNet is no
Autoencoder); it is
   `super().__init__()` here.
2. A softmax stands in front of `CrossEntropyLoss`, which applies log-softmax itself. Softmax of a
softmax is nearly
   flat, so gradients are small and the loss cannot fall below log(1 + (C - 1)/e). Training takes
   logits here; `segpose_kernels.training.SegNetRecipe(softmax_before_loss=True)` gives the
   lecture's version for comparison.
3. The final ReLU clamps logits at zero: a class whose logit is negative on every pixel gets no
gradient and may never
   come back. It is kept by default for fidelity; `final_activation=False` leaves it out. With it
   on, `segpose_kernels.training.lift_final_bias` starts every class on the ReLU's live side.
"""

from __future__ import annotations

from torch import Tensor, nn

from .autoencoder import digit_decoder, digit_encoder


class SegNet(nn.Module):
    """A class for each pixel of a 28x28 image; instances of a class are not told apart.

    Args:
        num_objects: number of classes C, the background included; at least 1.
        final_activation: end in the lecture's ReLU (slip 3 above). Without it `decoder` is one
            module shorter; the state_dict is the same.

    Raises:
        ValueError: if `num_objects` is below 1.
    """

    def __init__(self, num_objects: int, final_activation: bool = True) -> None:
        super().__init__()
        if num_objects < 1:
            raise ValueError(f"num_objects must be at least 1, got {num_objects}")
        self.num_objects = num_objects
        self.final_activation = final_activation
        self.encoder = digit_encoder()
        self.decoder = digit_decoder(num_objects, final_activation=final_activation)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 1, 28, 28] -> logits [N, C, 28, 28]; the class of a pixel is the argmax over C."""
        logits: Tensor = self.decoder(self.encoder(image))
        return logits
