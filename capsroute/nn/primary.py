"""The first layer of capsules, made from an image's features by a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import squash
from ._checks import check_sizes


class PrimaryCapsules(nn.Module):
    """A convolution whose output channels, in groups of D, are capsules at every position.

    Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", 2017, section 4. A capsule's D features
    are D neighbouring channels of one position of one type; capsule i of the output lies at
    i = (y * width + x) * types + type.

    Args:
        in_channels: channels of the input.
        types: capsules at each position.
        features: D, the features of a capsule.
        kernel_size, stride: of the convolution, one int or (height, width); it is not padded.
        eps: as in :func:`capsroute.squash`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for a wrong argument, by its name.
    """

    def __init__(
        self,
        in_channels: int,
        types: int,
        features: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        *,
        eps: float = 1e-9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(in_channels=in_channels, types=types, features=features)
        self.types, self.features, self.eps = types, features, eps
        self.conv = nn.Conv2d(in_channels, types * features, kernel_size, stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Squashed capsules ``[B, I, D]``, I = height * width * types, from features ``[B, C, H, W]``."""
        s = self.conv(x)  # [B, types * D, height, width]
        s = s.unflatten(1, (self.types, self.features)).permute(0, 3, 4, 1, 2)  # [B, height, width, types, D]
        return squash(s.flatten(1, 3), eps=self.eps)
