"""The whole network: an image to class capsules, and back to an image."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from .._checks import check_image_shape, check_images, check_sizes
from .decoder import Decoder, capsule_lengths
from .linear import CapsuleLinear
from .primary import PrimaryCapsules


class CapsNetOutput(NamedTuple):
    """What :class:`CapsNet` and :class:`DeepCapsNet` return."""

    capsules: Tensor  # [B, J, O]
    lengths: Tensor  # [B, J], at least float32; the longest capsule is the prediction
    reconstruction: Tensor  # [B, C, H, W], or [B, K, C, H, W] with labels [B, K]


with contextlib.suppress(AttributeError):  # torch.export.save asks for it; there is no public way to say it
    _pytree._register_namedtuple(CapsNetOutput, serialized_type_name="capsroute.nn.CapsNetOutput")


class CapsNet(nn.Module):
    """A capsule network for images of any size (Sabour, Frosst and Hinton 2017, section 4).

    Convolution, :class:`PrimaryCapsules`, :class:`CapsuleLinear` to one capsule a class, :class:`Decoder`.
    The defaults are the paper's. Kernel 9 and stride 2 are for 28 x 28 pixels. Other sizes scale them; kernels stay
    between 3 and 9, but the primary kernel is never smaller than its stride.

    Args:
        image_shape: (channels, height, width).
        classes: J, the number of classes.
        channels: channels of the first convolution.
        types: primary capsules at each position.
        primary_features: D, the features of a primary capsule.
        class_features: O, the features of a class capsule.
        iterations: R, the number of routing passes.
        hidden: widths of the decoder's hidden layers.
        device, dtype: of the parameters.
        **routing: other keyword arguments of the :class:`CapsuleLinear`, such as ``bias``, ``leaky``,
            ``detach_coupling`` and ``backend``.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
            The image may also be too small.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        channels: int = 256,
        types: int = 32,
        primary_features: int = 8,
        class_features: int = 16,
        iterations: int = 3,
        hidden: tuple[int, ...] = (512, 1024),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing,
    ):
        super().__init__()
        check_image_shape(image_shape)
        check_sizes(classes=classes, channels=channels, types=types)
        check_sizes(primary_features=primary_features, class_features=class_features)
        self.image_shape = tuple(image_shape)
        factory = {"device": device, "dtype": dtype}
        kernel, primary_kernel, stride, grid = zip(*map(_scale, image_shape[1:]), strict=True)
        self.grid = (*grid, types)  # of the primary capsules: height, width, types
        self.conv = nn.Conv2d(image_shape[0], channels, kernel, **factory)
        self.primary = PrimaryCapsules(channels, types, primary_features, primary_kernel, stride, **factory)
        self.routing = CapsuleLinear(
            grid[0] * grid[1] * types, primary_features, classes, class_features, iterations, **routing, **factory
        )
        self.decoder = Decoder(classes, class_features, self.image_shape, hidden, **factory)

    def primary_capsules(self, images: Tensor) -> Tensor:
        """The input of the routing, ``[B, I, D]``, I = height * width * types of ``grid``."""
        check_images(images, self.image_shape)
        return self.primary(F.relu(self.conv(images)))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> CapsNetOutput:
        """Class capsules, their lengths and the reconstruction of images ``[B, C, H, W]``.

        Args:
            images: ``[B, C, H, W]`` in the dtype of the parameters, values in [0, 1].
            labels: int64 ``[B]``: reconstruct from these capsules (training), with ``[B, K]`` from each of
                K alone. None: from the longest (prediction). Labels affect the reconstruction only.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
        """
        capsules = self.routing(self.primary_capsules(images))  # [B, J, O]
        return CapsNetOutput(capsules, capsule_lengths(capsules), self.decoder(capsules, labels))


def _scale(side: int) -> tuple[int, int, int, int]:
    """Along one side of the image the kernel, that of the primary capsules, their stride and their number."""
    kernel = min(max(round(side * 9 / 28), 3), 9)
    stride = max(round(side * 2 / 28), 1)
    primary_kernel = max(kernel, stride)  # so that none of a large image is passed over
    positions = (side - kernel - primary_kernel + 1) // stride + 1  # neither convolution is padded
    if positions < 1:
        raise ValueError(f"image_shape must have a height and width of at least 5, got {side}")
    return kernel, primary_kernel, stride, positions
