"""The decoder that reconstructs an image from one capsule."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from .._checks import check_image_shape, check_labels, check_sizes, check_tensor, check_widths
from ..reference import accumulation_dtype


class Decoder(nn.Module):
    """Reconstruct the image from one capsule of J, the others set to 0 (Sabour et al. 2017, section 4.1).

    Fully connected layers with ReLU between them and a sigmoid at the end.

    Args:
        capsules: J, the number of capsules.
        features: O, the features of a capsule.
        image_shape: (channels, height, width) of the image.
        hidden: the widths of the hidden layers.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    def __init__(
        self,
        capsules: int,
        features: int,
        image_shape: tuple[int, int, int],
        hidden: tuple[int, ...] = (512, 1024),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(capsules=capsules, features=features)
        check_image_shape(image_shape)
        check_widths("hidden", hidden)
        self.capsules, self.features, self.image_shape = capsules, features, tuple(image_shape)
        widths = (capsules * features, *hidden, math.prod(image_shape))
        layers = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, device=device, dtype=dtype), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())

    def forward(self, capsules: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images ``[B, C, H, W]``, values in [0, 1], from capsules ``[B, J, O]``.

        Args:
            capsules: ``[B, J, O]``.
            labels: the capsules to draw, int64 ``[B]`` (training); None draws the longest (prediction).
                With ``[B, K]`` each of K capsules is drawn alone: ``[B, K, C, H, W]``.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
        """
        check_tensor("capsules", capsules, "[B, J, O]")
        if capsules.dim() != 3 or capsules.shape[1:] != (self.capsules, self.features):
            raise ValueError(
                f"capsules must be [B, J, O] with J = {self.capsules} and O = {self.features}, "
                f"got {list(capsules.shape)}"
            )
        if labels is None:
            labels = capsule_lengths(capsules).argmax(-1)
        check_labels(labels, capsules.shape[0])
        capsules = capsules if labels.dim() == 1 else capsules.unsqueeze(1)
        # Select, do not multiply: a NaN in another capsule must not reach the image.
        masked = torch.where(one_hot(labels, self.capsules).unsqueeze(-1), capsules, 0)  # [B, J, O] or [B, K, J, O]
        return self.layers(masked.flatten(-2)).unflatten(-1, self.image_shape)


def capsule_lengths(capsules: Tensor) -> Tensor:
    """|v| ``[*, J]`` of ``[*, J, O]``: how sure a capsule is that what it stands for is there.

    In float32 for low precision; its derivatives, of any order, are 0 at v = 0.
    """
    none = (capsules == 0).all(-1)  # there torch's second derivative of a norm is NaN
    some = capsules.masked_fill(none.unsqueeze(-1), 1)
    return torch.linalg.vector_norm(some, dim=-1, dtype=accumulation_dtype(capsules.dtype)).masked_fill(none, 0)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels [*] as bool [*, J]. torch refuses those outside 0..J-1; F.one_hot would refuse vmap."""
    nowhere = labels.new_zeros(*labels.shape, classes, dtype=torch.bool)
    return nowhere.scatter(-1, labels.unsqueeze(-1), 1)  # torch.jit.trace takes no True
