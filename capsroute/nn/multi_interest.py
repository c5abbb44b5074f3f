"""Behaviour-to-interest routing: a user's clicks to the few vectors that stand for what the user likes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast, _backends, _checks
from ..functional import capsule_linear, routing_pass, squash
from ..reference import accumulation_dtype
from .linear import WeightOwner, check_shared, first_pass_gain, for_outputs

PRIORS = ("random", "learned", "zero")


class MultiInterest(WeightOwner):
    """Route the items of a click history to interests, by agreement.

    The letters are those of :func:`capsroute.capsule_linear`: I clicks with D features each, J interests with
    O features. The defaults are MIND (Li et al., "Multi-Interest Network with Dynamic Routing for
    Recommendation at Tmall", 2019, section 3.3): one bilinear map for all pairs, and random prior logits,
    without which all interests would be the same vector. ``shared=None, prior="zero",
    detach_coupling=True`` is ComiRec-DR (Cen et al., "Controllable Multi-Interest Framework for
    Recommendation", 2020, section 3.2). Several libraries route differently: ``docs/multi_interest.md`` says
    which options give their results.

    Args:
        length: maximum history length; shorter batches use the first rows of per-position weights and logits.
        in_features: D, the features of an item.
        interests: J, the number of interests (K in the papers).
        out_features: O, the features of an interest.
        iterations: R, the number of routing passes, at least 1.
        shared: who shares a map from items to votes: ``"pairs"``, all; ``"inputs"``, all positions, each interest
            having its own; None, each position and interest has its own.
        prior: the prior logits where :meth:`forward` is given none. ``"random"``: drawn once, with the weight,
            and kept in ``state_dict``; in training also anew for each history where :meth:`forward` is given a
            generator. ``"learned"``: a parameter, random at first, with its full gradient. ``"zero"``.
        prior_std: standard deviation of the random prior logits, and of the learned ones at first.
        adaptive: give short histories fewer interests, by :func:`active_interests`; the others are 0.
        coupling: ``"out"`` shares each click among the interests, as the papers do; ``"in"`` makes each interest
            an average of the clicks, as some libraries do.
        cosine_scale: None adds h . v to the logits after each pass, as the papers do. A number replaces the logits
            by that many times the cosine between vote and interest, as EasyRec does; with ``shared="pairs"`` alone.
        squash_power: p of :func:`capsroute.squash`.
        detach_coupling: treat the coupling of the last pass as a constant in the backward, as most libraries do.
        eps, backend: as in :func:`capsroute.capsule_linear`.
        device, dtype: of the parameters.

    Attributes:
        weight: as in :class:`CapsuleLinear`: ``[O, D]`` shared by all pairs, ``[J, O, D]`` by the inputs, else
            ``[I, D, J, O]``.
        logits: the prior, ``[I, J]``: a parameter if learned, a buffer if random, None if zero.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    def __init__(
        self,
        length: int,
        in_features: int,
        interests: int,
        out_features: int,
        iterations: int = 3,
        *,
        shared: str | None = "pairs",
        prior: str = "random",
        prior_std: float = 1.0,
        adaptive: bool = False,
        coupling: str = "out",
        cosine_scale: float | None = None,
        squash_power: float = 1.0,
        detach_coupling: bool = False,
        eps: float = 1e-9,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _checks.check_options(iterations, coupling, False, detach_coupling, eps)
        _backends.check_name(backend)
        _checks.check_sizes(length=length, in_features=in_features, interests=interests, out_features=out_features)
        _checks.check_flag("adaptive", adaptive)
        prior_std = _checks.check_positive("prior_std", prior_std)
        squash_power = _checks.check_positive("squash_power", squash_power)
        _check_routing(shared, prior, detach_coupling)
        cosine_scale = _check_cosine(cosine_scale, shared)
        self.length, self.in_features, self.interests, self.out_features = length, in_features, interests, out_features
        self.iterations, self.shared, self.prior, self.prior_std = iterations, shared, prior, prior_std
        self.adaptive, self.coupling, self.cosine_scale = adaptive, coupling, cosine_scale
        self.squash_power, self.detach_coupling, self.eps, self.backend = squash_power, detach_coupling, eps, backend
        factory = {"device": device, "dtype": dtype}
        self.weight = self._empty_weight(**factory)
        logits = None if prior == "zero" else torch.empty(length, interests, **factory)
        if prior == "learned":
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        self.reset_parameters()

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.length, self.interests, self.out_features, self.in_features

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight and the prior logits anew, from a generator or, as every torch layer, the default one."""
        gain = first_pass_gain(self.length, self.interests, self.coupling)
        nn.init.normal_(self.weight, std=gain / math.sqrt(self.out_features), generator=generator)
        if self.logits is not None:
            nn.init.normal_(self.logits, std=self.prior_std, generator=generator)

    def forward(
        self,
        u: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        logits: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_coupling: bool = False,
    ) -> Tensor | Any:  # a pair with return_coupling
        """The interests of histories.

        Args:
            u: the items' features, ``[*, I, D]`` with I <= ``length``, in the dtype of the weight.
            lengths: how many of the I clicks, from the first, are real: integers ``[*]``. A length above I means that
                all I are real; ``adaptive`` then uses the full length.
            mask: instead of ``lengths``: bool, broadcast to ``[*, I]``, False at padding. What padding holds has no
                effect.
            logits: prior logits instead of the module's, broadcast to ``[*, I, J]``; ``-inf`` forbids a pair.
            generator: in training, :meth:`draw_logits` from it; in evaluation it is not used, so that the interests
                are the same every time. Not for ``torch.utils.checkpoint`` or ``torch.compile``: see
                :meth:`draw_logits`.
            return_coupling: also return the coupling of the last pass, which carries no gradient.

        Returns:
            v ``[*, J, O]``, 0 where a history is empty; with ``return_coupling`` also c ``[*, I, J]``.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
        """
        self._check_history(u)
        inputs = u.shape[-2]
        if lengths is not None:
            if mask is not None:
                raise ValueError("mask must be None where lengths is given: both say which clicks are real")
            _check_lengths(lengths, u.shape[:-2])
            _checks.check_device("lengths", lengths, u)
            mask = torch.arange(inputs, device=u.device) < lengths.unsqueeze(-1)  # [*, I]
        if logits is None:
            logits = self._prior(u, generator)
        else:
            logits = for_outputs(logits, self.interests)
            _checks.check_device("logits", logits, u)
            _checks.check_broadcast("logits", logits, (*u.shape[:-1], self.interests), "[*, I, J]")
        if self.adaptive:
            if mask is None:
                lengths = torch.full((), inputs, device=u.device)
            elif lengths is None:
                _checks.check_mask(mask, u.shape[:-1], u)
                lengths = mask.expand(u.shape[:-1]).sum(-1)
            active = active_interests(lengths, self.interests).unsqueeze(-2)  # [*, 1, J]
            logits = torch.where(active, u.new_zeros(()) if logits is None else logits, -torch.inf)
        return self._route(u, logits, mask, return_coupling)

    def draw_logits(self, u: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random prior logits for histories, those that :meth:`forward` draws in training from the same generator.

        Draw them outside and give them to :meth:`forward` as ``logits`` where it runs under
        ``torch.utils.checkpoint``, whose second run would draw others and get wrong gradients, or
        ``torch.compile``, which takes no generator.

        Args:
            u: the items' features, ``[*, I, D]``, of which the shape and device count.
            generator: None takes torch's default one.

        Returns:
            ``[*, I, J]``, in the dtype of the weight.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
        """
        self._check_history(u)
        _check_generator(generator)
        shape = (*u.shape[:-1], self.interests)
        return torch.randn(shape, generator=generator, device=u.device, dtype=self.weight.dtype) * self.prior_std

    def _check_history(self, u: Tensor) -> None:
        _checks.check_input(u)
        if u.shape[-2] > self.length or u.shape[-1] != self.in_features:
            raise ValueError(
                f"u must be [*, I, D] with I <= length = {self.length} and D = {self.in_features}, got {list(u.shape)}"
            )

    def _prior(self, u: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """The prior logits, [I, J], or [*, I, J] where they are drawn."""
        _check_generator(generator)
        if self.prior == "random" and self.training and generator is not None:
            return self.draw_logits(u, generator)
        return None if self.logits is None else self.logits[: u.shape[-2]]

    def _route(
        self, u: Tensor, logits: Tensor | None, mask: Tensor | None, return_coupling: bool
    ) -> Tensor | Any:  # a pair with return_coupling
        weight = self.logical_weight(u.shape[-2] if self.shared is None else None)
        options = {"mask": mask, "coupling": self.coupling, "backend": self.backend}
        if self.cosine_scale is None and self.squash_power == 1:
            options |= {"detach_coupling": self.detach_coupling, "eps": self.eps, "return_coupling": return_coupling}
            return capsule_linear(u, weight, self.iterations, logits=logits, **options)
        one_pass = partial(routing_pass, **options)
        before = u, weight  # what all passes but the last see; detached below, as torch.no_grad() cannot be exported
        if self.detach_coupling:
            before = u.detach(), weight.detach()
            logits = None if logits is None else logits.detach()
        query = None  # [*, J, O]
        directions = self._directions(*before, mask) if self.cosine_scale is not None and self.iterations > 1 else None
        for _ in range(self.iterations - 1):
            s = one_pass(*before, query, logits=logits)
            if self.cosine_scale is None:
                v = self._squash(s)
                query = v if query is None else query + v
            else:
                logits = self._cosine_logits(directions, s, logits)
        if self.detach_coupling and query is not None:  # the agreement h . query must not be differentiated
            c = one_pass(*before, query, logits=logits, return_coupling=True)[1]
            query, logits = None, c.to(accumulation_dtype(c.dtype)).log()
        s = one_pass(u, weight, query, logits=logits, return_coupling=return_coupling)
        return (self._squash(s[0]), s[1]) if return_coupling else self._squash(s)

    def _squash(self, s: Tensor) -> Tensor:
        return squash(s, eps=self.eps, power=self.squash_power)

    def _directions(self, u: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        """h_i / |h_i|, [*, I, O], in the accumulation dtype: squares of float16 vanish or overflow."""
        if mask is not None:
            u = u.masked_fill(~mask.unsqueeze(-1), 0)
        return _direction(F.linear(u, weight).to(accumulation_dtype(u.dtype)))

    def _cosine_logits(self, directions: Tensor, s: Tensor, logits: Tensor) -> Tensor:
        """cosine_scale * cos(h_i, s_j), [*, I, J]; a pair that was forbidden stays so."""
        with _autocast.off(s):
            cosine = directions @ _direction(s.to(directions.dtype)).transpose(-1, -2)  # [*, I, J]
        return torch.where(logits == -torch.inf, -torch.inf, self.cosine_scale * cosine)

    def extra_repr(self) -> str:
        names = "length", "in_features", "interests", "out_features", "iterations", "shared", "prior", "prior_std"
        names += "adaptive", "coupling", "cosine_scale", "squash_power", "detach_coupling", "eps", "backend"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def active_interests(lengths: Tensor, interests: int) -> Tensor:
    """Which interests a history of some length has: the first max(1, min(J, floor(log2 length))).

    Li et al. 2019, section 3.3.3; the logarithm is rounded down, as in most implementations: length 8 has 3 interests.

    Args:
        lengths: integers ``[*]``, the number of clicks.
        interests: J, the largest number of interests.

    Returns:
        bool ``[*, J]``.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """
    _check_lengths(lengths, lengths.shape if isinstance(lengths, Tensor) else ())
    _checks.check_sizes(interests=interests)
    # floor(log2 n) > j  <=>  n >= 2^(j+1): exact, where a logarithm is not. No history has 2^62 clicks.
    least = [-(2**63)] + [2 ** min(j + 1, 62) for j in range(1, interests)]
    return lengths.unsqueeze(-1).long() >= torch.tensor(least, device=lengths.device)


def _direction(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, nearly 0 where |x| < 1e-12; F.normalize has no second derivative at 0."""
    n2 = x.square().sum(-1, keepdim=True)
    return x * n2.masked_fill(n2 < 1e-24, 1).rsqrt()


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and torch.compiler.is_exporting():
        raise ValueError("generator must be None in an exported program, which would keep it: give logits")


def _check_lengths(lengths: object, lead: torch.Size) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor of integers [*], got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"lengths must be int64, int32, int16, int8 or uint8 [*], got {lengths.dtype}")
    if lengths.shape != lead:
        raise ValueError(f"lengths must be [*] = {list(lead)}, got {list(lengths.shape)}")


def _check_routing(shared: str | None, prior: str, detach_coupling: bool) -> None:
    check_shared(shared)
    if prior not in PRIORS:
        raise ValueError(f'prior must be "random", "learned" or "zero", got {prior!r}')
    if prior == "zero" and shared == "pairs":
        raise ValueError('prior must be "random" or "learned" with shared="pairs": else all interests are the same')
    if prior == "learned" and detach_coupling:
        raise ValueError(
            'detach_coupling must be False with prior="learned": the prior logits reach the output only through the '
            "coupling, so they would never train"
        )


def _check_cosine(cosine_scale: float | None, shared: str | None) -> float | None:
    if cosine_scale is None:
        return None
    if shared != "pairs":
        raise ValueError(f'shared must be "pairs" with cosine_scale, got {shared!r}: it needs the length of each vote')
    return _checks.check_positive("cosine_scale", cosine_scale)
