"""The first layer of capsules, made from an image's features by a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_eps, check_flag, check_sizes, pair
from ..functional import squash


class PrimaryCapsules(nn.Module):
    """A convolution whose output channels, in groups of D, are capsules at every position.

    Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", 2017, section 4. A capsule's D features
    are D neighbouring channels of one position of one type; capsule i of the output lies at
    i = (y * width + x) * types + type.

    Args:
        in_channels: channels of the input.
        types: capsules at each position.
        features: D, the features of a capsule.
        kernel_size, stride, padding: of the convolution, one int or (height, width); padding also "same" or "valid".
        flatten: one list of capsules ``[B, I, D]`` for :class:`CapsuleLinear`; False: a map of them
            ``[B, height, width, types, D]`` for :class:`CapsuleConv2d`.
        eps: as in :func:`capsroute.squash`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        types: int,
        features: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        *,
        flatten: bool = True,
        eps: float = 1e-9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(in_channels=in_channels, types=types, features=features)
        check_flag("flatten", flatten)
        check_eps(eps)
        kernel_size, stride = pair("kernel_size", kernel_size), pair("stride", stride)
        if padding not in ("same", "valid"):
            padding = pair("padding", padding, least=0)
        self.types, self.features, self.flatten, self.eps = types, features, flatten, eps
        self.conv = nn.Conv2d(in_channels, types * features, kernel_size, stride, padding, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Squashed capsules from features ``[B, C, H, W]``.

        Returns:
            ``[B, I, D]``, I = height * width * types, or with ``flatten=False``
            ``[B, height, width, types, D]``.

        Raises:
            RuntimeError: from the convolution, if ``x`` has the wrong shape or dtype.
        """
        s = self.conv(x)  # [B, types * D, height, width]
        s = s.unflatten(1, (self.types, self.features)).permute(0, 3, 4, 1, 2)  # [B, height, width, types, D]
        return squash(s.flatten(1, 3) if self.flatten else s, eps=self.eps)

    def extra_repr(self) -> str:
        return f"types={self.types}, features={self.features}, flatten={self.flatten}, eps={self.eps}"
