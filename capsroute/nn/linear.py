"""The capsule layer: capsule_linear with a weight that it owns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks
from ..functional import capsule_linear
from ._checks import check_sizes


class CapsuleLinear(nn.Module):
    """A layer of capsules with routing by agreement: :func:`capsroute.capsule_linear` as a module.

    Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", 2017, Procedure 1.

    Args:
        in_capsules: I, the number of input capsules.
        in_features: D, the features of an input capsule.
        out_capsules: J, the number of output capsules.
        out_features: O, the features of an output capsule.
        iterations: R, the number of routing passes, at least 1.
        bias: learn a bias ``[J, O]``, added to s in every pass.
        coupling, leaky, detach_coupling, eps, backend: as in :func:`capsroute.capsule_linear`.
        device, dtype: of the parameters, as in every torch layer.

    Attributes:
        weight: ``[I, D, J, O]``, contiguous: the memory order that the kernels read in place.
        bias: ``[J, O]`` or None.

    Raises:
        TypeError, ValueError: for a wrong argument, by its name.
    """

    def __init__(
        self,
        in_capsules: int,
        in_features: int,
        out_capsules: int,
        out_features: int,
        iterations: int = 3,
        *,
        bias: bool = False,
        coupling: str = "out",
        leaky: bool = False,
        detach_coupling: bool = False,
        eps: float = 1e-9,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _checks.check_options(iterations, coupling, leaky, detach_coupling, eps)
        check_sizes(
            in_capsules=in_capsules, in_features=in_features, out_capsules=out_capsules, out_features=out_features
        )
        self.in_capsules, self.in_features = in_capsules, in_features
        self.out_capsules, self.out_features = out_capsules, out_features
        self.iterations, self.coupling, self.leaky = iterations, coupling, leaky
        self.detach_coupling, self.eps, self.backend = detach_coupling, eps, backend
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(in_capsules, in_features, out_capsules, out_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_capsules, out_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to 0."""
        # The first pass couples all pairs with the same c, and votes of random direction add up as
        # sqrt(I): |s| is about |u| for votes 1 / (c sqrt(I)) as long as u. A smaller s vanishes in
        # squash, n2 / (1 + n2); a larger one saturates it. Votes longer than u would let the first
        # agreement decide the softmax at once, so they are not made longer.
        c = 1 / (self.out_capsules if self.coupling == "out" else self.in_capsules)
        gain = min(1 / (c * math.sqrt(self.in_capsules)), 1.0)
        nn.init.normal_(self.weight, std=gain / math.sqrt(self.out_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, u: Tensor, *, logits: Tensor | None = None, mask: Tensor | None = None, return_coupling: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Route input capsules to output capsules.

        Args:
            u: ``[*, I, D]`` in the dtype of the weight.
            logits: prior logits, broadcast to ``[*, I, J]``.
            mask: bool, broadcast to ``[*, I]``; False takes an input capsule out.
            return_coupling: also return the coupling of the last pass, which carries no gradient.

        Returns:
            v ``[*, J, O]``; with ``return_coupling`` also c ``[*, I, J]``.
        """
        return capsule_linear(
            u,
            self.weight.permute(0, 2, 3, 1),  # [I, J, O, D]
            self.iterations,
            bias=self.bias,
            logits=logits,
            mask=mask,
            coupling=self.coupling,
            leaky=self.leaky,
            detach_coupling=self.detach_coupling,
            eps=self.eps,
            return_coupling=return_coupling,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"in_capsules={self.in_capsules}, in_features={self.in_features}, "
            f"out_capsules={self.out_capsules}, out_features={self.out_features}, iterations={self.iterations}, "
            f"bias={self.bias is not None}, coupling={self.coupling!r}, leaky={self.leaky}, "
            f"detach_coupling={self.detach_coupling}, eps={self.eps}, backend={self.backend!r}"
        )
