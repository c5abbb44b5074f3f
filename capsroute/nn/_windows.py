"""Routing over the windows of a map of capsules, a chunk of positions at a time.

Unfolded to windows of k x k, an input is k^2 times as large, and its votes J O / D times that. At most the votes of a
few positions and the windows of a chunk are held at a time; windows are made when they are routed, and once more when
their gradient is wanted.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast, _autograd
from ..functional import capsule_linear
from ..reference import accumulation_dtype

Chunk = tuple[slice, slice]  # images, rows of the output


class Windows(NamedTuple):
    """Which input positions an output position sees; (height, width) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right; below 0 it crops

    def span(self, d: int) -> int:
        """The length that a window covers."""
        return self.dilation[d] * (self.kernel[d] - 1) + 1

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """The number of output positions, for a padded input."""
        return tuple((n - self.span(d)) // self.stride[d] + 1 for d, n in enumerate((height, width)))

    def pad(self, x: Tensor, value: float | bool = 0) -> Tensor:
        """x [B, H, W, ...] with the padding around it."""
        top, bottom, left, right = self.padding
        return F.pad(x, (0, 0) * (x.dim() - 3) + (left, right, top, bottom), value=value)

    def rows(self, y: slice) -> slice:
        """The input rows that the output rows y see."""
        return slice(y.start * self.stride[0], (y.stop - 1) * self.stride[0] + self.span(0))

    def unfold(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The windows [B, H', W', kh, kw, ...] of a padded x [B, H, W, ...].

        Slices are stacked, since in the gradient of Tensor.unfold, as torch 2.13 compiles it, several threads write to
        wrong places. They are cast last, so that their gradients are summed in the dtype of x.
        """
        for d in (1, 0):
            before, length = (slice(None),) * (1 + d), x.shape[1 + d] - self.span(d) + 1
            starts = range(0, self.span(d), self.dilation[d])
            parts = [x[(*before, slice(start, start + length, self.stride[d]))] for start in starts]
            x = torch.stack(parts if d else [part.to(dtype) for part in parts], 3)
        return x


def route_windows(
    x: Tensor,  # [B, H, W, C, D]
    mask: Tensor | None,  # [B or 1, H, W, C]
    weight: Tensor,  # [kh, kw, C, D, J, O]
    bias: Tensor | None,  # [J, O]
    windows: Windows,
    chunk_bytes: int,
    options: dict,
) -> Tensor:
    """v [B, H', W', J, O]: the kh kw C capsules of each window, routed by the weight that all positions share."""
    if mask is None and options["coupling"] == "in" and max(windows.padding) > 0:
        mask = x.new_ones((1, *x.shape[1:4]), dtype=torch.bool)  # padding has no part in a softmax over i
    mask = None if mask is None else windows.pad(mask, False)
    (weight,) = _autocast.cast(weight)  # here, since the backward, which routes once more, is not under autocast
    # x is never in low precision, as its windows may be: gradients are sums over windows and chunks, in its dtype
    x = windows.pad(x.to(accumulation_dtype(weight.dtype)))
    chunks = _chunks(x.shape, windows, chunk_bytes // weight.element_size())
    if len(chunks) == 1:
        return _route(x, mask, weight, bias, windows, options)
    # our Function has no forward mode, and a traced module that calls one cannot be saved
    direct = _autograd.in_forward_mode() or torch.jit.is_tracing()
    return (_InChunks.forward if direct else _InChunks.apply)(x, mask, weight, bias, windows, chunks, options)


def _chunks(shape: torch.Size, windows: Windows, numbers: int) -> list[Chunk]:
    """Chunks whose windows are about so many numbers. They follow from shapes alone, as the bits of dW then do."""
    batch, height, width, types, features = shape
    height, width = windows.positions(height, width)
    row = width * windows.kernel[0] * windows.kernel[1] * types * features
    rows = max(numbers // row, 1)
    if batch <= rows // height:  # asked first, so that a compiled batch may be of any size that fits
        return [(slice(0, batch), slice(0, height))]
    return list(itertools.product(_cut(batch, max(rows // height, 1)), _cut(height, min(rows, height))))


def _cut(length: int, step: int) -> list[slice]:
    return [slice(k, min(k + step, length)) for k in range(0, length, step)] or [slice(0, 0)]


def _route(x, mask, weight, bias, windows, options) -> Tensor:
    u = windows.unfold(x, weight.dtype).flatten(3, 5)  # [B, H', W', I, D]
    if mask is not None:
        mask = windows.unfold(mask, mask.dtype).flatten(3)  # [B or 1, H', W', I]
    return capsule_linear(u, weight.flatten(0, 2).permute(0, 2, 3, 1), bias=bias, mask=mask, **options)


class _InChunks(torch.autograd.Function):
    """_route, chunk by chunk. The backward makes and routes the windows of a chunk once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mask, weight, bias, windows, chunks, options):
        parts = [_route(*_chunk_of(x, mask, windows, chunk), weight, bias, windows, options) for chunk in chunks]
        rows = sum(images == chunks[0][0] for images, _ in chunks)  # chunks of one image
        return torch.cat([torch.cat(parts[k : k + rows], 1) for k in range(0, len(parts), rows)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.windows, ctx.chunks, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_v):
        x, mask, weight, bias = ctx.saved_tensors
        windows, options = ctx.windows, ctx.options
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wanted = [k for k, need in enumerate((needs_x, needs_weight, needs_bias)) if need]
        dx = grad_v.new_zeros(x.shape, dtype=x.dtype) if needs_x else None
        sums = {k: 0 for k in wanted if k > 0}
        for images, y in ctx.chunks:
            x_part, mask_part = _chunk_of(x, mask, windows, (images, y))
            tensors = x_part, weight, bias

            def route(*values, tensors=tensors, mask=mask_part):
                every = list(tensors)
                for k, value in zip(wanted, values, strict=True):
                    every[k] = value
                return _route(every[0], mask, *every[1:], windows, options)

            with _autocast.off(x):
                parts = _autograd.vjp(route, [tensors[k] for k in wanted], grad_v[images, y])
            for k, part in zip(wanted, parts, strict=True):
                if k == 0:
                    dx[images, windows.rows(y)] += part  # windows of neighbouring chunks overlap
                else:
                    sums[k] = sums[k] + part.to(x.dtype)
        dweight, dbias = (sums[k].to(p.dtype) if k in sums else None for k, p in ((1, weight), (2, bias)))
        return dx, None, dweight, dbias, None, None, None


def _chunk_of(x: Tensor, mask: Tensor | None, windows: Windows, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
    """The part of a padded input, and of its mask, that the windows of a chunk see."""
    images, rows = chunk[0], windows.rows(chunk[1])
    if mask is not None:
        mask = mask[images if mask.shape[0] > 1 else slice(None), rows]
    return x[images, rows], mask
