"""The layers that accelerate knows: the equations and parameter names of their repositories, with our operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _autocast
from ..functional import capsule_linear, routing_pass, squash
from ..nn.layout import from_layout
from ..reference import accumulation_dtype
from .recipes import Recipe

PROBE_BATCH = 3


def _probe_like(parameter: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, device=parameter.device, dtype=parameter.dtype)


# torch-rechub 0.9.0, for MIND and ComiRec-DR.
#
#     b_ij = N(0, 1) (bilinear_type 0) or 0, for every position i of the sequence
#     repeat 3 times
#         c_ij = mask_i softmax over i of b_ij        # the mask comes after the softmax: padding keeps its share
#         v_j  = squash(sum over i of c_ij h_ij)
#         b_ij = b_ij + h_ij . v_j                    # h is a constant here, and c with it
#
# so that s_j = (sum over i of mask_i c_ij) * (one pass over unmasked i alone, with logits log c).


def _rechub_weight(self: nn.Module) -> Tensor:
    if self.bilinear_type == 0:
        return self.linear.weight  # [O, D]
    if self.bilinear_type == 1:
        return from_layout(self.linear.weight, "[J*O, D]", J=self.interest_num)
    return from_layout(self.w, "[1, I, J*O, D]", J=self.interest_num)


def _rechub_forward(self: nn.Module, item_eb: Tensor, mask: Tensor) -> Tensor:
    weight = _rechub_weight(self)
    batch, inputs, _ = item_eb.shape
    shape = (batch, self.interest_num, inputs)
    logits = (torch.randn if self.bilinear_type == 0 else torch.zeros)(shape, device=item_eb.device).transpose(1, 2)
    logits, mask = logits.to(item_eb.dtype), mask.bool()
    if self.routing_times < 3:  # then no pass is differentiated at all
        item_eb, weight = item_eb.detach(), weight.detach()
    passes = min(self.routing_times, 3)  # more passes would repeat the third

    def coupling(query: Tensor | None) -> Tensor:  # [B, I, J], padding included
        if query is None:
            return logits.softmax(1)
        return routing_pass(item_eb, weight, query, logits=logits, coupling="in", return_coupling=True)[1]

    def outputs(c: Tensor) -> Tensor:
        share = (c * mask.unsqueeze(-1)).sum(1).unsqueeze(-1)  # [B, J, 1]
        logits = c.to(accumulation_dtype(c.dtype)).log()
        return squash(share * routing_pass(item_eb, weight, None, logits=logits, mask=mask, coupling="in"))

    query = None
    with torch.no_grad():
        for _ in range(passes - 1):
            v = outputs(coupling(query))
            query = v if query is None else query + v
        c = coupling(query)
    v = outputs(c)
    return self.relu(v) if self.relu_layer else v


def _rechub_probe(self: nn.Module) -> tuple[Tensor, Tensor]:
    parameter = next(self.parameters())
    mask = torch.rand(PROBE_BATCH, self.seq_len, device=parameter.device) < 0.7
    return _probe_like(parameter, PROBE_BATCH, self.seq_len, self.embedding_dim), mask.long()


def _rechub_refuses(self: nn.Module) -> str | None:
    if not self.stop_grad:
        return "stop_grad is False, and the share that padding keeps has no gradient here"
    if self.bilinear_type < 2 and not _is_a_matrix(self.linear):
        return "its linear is not, or not only, a product with a weight: it has a bias or hooks, or another forward"
    return None if self.routing_times >= 1 else f"routing_times is {self.routing_times}"


def _is_a_matrix(linear: nn.Module) -> bool:
    hooks = *linear._forward_pre_hooks, *linear._forward_hooks, *linear._backward_pre_hooks, *linear._backward_hooks
    own = type(linear).forward is not nn.Linear.forward or "forward" in vars(linear)
    return isinstance(linear, nn.Linear) and linear.bias is None and not own and not hooks


RECHUB = Recipe("torch_rechub.basic.layers.CapsuleNetwork", _rechub_forward, _rechub_probe, _rechub_refuses, True)


def _probe_by(logical_weight: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], tuple[Tensor]]:
    """Of layers that take u [B, I, D] alone, with a weight [I, J, O, D]."""

    def probe(self: nn.Module) -> tuple[Tensor]:
        weight = logical_weight(self)
        return (_probe_like(weight, PROBE_BATCH, weight.shape[0], weight.shape[-1]),)

    return probe


def _serves_any(weight: Tensor) -> str | None:
    """Why a weight [I, J, O, D] is refused, or None."""
    return "its weight has one input capsule, and may serve any number of them" if weight.shape[0] == 1 else None


def _as_original(v: Tensor) -> Tensor:
    """v in the dtype of the originals under autocast, which is that of their logits, torch.zeros."""
    return v.to(torch.promote_types(v.dtype, torch.get_default_dtype())) if _autocast.is_on(v) else v


# gram-ai/capsule-networks and its many copies: route_weights [J, I, D, O], the softmax over i, outputs [J, B, 1, 1, O].


def _gram_weight(self: nn.Module) -> Tensor:
    return from_layout(self.route_weights, "[J, I, D, O]")


def _gram_forward(self: nn.Module, x: Tensor) -> Tensor:
    prior = getattr(self, "route_logits", None)  # [J, 1, I, 1, 1] in later versions
    logits = None if prior is None else prior.flatten(1).T
    v = capsule_linear(x, _gram_weight(self), self.num_iterations, logits=logits, coupling="in")
    return _as_original(v).transpose(0, 1)[:, :, None, None]


def _gram_refuses(self: nn.Module) -> str | None:
    if not hasattr(self, "route_weights"):
        return "it has no route_weights: primary capsules, or a layer that is not gram-ai's"
    return _serves_any(_gram_weight(self))


GRAM = Recipe("CapsuleLayer", _gram_forward, _probe_by(_gram_weight), _gram_refuses, True)


def _detached(layer: str, weight: str, layout: str, iterations: str) -> Recipe:
    """The softmax over j, votes detached in all passes but the last; the layer's names of its weight and passes."""

    def logical_weight(self: nn.Module) -> Tensor:
        return from_layout(getattr(self, weight), layout)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return _as_original(capsule_linear(x, logical_weight(self), getattr(self, iterations), detach_coupling=True))

    def refuses(self: nn.Module) -> str | None:
        return _serves_any(logical_weight(self))

    return Recipe(layer, forward, _probe_by(logical_weight), refuses, True)


# XifengGuo/CapsNet-Pytorch and danielhavir/capsule-network
GUO = _detached("DenseCapsule", "weight", "[J, I, O, D]", "routings")
HAVIR = _detached("RoutingCapsules", "W", "[1, J, I, O, D]", "num_routing")

RECIPES = (RECHUB, GRAM, GUO, HAVIR)
