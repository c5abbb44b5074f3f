"""torch-rechub's own capsule layer (0.9.0), which its MIND and ComiRec-DR use, as a baseline.

It computes what ``coupling="in"`` and ``detach_coupling=True`` mean here, where no history has padding.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

from ..reference import out_capsules
from .measure import replaced


def no_rechub() -> str:
    """Why torch-rechub cannot run here, or an empty string."""
    return "" if importlib.util.find_spec("torch_rechub") else "needs torch-rechub"


@functools.cache
def _layer(outputs: int, weight: torch.Size) -> nn.Module:
    """One without parameters of its own; they are given with every call."""
    from torch_rechub.basic.layers import CapsuleNetwork

    inputs, features = weight[0] if len(weight) == 4 else None, weight[-1]
    layer = CapsuleNetwork(features, inputs, bilinear_type=len(weight) - 2, interest_num=outputs)
    return layer.to("meta")


def rechub(u: Tensor, weight: Tensor, logits: Tensor | None) -> Tensor:
    """v [B, J, O] from u [B, I, D], with D = O, and a weight of any form; three passes; logits [I, J] with [O, D].

    The layer draws random logits for a weight [O, D]: it is given those of the case, and loses no time by drawing.
    """
    batch, inputs, _ = u.shape
    layer = _layer(out_capsules(u, weight, None, logits), weight.shape)
    layer.seq_len = inputs
    if weight.dim() == 4:
        parameters = {"w": weight.flatten(1, 2).unsqueeze(0)}  # a copy, of a hundredth of what the layer then makes
    else:
        parameters = {"linear.weight": weight.flatten(0, -2)}
    mask = torch.ones(batch, inputs, dtype=torch.int64, device=u.device)
    drawn = None if logits is None else logits.t().expand(batch, -1, -1)
    with replaced(torch, "randn", lambda *_, **__: drawn):
        return torch.func.functional_call(layer, parameters, (u, mask))
