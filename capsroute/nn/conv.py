"""Convolutional capsules: routing within a receptive field, by a weight that all positions share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _autocast, _backends, _checks
from ._windows import Windows, route_windows
from .linear import even_pass_gain


class CapsuleConv(nn.Module):
    """What both directions share: the weight, the options of routing and their checks."""

    _also: str  # the part of the geometry that only one direction has

    def __init__(
        self,
        in_types: int,
        in_features: int,
        out_types: int,
        out_features: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        iterations: int,
        *,
        bias: bool = False,
        coupling: str = "out",
        leaky: bool = False,
        detach_coupling: bool = False,
        eps: float = 1e-9,
        backend: str = "auto",
        chunk_bytes: int = 2**25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _checks.check_options(iterations, coupling, leaky, detach_coupling, eps)
        _backends.check_name(backend)
        _checks.check_flag("bias", bias)
        _checks.check_sizes(
            in_types=in_types,
            in_features=in_features,
            out_types=out_types,
            out_features=out_features,
            chunk_bytes=chunk_bytes,
        )
        self.in_types, self.in_features = in_types, in_features
        self.out_types, self.out_features = out_types, out_features
        self.kernel_size, self.stride = _checks.pair("kernel_size", kernel_size), _checks.pair("stride", stride)
        self.padding, self.chunk_bytes = _checks.pair("padding", padding, least=0), chunk_bytes
        self.iterations, self.coupling, self.leaky = iterations, coupling, leaky
        self.detach_coupling, self.eps, self.backend = detach_coupling, eps, backend
        factory = {"device": device, "dtype": dtype}
        shape = (*self.kernel_size, in_types, in_features, out_types, out_features)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(out_types, out_features, **factory)) if bias else None
        self.reset_parameters()

    def routing_options(self) -> dict:
        """The keyword arguments of :func:`capsroute.capsule_linear` that are this layer's."""
        return {
            "iterations": self.iterations,
            "coupling": self.coupling,
            "leaky": self.leaky,
            "detach_coupling": self.detach_coupling,
            "eps": float(self.eps),  # dynamo must meet it here, outside of the Functions that several calls pass it to
            "backend": self.backend,
        }

    def _window_capsules(self) -> int:
        """I, the capsules that an output position sees."""
        return math.prod(self.kernel_size) * self.in_types

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to 0."""
        inputs, outputs = self._window_capsules(), self.out_types + self.leaky
        # Such layers are stacked: with |s| = |u| squash, which makes 0.04 of 0.2, would leave nothing after a few.
        if self.iterations == 1:
            length, most = 3, math.inf  # with |s| = 3 |u| squash maps the length 0.87 to itself
        elif self.coupling == "out":
            # Routing lengthens s, as votes that agree weigh more; with votes beyond 3 |u| it fills every capsule.
            length, most = 2, 3
        else:
            length, most = 1, math.inf  # routing can make s as long as one vote, and votes are as long as this takes
        gain = min(even_pass_gain(length, inputs, outputs, self.coupling), most)
        nn.init.normal_(self.weight, std=gain / math.sqrt(self.out_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _checked(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask as [B or 1, H, W, C], once x is known to be a map of this layer's capsules."""
        _checks.check_tensor("x", x, "[B, H, W, C, D]")
        if x.dim() != 5 or x.shape[3:] != (self.in_types, self.in_features):
            raise ValueError(
                f"x must be [B, H, W, C, D] with C = {self.in_types} and D = {self.in_features}, got {list(x.shape)}"
            )
        dtypes = {x.dtype, self.weight.dtype}
        if len(dtypes) > 1 and (torch.float64 in dtypes or not _autocast.is_on(x)):  # autocast leaves float64 alone
            raise TypeError(f"x must have the dtype of the weight, {self.weight.dtype}, got {x.dtype}")
        if mask is None:
            return None
        _checks.check_mask(mask, x.shape[:4], x)
        mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
        return mask.expand(-1, *x.shape[1:4])

    def extra_repr(self) -> str:
        geometry = {name: getattr(self, name) for name in ("kernel_size", "stride", "padding", self._also)}
        more = {"bias": self.bias is not None, "chunk_bytes": self.chunk_bytes}
        options = geometry | self.routing_options() | more
        sizes = f"{self.in_types}, {self.in_features}, {self.out_types}, {self.out_features}, "
        return sizes + ", ".join(f"{name}={value!r}" for name, value in options.items())


class CapsuleConv2d(CapsuleConv):
    """Convolutional capsules: every position routes the capsules in its receptive field.

    ::

        v[y, x] = capsule_linear(u, weight),   u = the kh kw C capsules of map[y sy - py + a dy, x sx - px + b dx],
                                               a = 0..kh-1, b = 0..kw-1

    Dynamic routing as in Sabour, Frosst and Hinton 2017 (Procedure 1) over the windows of Hinton, Sabour and Frosst,
    "Matrix capsules with EM routing", 2018, where all positions share the weight. With ``iterations=1`` nothing
    is routed: a convolution by the weight / J (unless told otherwise) and squash, as in Rajasegaran et al.,
    "DeepCaps", 2019.

    The capsules of a window beyond the border count as 0, and take no part where ``coupling="in"``. At most the votes
    of a few positions, and ``chunk_bytes`` of unfolded input (or one row of windows), are held at a time, forward or
    backward.

    Args:
        in_types: C, the capsules at an input position.
        in_features: D, the features of an input capsule.
        out_types: J, the capsules at an output position.
        out_features: O, the features of an output capsule.
        kernel_size, stride, padding, dilation: as in :class:`torch.nn.Conv2d`, one int or (height, width).
        iterations: R, the number of routing passes.
        bias: learn a bias ``[J, O]``, added to s in every pass.
        coupling, leaky, detach_coupling, eps, backend: as in :func:`capsroute.capsule_linear`.
        chunk_bytes: the size of the unfolded input that is made at once; making it takes up to as much again for a
            moment, in low precision up to three times. Where it takes more than one chunk, the backward routes each
            chunk a second time. It does not change the result; gradients change by rounding only.
        device, dtype: of the parameters.

    Attributes:
        weight: ``[kh, kw, C, D, J, O]``.
        bias: ``[J, O]`` or None.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    _also = "dilation"

    def __init__(
        self,
        in_types: int,
        in_features: int,
        out_types: int,
        out_features: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        iterations: int = 3,
        **options,
    ):
        super().__init__(
            in_types, in_features, out_types, out_features, kernel_size, stride, padding, iterations, **options
        )
        self.dilation = _checks.pair("dilation", dilation)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Output capsules ``[B, H', W', J, O]`` of a map ``[B, H, W, C, D]``.

        Args:
            x: the map, in the dtype of the weight; :class:`PrimaryCapsules` with ``flatten=False`` makes one.
            mask: bool, broadcast to ``[B, H, W, C]``; False takes an input capsule out.

        Raises:
            TypeError, ValueError: if an input has the wrong shape or dtype, or is smaller than the kernel.
        """
        mask = self._checked(x, mask)
        py, px = self.padding
        windows = Windows(self.kernel_size, self.stride, self.dilation, (py, py, px, px))
        if any(n + 2 * p < windows.span(d) for d, (n, p) in enumerate(zip(x.shape[1:3], self.padding, strict=True))):
            raise ValueError(
                f"x must be [B, H, W, C, D] with H and W, padded by {self.padding}, at least "
                f"{(windows.span(0), windows.span(1))}, got {list(x.shape)}"
            )
        return route_windows(x, mask, self.weight, self.bias, windows, self.chunk_bytes, self.routing_options())
