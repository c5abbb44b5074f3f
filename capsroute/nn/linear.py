"""The capsule layer: capsule_linear with a weight that it owns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from .. import _backends, _checks
from ..functional import capsule_linear
from .layout import from_layout

ORDERS = {None: "IDJO", "inputs": "JOD", "pairs": "OD"}  # in the kernels' order, by who shares a matrix


class WeightOwner(nn.Module):
    """A layer with a weight of :func:`capsroute.capsule_linear` in the order that the kernels read in place."""

    weight: nn.Parameter
    shared: str | None

    def _sizes(self) -> tuple[int | None, int, int, int]:
        """I, J, O, D."""
        raise NotImplementedError

    def _weight_shape(self) -> tuple[int, ...]:
        sizes = dict(zip("IJOD", self._sizes(), strict=True))
        return tuple(sizes[letter] for letter in ORDERS[self.shared])

    def _empty_weight(self, **factory) -> nn.Parameter:
        return nn.Parameter(torch.empty(self._weight_shape(), **factory))

    def _apply(self, fn, recurse: bool = True):
        def in_order(x: Tensor) -> Tensor:
            """`.to(memory_format=torch.channels_last)` takes a weight of four dimensions for a convolution's."""
            x = fn(x)
            return x if is_lazy(x) else x.contiguous()

        return super()._apply(in_order, recurse)

    def logical_weight(self, inputs: int | None = None) -> Tensor:
        """The weight as :func:`capsroute.capsule_linear` takes it, a view: ``[I, J, O, D]``, or shared.

        Args:
            inputs: of a weight of each pair, that of so many input capsules alone, the first ones.
        """
        if self.shared:
            return self.weight
        weight = self.weight
        # A slice costs the backward a copy as large as the whole weight, even a slice of everything: it is taken where
        # there are fewer inputs alone. But a graph for any number of inputs must not ask whether there are fewer.
        in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if inputs is not None and (in_graph or inputs < len(weight)):
            weight = weight[:inputs]
        return weight.permute(0, 2, 3, 1)

    def set_weight(self, weight: Tensor, layout: str | None = None) -> None:
        """Copy a weight from another implementation into this layer.

        Args:
            weight: the tensor; any dtype and device.
            layout: its dimensions, as in :func:`capsroute.nn.from_layout`, for instance ``"[J, I, D, O]"``.
                None: as :func:`capsroute.capsule_linear` takes it.

        Raises:
            TypeError, ValueError: if it is not a tensor, or the layout or the shape does not fit.
            RuntimeError: if a parametrization makes this layer's weight.
        """
        if not isinstance(self.weight, nn.Parameter):
            raise RuntimeError("weight must be a parameter, but a parametrization makes it anew: set it before that")
        if layout is not None:
            sizes = zip("IJOD", self._sizes(), strict=True)
            weight = from_layout(weight, layout, **{letter: n for letter, n in sizes if letter in str(layout) and n})
        own = self.logical_weight()
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
        if weight.shape != own.shape:
            raise ValueError(f"weight must be {list(own.shape)}, got {list(weight.shape)}")
        with torch.no_grad():
            own.copy_(weight)


