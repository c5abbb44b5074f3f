"""Gradients of the fused operator: an autograd Function over the private ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autocast, reference
from ._ops import ops


def route(u, weight, bias, logits, mask, options, return_coupling) -> tuple[Tensor, Tensor]:
    """v [B, J, O] and, if asked for, the coupling [B, I, J], by the kernels of the tensors' device."""
    tensors = (u, weight, bias, logits)
    if torch.compiler.is_compiling():
        # dynamo believes that what torch.func differentiates needs no gradient; of a view of it, it knows better
        tensors = tuple(None if x is None else x.view_as(x) for x in tensors)
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    # Forward-mode tangents would be dropped silently by the raw op; the Function refuses them.
    if wants_grad or forward_ad._current_level >= 0:
        v, _, c = _Route.apply(*tensors, mask, options, return_coupling)
    else:  # Function.apply alone costs 17 to 28 us
        v, _, c = ops.route(*tensors, mask, options.iterations, options.leaky, options.eps, False, return_coupling)
    return v, c


class _Route(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u, weight, bias, logits, mask, options, return_coupling):
        return ops.route(
            u, weight, bias, logits, mask, options.iterations, options.leaky, options.eps, True, return_coupling
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, options, _ = inputs
        _, s, c = output
        ctx.mark_non_differentiable(s, c)
        ctx.save_for_backward(*tensors, s)
        ctx.options = options

    @staticmethod
    def backward(ctx, grad_v, *_):
        *tensors, mask, s = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        needs[3] = needs[3] and not ctx.options.detach_coupling
        grads = _RouteBackward.apply(grad_v, s, *tensors, mask, ctx.options, tuple(needs))
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None)


class _RouteBackward(torch.autograd.Function):
    """The backward as a function of its own, so that it can be differentiated once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_v, s, u, weight, bias, logits, mask, options, needs):
        iterations, _, leaky, detach_coupling, eps = options
        du, dweight, dbias, dlogits = ops.route_backward(
            grad_v, s, u, weight, bias, logits, mask, iterations, leaky, eps, detach_coupling, *needs
        )
        if dweight.dim() == 4:  # from the kernels' memory order [I, D, J, O]
            dweight = dweight.permute(0, 2, 3, 1)
        return du, dweight, dbias, dlogits

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_v, _, *tensors, options, needs = inputs
        ctx.save_for_backward(grad_v, *tensors)
        ctx.options, ctx.needs = options, needs

    @staticmethod
    def backward(ctx, *cotangents):
        """Second derivatives are rare: differentiate the reference twice."""
        grad_v, *tensors, mask = ctx.saved_tensors
        given = [k for k, x in enumerate(tensors) if x is not None]
        needed = [k for k in given if ctx.needs[k]]

        def forward(*values):
            full = [None] * len(tensors)
            for k, value in zip(given, values, strict=True):
                full[k] = value
            return reference.routing(*full, mask, ctx.options)[0]

        def backward(grad_v, *values):
            grads = dict(zip(given, torch.func.vjp(forward, *values)[1](grad_v), strict=True))
            return tuple(grads[k] for k in needed)

        with _autocast.off(grad_v):
            _, pullback = torch.func.vjp(backward, grad_v, *(tensors[k] for k in given))
            second = pullback(tuple(cotangents[k] for k in needed))
        result = [None] * len(tensors)
        for k, grad in zip(given, second[1:], strict=True):
            result[k] = grad
        return second[0], None, *result, None, None, None
