"""The transpose of convolutional capsules, which makes maps larger."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import pair
from ._windows import Windows, route_windows
from .conv import CapsuleConv


class _Phase(NamedTuple):
    """Along one dimension: the taps of the kernel that the outputs of a phase see, and the padding of their windows."""

    taps: slice
    padding: tuple[int, int]


class CapsuleConvTranspose2d(CapsuleConv):
    """The transposed convolution of capsules, which makes maps larger: "deconvolutional capsules".

    Every output position routes the capsules of those input positions whose kernel reaches it::

        v[y, x] = capsule_linear(u, weight),   u = map[i, k] where y = i sy - py + a, x = k sx - px + b,
                                               0 <= a < kh, 0 <= b < kw

    LaLonde and Bagci, "Capsules for Object Segmentation", 2018, with routing over the whole receptive field.
    The output positions of one phase, (y + py) mod sy and (x + px) mod sx, see the same part of the kernel: each phase
    is a :class:`CapsuleConv2d` of that part, so zeros between inputs are never multiplied.

    Args:
        in_types, in_features, out_types, out_features, iterations: as in :class:`CapsuleConv2d`.
        bias, coupling, leaky, detach_coupling, eps, backend, chunk_bytes, device, dtype: likewise.
        kernel_size, stride, padding, output_padding: as in :class:`torch.nn.ConvTranspose2d`, one int or
            (height, width). The kernel must not be smaller than the stride, or some outputs would see nothing.

    Attributes:
        weight: ``[kh, kw, C, D, J, O]``.
        bias: ``[J, O]`` or None.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    _also = "output_padding"

    def __init__(
        self,
        in_types: int,
        in_features: int,
        out_types: int,
        out_features: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        iterations: int = 3,
        **options,
    ):
        kernel, steps = pair("kernel_size", kernel_size), pair("stride", stride)
        if any(k < s for k, s in zip(kernel, steps, strict=True)):
            raise ValueError(f"kernel_size must be at least stride = {steps}, got {kernel}")
        super().__init__(
            in_types, in_features, out_types, out_features, kernel_size, stride, padding, iterations, **options
        )
        self.output_padding = pair("output_padding", output_padding, least=0)
        if any(p >= s for p, s in zip(self.output_padding, self.stride, strict=True)):
            raise ValueError(f"output_padding must be less than stride = {self.stride}, got {self.output_padding}")

    def _window_capsules(self) -> int:
        return round(math.prod(self.kernel_size) / math.prod(self.stride)) * self.in_types  # on average

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Output capsules ``[B, H', W', J, O]``, H' = (H - 1) sy - 2 py + kh + output_padding, of ``[B, H, W, C, D]``.

        Args:
            x: the map, in the dtype of the weight.
            mask: bool, broadcast to ``[B, H, W, C]``; False takes an input capsule out.

        Raises:
            TypeError, ValueError: if an input has the wrong shape or dtype, or leaves no output.
        """
        mask = self._checked(x, mask)
        height, width = (
            (n - 1) * s - 2 * p + k + more
            for n, s, p, k, more in zip(
                x.shape[1:3], self.stride, self.padding, self.kernel_size, self.output_padding, strict=True
            )
        )
        if height < 1 or width < 1:
            raise ValueError(f"x must leave an output, got {list(x.shape)}, which gives {height} x {width}")
        columns = []
        for rx in range(min(self.stride[1], width)):
            across = self._phase(1, rx, x.shape[2], width)
            rows = []
            for ry in range(min(self.stride[0], height)):
                down = self._phase(0, ry, x.shape[1], height)
                weight = self.weight[down.taps][:, across.taps].flip(0, 1)
                windows = Windows(weight.shape[:2], padding=(*down.padding, *across.padding))
                rows.append(
                    route_windows(x, mask, weight, self.bias, windows, self.chunk_bytes, self.routing_options())
                )
            columns.append(torch.stack(rows, 2).flatten(1, 2))  # [B, H' or a little more, W' / sx, J, O]
        return torch.stack(columns, 3).flatten(2, 3)[:, :height, :width]

    def _phase(self, d: int, r: int, size: int, outputs: int) -> _Phase:
        """The outputs y = r, r + s, ...: with y + p = s q + phase, the tap phase + s t sees the input q - t."""
        s = self.stride[d]
        first, phase = divmod(r + self.padding[d], s)  # q of the first
        count = -(-outputs // s)
        taps = slice(phase, None, s)
        reach = len(range(phase, self.kernel_size[d], s))
        return _Phase(taps, (reach - 1 - first, first + count - size))
