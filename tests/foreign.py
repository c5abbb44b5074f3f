"""A foreign layer for the tests of accelerate, and all that a layer does on one input."""

from __future__ import annotations

import torch
from torch import nn
from torch_rechub.basic.layers import CapsuleNetwork


def rechub(kind: int, **options) -> CapsuleNetwork:
    layer = CapsuleNetwork(8, 9, bilinear_type=kind, interest_num=3, **options)
    for parameter in layer.parameters():  # torch-rechub leaves w uninitialised
        nn.init.normal_(parameter, std=0.5)
    return layer


def results(layer: nn.Module, *inputs: torch.Tensor) -> dict:
    """Output, gradients and the generator's state after it, for the generator's state 5."""
    torch.manual_seed(5)
    leaf = inputs[0].clone().requires_grad_()
    out = layer(leaf, *inputs[1:])
    state = torch.get_rng_state()
    wanted = {"input": leaf, **dict(layer.named_parameters())}
    grads = [None] * len(wanted)
    if out.requires_grad:
        grads = torch.autograd.grad(out, list(wanted.values()), torch.randn(out.shape), allow_unused=True)
    return {"out": out.detach(), "generator": state, **dict(zip(wanted, grads, strict=True))}


MASKS = {
    "some": torch.tensor([[1] * 4 + [0] * 5, [1] * 9, [0, 1, 0, 1, 1, 0, 0, 1, 0]]),
    "none left": torch.tensor([[0] * 9, [1] + [0] * 8, [0] * 9]),
    "all": torch.ones(3, 9, dtype=torch.long),
}
