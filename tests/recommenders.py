"""Multi-interest routing as each library computes it, from the votes h [B, I, J, O], written anew from its equations.

Sources, as read in November 2026: THUDM/ComiRec src/model.py, torch-rechub 0.9.0 basic/layers.py, DeepMatch
deepmatch/layers/core.py, EasyRec easy_rec/python/layers/capsule_layer.py, TorchEasyRec tzrec/modules/capsule.py.
`real` [B, I] is True at clicks, False at padding.
"""

import math

import torch
from torch import Tensor


def squash(s: Tensor, eps: float) -> Tensor:
    n2 = s.square().sum(-1, keepdim=True)
    return s * (n2 / (1 + n2) / torch.sqrt(n2 + eps))


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()


def weighted_sum(c: Tensor, h: Tensor) -> Tensor:
    return (c.unsqueeze(-1) * h).sum(1)


def agreement(h: Tensor, v: Tensor) -> Tensor:
    return (h * v.unsqueeze(1)).sum(-1)


def comirec(h: Tensor, real: Tensor, b: Tensor) -> Tensor:
    """The ComiRec authors: coupling over the interests; all but the last weighted sum is a constant."""
    for k in range(3):
        c = torch.softmax(b, 2) * real.unsqueeze(-1)
        v = squash(weighted_sum(c.detach(), h if k == 2 else h.detach()), 1e-9)
        b = b + agreement(h, v).detach()
    return v


def torch_rechub(h: Tensor, real: Tensor, b: Tensor) -> Tensor:
    """As ComiRec, but over the clicks, and padding takes its share before it is left out of the sum."""
    for k in range(3):
        c = torch.softmax(b, 1) * real.unsqueeze(-1)
        v = squash(weighted_sum(c.detach(), h if k == 2 else h.detach()), 1e-9)
        b = b + agreement(h, v).detach()
    return v


def deepmatch(h: Tensor, real: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Coupling over the real clicks; the logits [I, J] are of the layer, not of a user: every call goes on with them.

    Returns v and the logits after the call.
    """
    for _ in range(3):
        c = torch.softmax(b.expand(h.shape[:3]).masked_fill(~real.unsqueeze(-1), -(2.0**32) + 1), 1)
        v = squash(weighted_sum(c, h), 1e-8)
        b = b + agreement(h, v).sum(0).detach()
    return v, b


def easyrec(h: Tensor, real: Tensor, b: Tensor, active: Tensor, scale: float = 20.0, power: float = 1.0) -> Tensor:
    """Coupling over the interests; logits replaced by scaled cosines; squash, with a power, only at the end."""
    limit = torch.where(active, 1e32, -1e32).unsqueeze(1)  # [B, 1, J]
    for k in range(3):
        c = torch.softmax(torch.minimum(b, limit), 2) * real.unsqueeze(-1)
        s = weighted_sum(c, h if k == 2 else h.detach())
        b = scale * agreement(unit(h.detach()), unit(s.detach()))
    n2 = s.square().sum(-1, keepdim=True).clamp_min(1e-8)
    return (n2 / (1 + n2)) ** power / n2.sqrt() * s * active.unsqueeze(-1)


def torch_easyrec(h: Tensor, real: Tensor, b: Tensor, active: Tensor, scale: float = 20.0) -> Tensor:
    """Unit votes and unit interests; what is added to is the coupling, not the logits; nothing is a constant."""
    h = unit(h)
    limit = torch.where(active, 1e32, -1e32).unsqueeze(1)  # [B, 1, J]
    for _ in range(3):
        c = torch.softmax(torch.minimum(b, limit), 2) * real.unsqueeze(-1)
        v = unit(weighted_sum(c, h))
        b = c + scale * agreement(h, v)
    return v * active.unsqueeze(-1)


def interests(length: int, most: int) -> int:
    """Li et al. 2019, 3.3.3, rounded down."""
    return max(1, min(most, math.floor(math.log2(length)))) if length > 0 else 1