class CapsuleLinear(WeightOwner):
    """A layer of capsules with routing by agreement: :func:`capsroute.capsule_linear` as a module.

    Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", 2017, Procedure 1.

    Args:
        in_capsules: I, the number of input capsules. With a shared weight, any number of capsules can be routed; this
            value only scales the initialisation and may be None.
        in_features: D, the features of an input capsule.
        out_capsules: J, the number of output capsules.
        out_features: O, the features of an output capsule.
        iterations: R, the number of routing passes, at least 1.
        bias: learn a bias ``[J, O]``, added to s in every pass.
        shared: who shares a matrix: None, each pair has its own; ``"inputs"``, all input capsules; ``"pairs"``,
            all pairs (MIND: Li et al. 2019): then only the logits that you give, or a trained bias, distinguish
            the output capsules.
        coupling, leaky, detach_coupling, eps, backend: as in :func:`capsroute.capsule_linear`.
        device, dtype: of the parameters, as in every torch layer.

    Attributes:
        weight: ``[I, D, J, O]``, contiguous: the memory order that the kernels read in place. Shared by the
            inputs ``[J, O, D]``, by all pairs ``[O, D]``.
        bias: ``[J, O]`` or None.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    def __init__(
        self,
        in_capsules: int | None,
        in_features: int,
        out_capsules: int,
        out_features: int,
        iterations: int = 3,
        *,
        bias: bool = False,
        shared: str | None = None,
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
        _backends.check_name(backend)
        check_shared(shared)
        _checks.check_flag("bias", bias)
        if in_capsules is not None or shared is None:
            _checks.check_sizes(in_capsules=in_capsules)
        _checks.check_sizes(in_features=in_features, out_capsules=out_capsules, out_features=out_features)
        self.in_capsules, self.in_features = in_capsules, in_features
        self.out_capsules, self.out_features = out_capsules, out_features
        self.iterations, self.shared, self.coupling, self.leaky = iterations, shared, coupling, leaky
        self.detach_coupling, self.eps, self.backend = detach_coupling, eps, backend
        factory = {"device": device, "dtype": dtype}
        self.weight = self._empty_weight(**factory)
        self.bias = nn.Parameter(torch.empty(out_capsules, out_features, **factory)) if bias else None
        self.reset_parameters()

    def _sizes(self) -> tuple[int | None, int, int, int]:
        return self.in_capsules, self.out_capsules, self.out_features, self.in_features

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to 0."""
        gain = first_pass_gain(self.in_capsules, self.out_capsules + self.leaky, self.coupling)
        nn.init.normal_(self.weight, std=gain / math.sqrt(self.out_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, u: Tensor, *, logits: Tensor | None = None, mask: Tensor | None = None, return_coupling: bool = False
    ) -> Tensor | Any:  # a pair with return_coupling
        """Route input capsules to output capsules.

        Args:
            u: ``[*, I, D]`` in the dtype of the weight.
            logits: prior logits, broadcast to ``[*, I, J]``.
            mask: bool, broadcast to ``[*, I]``; False takes an input capsule out.
            return_coupling: also return the coupling of the last pass, which carries no gradient.

        Returns:
            v ``[*, J, O]``; with ``return_coupling`` also c ``[*, I, J]``.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
            RuntimeError: if a named backend cannot serve the call; the message says why.
        """
        _checks.check_input(u)
        weight = self.logical_weight()
        if u.size(-1) != weight.size(-1) or (self.shared is None and u.size(-2) != weight.size(0)):
            known = f"I = {weight.size(0)} and D" if self.shared is None else "D"
            raise ValueError(f"u must be [*, I, D] with {known} = {weight.size(-1)}, got {list(u.shape)}")
        if self.shared == "pairs" and logits is not None:
            logits = for_outputs(logits, self.out_capsules)
        return capsule_linear(
            u,
            weight,
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
            f"bias={self.bias is not None}, shared={self.shared!r}, coupling={self.coupling!r}, leaky={self.leaky}, "
            f"detach_coupling={self.detach_coupling}, eps={self.eps}, backend={self.backend!r}"
        )


class LazyCapsuleLinear(LazyModuleMixin, CapsuleLinear):
    """A :class:`CapsuleLinear` that learns ``in_capsules`` and ``in_features`` from its first input.

    As with every lazy module of torch, run it once before you make the optimizer.

    Args:
        out_capsules, out_features, iterations: as in :class:`CapsuleLinear`.
        **options: its other arguments.
    """

    cls_to_become = CapsuleLinear
    weight: nn.UninitializedParameter

    def __init__(self, out_capsules: int, out_features: int, iterations: int = 3, **options):
        super().__init__(1, 1, out_capsules, out_features, iterations, **options)
        self.in_capsules = self.in_features = 0
        if self.bias is not None:  # if a weight is loaded without a bias, reset_parameters never runs
            nn.init.zeros_(self.bias)

    def _empty_weight(self, **factory) -> nn.Parameter:
        return nn.UninitializedParameter(**factory)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, u: Tensor, **_) -> None:
        """Make the weight for inputs like ``u`` and draw it, unless it was loaded."""
        _checks.check_input(u)
        self.in_capsules, self.in_features = u.shape[-2:]
        if not self.has_uninitialized_params():  # it was loaded, and knows them
            self.in_features = self.logical_weight().shape[-1]
            if self.shared is None:
                self.in_capsules = len(self.weight)
        else:
            with torch.no_grad():
                self.weight.materialize(self._weight_shape())
                self.reset_parameters()


def check_shared(shared: str | None) -> None:
    if shared not in tuple(ORDERS):  # what cannot be hashed is refused by name too
        raise ValueError(f'shared must be None, "inputs" or "pairs", got {shared!r}')


def for_outputs(logits: Tensor, outputs: int) -> Tensor:
    """Prior logits [*, I, J] from what broadcasts to that: a weight [O, D] takes J from them."""
    _checks.check_tensor("logits", logits, "[*, I, J]")
    if logits.dim() and logits.shape[-1] not in (1, outputs):
        raise ValueError(f"logits must broadcast to [*, I, J] with J = {outputs}, got {list(logits.shape)}")
    return logits.expand(*logits.shape[:-1], outputs)


def even_pass_gain(length: float, inputs: int, outputs: int, coupling: str) -> float:
    """How long votes of u must be in units of |u|, for |s| of about `length` |u| where nothing is routed yet.

    All pairs have the same c then, and votes of random direction add up as sqrt(I). A leak counts as an output.
    """
    c = 1 / (outputs if coupling == "out" else inputs)
    return length / (c * math.sqrt(inputs))


def first_pass_gain(inputs: int | None, outputs: int, coupling: str) -> float:
    """How long votes of u should be at first, in units of |u|: so that |s| is about |u| in the first pass.

    A smaller s vanishes in squash, n2 / (1 + n2); a larger one saturates it. Votes longer than u would let the first
    agreement decide the softmax at once, so they are not made longer.
    """
    return min(even_pass_gain(1, inputs, outputs, coupling), 1.0) if inputs else 1.0  # I is not known, or 0
