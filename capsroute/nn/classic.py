"""The names of the classic PyTorch capsule network: scripts written for it run with only the import line changed.

The snippet is that of gram-ai/capsule-networks (2017) and its many copies: ``CapsuleLayer``, ``CapsuleNet`` and
``CapsuleLoss`` with their arguments, parameter names and output shapes. Bugs in it and its relatives are fixed;
docs/migrating.md lists them. New code should use :class:`capsroute.nn.CapsuleLinear`,
:class:`capsroute.nn.PrimaryCapsules` and :class:`capsroute.nn.CapsNet`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _backends
from .._checks import check_sizes
from ..functional import capsule_linear, squash
from .decoder import capsule_lengths, one_hot
from .layout import from_layout
from .linear import first_pass_gain

__all__ = ["CapsuleLayer", "CapsuleLoss", "CapsuleNet"]


class CapsuleLayer(nn.Module):
    """The classic capsule layer.

    ``num_route_nodes=-1`` makes convolutional primary capsules: ``num_capsules`` convolutions, each one feature of
    all capsules. Otherwise ``num_route_nodes`` capsules are routed to ``num_capsules``, as in Sabour, Frosst and
    Hinton 2017, Procedure 1: the softmax over the output capsules, for each sample by itself.

    Args:
        num_capsules: J, the number of output capsules; with -1 below, the features of a primary capsule.
        num_route_nodes: I, the number of input capsules, or -1 for primary capsules.
        in_channels: D, the features of an input capsule; with -1, channels of the input.
        out_channels: O, the features of an output capsule; with -1, the capsules at each position.
        kernel_size, stride: of the convolutions, with -1 only.
        num_iterations: R, the number of routing passes.
        backend: as in :func:`capsroute.capsule_linear`.
        device, dtype: of the parameters.

    Attributes:
        route_weights: ``[J, I, D, O]``.
        capsules: the convolutions, instead.
    """

    def __init__(
        self,
        num_capsules: int,
        num_route_nodes: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        num_iterations: int = 3,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(
            num_capsules=num_capsules,
            in_channels=in_channels,
            out_channels=out_channels,
            num_iterations=num_iterations,
        )
        _backends.check_name(backend)
        self.num_route_nodes, self.num_iterations, self.num_capsules = num_route_nodes, num_iterations, num_capsules
        self.backend = backend
        factory = {"device": device, "dtype": dtype}
        if num_route_nodes == -1:
            if kernel_size is None:
                raise TypeError("kernel_size must be given with num_route_nodes=-1, got None")
            stride = 1 if stride is None else stride
            convolutions = (
                nn.Conv2d(in_channels, out_channels, kernel_size, stride, **factory) for _ in range(num_capsules)
            )
            self.capsules = nn.ModuleList(convolutions)
        else:
            check_sizes(num_route_nodes=num_route_nodes)
            self.route_weights = nn.Parameter(
                torch.empty(num_capsules, num_route_nodes, in_channels, out_channels, **factory)
            )
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, as :class:`capsroute.nn.CapsuleLinear` does, or those of the convolutions."""
        if self.num_route_nodes == -1:
            for convolution in self.capsules:
                convolution.reset_parameters()
            return
        outputs, inputs, _, features = self.route_weights.shape
        nn.init.normal_(self.route_weights, std=first_pass_gain(inputs, outputs, "out") / math.sqrt(features))

    def squash(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """:func:`capsroute.squash`, under the name that it had in the snippet."""
        return squash(tensor, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Route, or make primary capsules.

        Args:
            x: ``[B, I, D]``; with ``num_route_nodes=-1`` ``[B, C, H, W]``.

        Returns:
            ``[J, B, 1, 1, O]``, the snippet's shape, for ``.squeeze()`` and ``.transpose(0, 1)`` in the scripts
            written for it; with ``num_route_nodes=-1`` ``[B, out_channels * height * width, num_capsules]``.
        """
        if self.num_route_nodes == -1:
            return squash(torch.stack([capsule(x).flatten(1) for capsule in self.capsules], -1))
        weight = from_layout(self.route_weights, "[J, I, D, O]")
        v = capsule_linear(x, weight, self.num_iterations, backend=self.backend)  # [B, J, O]
        return v.transpose(0, 1)[:, :, None, None]

    def extra_repr(self) -> str:
        sizes = f"num_capsules={self.num_capsules}, num_route_nodes={self.num_route_nodes}"
        return f"{sizes}, num_iterations={self.num_iterations}"


class CapsuleNet(nn.Module):
    """The classic network for 28 x 28 images of one channel and ten classes.

    Attributes:
        conv1, primary_capsules, digit_capsules, decoder: as in the snippet.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 256, kernel_size=9, stride=1)
        self.primary_capsules = CapsuleLayer(8, -1, 256, 32, kernel_size=9, stride=2)
        self.digit_capsules = CapsuleLayer(10, 32 * 6 * 6, 8, 16)
        self.decoder = nn.Sequential(
            nn.Linear(16 * 10, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, 784),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Capsule lengths and the reconstruction of images.

        Args:
            x: ``[B, 1, 28, 28]``.
            y: one-hot labels ``[B, 10]``: reconstruct from these capsules. None: from the longest.

        Returns:
            classes ``[B, 10]``, the lengths themselves, as the margin loss needs them, and the
            reconstructions ``[B, 784]``.
        """
        x = self.primary_capsules(F.relu(self.conv1(x), inplace=True))
        x = self.digit_capsules(x).flatten(2).transpose(0, 1)  # [B, 10, 16]
        classes = capsule_lengths(x)
        if y is None:
            y = one_hot(classes.argmax(1), classes.shape[1])
        _check_one_hot("y", y, classes)
        chosen = torch.where(y.unsqueeze(-1) > 0, x, 0)
        return classes, self.decoder(chosen.flatten(1))


class CapsuleLoss(nn.Module):
    """The snippet's loss: the margin loss (Sabour et al. 2017, eq. 4) and 0.0005 times the reconstruction's error."""

    def forward(self, images: Tensor, labels: Tensor, classes: Tensor, reconstructions: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            images: ``[B, 1, 28, 28]``.
            labels: one-hot ``[B, 10]``.
            classes: capsule lengths ``[B, 10]``.
            reconstructions: ``[B, 784]``.
        """
        _check_one_hot("labels", labels, classes)
        present = F.relu(0.9 - classes).square()
        absent = F.relu(classes - 0.1).square()
        margin = (labels * present + 0.5 * (1 - labels) * absent).sum(1).mean()
        # the sum over pixels, averaged over the batch, as in the paper
        error = (reconstructions - images.flatten(1)).square().sum(1).mean()
        return margin + 0.0005 * error


def _check_one_hot(name: str, labels: Tensor, classes: Tensor) -> None:
    """Ten class indices would broadcast with ten classes, and pass for one-hot labels."""
    if labels.shape != classes.shape:
        raise ValueError(f"{name} must be one-hot {list(classes.shape)}, got {list(labels.shape)}")
