"""Random shifts, rotations and affine maps of training images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(NamedTuple):
    """How far training images are moved at random, at most; each number is drawn evenly from [-most, most].

    Attributes:
        shift: in x and in y, as a fraction of the side (the paper: 2 of 28 pixels).
        rotation: degrees.
        scale: a zoom by up to this factor less 1, in or out: 0.1 is between 1/1.1 and 1.1.
        shear: degrees.
    """

    shift: float = 2 / 28
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random maps ``[count, 2, 3]`` from a pixel (x, y, 1) of the result to one of the image.

        x and y are in units of half the height, from the centre; shifts in units of half a side.
        """
        *move, rotation, scale, shear = 2 * torch.rand(5, count, generator=generator, device=generator.device) - 1
        rotation, shear = rotation * math.radians(self.rotation), (shear * math.radians(self.shear)).tan()
        zoom = (scale * math.log1p(self.scale)).exp()
        cos, sin = rotation.cos() * zoom, rotation.sin() * zoom
        linear = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos]).view(2, 2, count)
        shift = 2 * self.shift * torch.stack(move).unsqueeze(1)  # [2, 1, count]
        return torch.cat([linear, shift], 1).permute(2, 0, 1)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` under maps ``[B, 2, 3]`` as :meth:`Augmentation.draw` gives them; zeros come in."""
    height, width = images.shape[2:]
    # affine_grid counts both axes from -1 to 1: a rotation of an image that is not square would shear it.
    aspect = torch.tensor([[1, height / width, 1], [width / height, 1, 1]], dtype=maps.dtype, device=maps.device)
    grid = F.affine_grid((maps * aspect).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
