"""The op set `capsroute_triton`: importing this module imports Triton, defines the ops and implements them."""

from __future__ import annotations

import torch

from .._ops import define
from .._vmap import stack
from . import NAMESPACE, backward, forward
from .problem import Problem, run


def _route(u, weight, bias, logits, mask, iterations, over_inputs, leaky, eps, save, room, return_coupling):
    problem = Problem.of(u, weight, bias, logits, mask, over_inputs, leaky)
    v, *saved, coupling = _run(u, forward.route(problem, iterations, eps, save, return_coupling))
    return v, *saved, problem.empty(room), coupling


def _route_backward(
    grad_v, s, norm, _votes, u, weight, bias, logits, mask, iterations, over_inputs, leaky, eps, per_sample, *needs
):
    def gradients(grad_v, s, norm, u, logits, mask):
        problem = Problem.of(u, weight, bias, logits, mask, over_inputs, leaky)
        wanted = _wanted(needs, u, weight, bias, logits)
        return _in_order_of(weight, _run(u, backward.route_backward(problem, grad_v, s, norm, iterations, eps, wanted)))

    tensors = grad_v, s, norm, u, logits, mask
    return _for_each_sample(gradients, *tensors) if per_sample else gradients(*tensors)


def _routing_pass(u, weight, query, logits, mask, over_inputs, leaky, save, return_coupling):
    problem = Problem.of(u, weight, query, logits, mask, over_inputs, leaky)
    return _run(u, forward.routing_pass(problem, query, save, return_coupling))


def _routing_pass_backward(grad_s, s, norm, u, weight, query, logits, mask, over_inputs, leaky, per_sample, *needs):
    def gradients(grad_s, s, norm, u, logits, mask, query):
        problem = Problem.of(u, weight, query, logits, mask, over_inputs, leaky)
        wanted = _wanted(needs, u, weight, query, logits)
        return _in_order_of(weight, _run(u, backward.routing_pass_backward(problem, grad_s, s, norm, query, wanted)))

    tensors = grad_s, s, norm, u, logits, mask, query
    return _for_each_sample(gradients, *tensors) if per_sample else gradients(*tensors)


def _for_each_sample(gradients, grad, s, norm, *others):
    """The gradients of batches of one, those of the weight and the bias side by side."""
    size = len(grad)

    def of(b, x, dim=0):
        shared = x is None or x.dim() == 1 or x.shape[dim] != size
        return x if shared else x.narrow(dim, b, min(size, 1)).contiguous()

    samples = [
        gradients(of(b, grad), of(b, s, -3), of(b, norm, -2), *(of(b, x) for x in others)) for b in range(max(size, 1))
    ]
    beside = False, True, samples[0][2].dim() == 2, False  # a weight's and a bias's, not a query's
    return tuple(
        x[0] if x[0].dim() == 1 else stack(x)[:size] if is_beside else torch.cat(x)
        for x, is_beside in zip(zip(*samples, strict=True), beside, strict=True)
    )


def _wanted(needs, *tensors) -> backward.Needs:
    return backward.Needs(*(need and x is not None for need, x in zip(needs, tensors, strict=True)))


def _in_order_of(weight, grads):
    """The weight's gradient from [I, D, J, O] to [I, J, O, D]: a view, or a copy if the weight has other strides."""
    du, dweight, *others = grads
    if dweight.dim() == 4:
        dweight = dweight.permute(0, 2, 3, 1)
        if dweight.stride() != weight.stride():
            dweight = torch.empty_like(weight).copy_(dweight)
    return du, dweight, *others


def _run(u, planned):
    steps, results = planned
    with torch.accelerator.device_index(u.device.index):
        run(steps)
    return results


define(NAMESPACE)
for _name, _implementation in (
    ("route", _route),
    ("route_backward", _route_backward),
    ("routing_pass", _routing_pass),
    ("routing_pass_backward", _routing_pass_backward),
):
    for _device in ("cuda", "cpu"):  # ROCm's device is called cuda too; cpu is for the interpreter
        torch.library.impl(f"{NAMESPACE}::{_name}", _device, _implementation)
