"""Derivatives of the fused operators, and the way from eager code to their ops.

Each op of a set, which _ops.py names by its namespace, has an autograd kernel. So it has derivatives wherever it is
called: below torch.func, in a graph of torch.compile, in a program of torch.export.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad

from . import _autocast, reference


def route(namespace, u, weight, bias, logits, mask, options, return_coupling) -> tuple[Tensor, Tensor]:
    """v [B, J, O] and, if asked for, the coupling [B, I, J]."""
    tensors = u, weight, bias, logits, mask
    save, room = 0, 0
    if _may_be_differentiated(tensors):
        save = 1 if options.detach_coupling else options.iterations
        room = 0 if _is_transformed() else room_for_votes(namespace, u, weight, options)
    scalars = options.iterations, options.coupling == "in", options.leaky, options.eps
    v, *_, c = _call("route", namespace, *tensors, *scalars, save, room, return_coupling)
    return v, c


def routing_pass(namespace, u, weight, query, logits, mask, options, return_coupling) -> tuple[Tensor, Tensor]:
    """s [B, J, O] in the accumulation dtype and, if asked for, the coupling [B, I, J]."""
    tensors = u, weight, query, logits, mask
    save = _may_be_differentiated(tensors)
    s, *_, c = _call(
        "routing_pass", namespace, *tensors, options.coupling == "in", options.leaky, save, return_coupling
    )
    return s, c


def in_forward_mode() -> bool:
    """Whether forward-mode AD is active, for which the ops have no derivatives."""
    return forward_ad._current_level >= 0


def vjp(function, values, cotangents) -> tuple[Tensor, ...]:
    """The gradients of a function at values, for a backward.

    By torch.func.vjp inside transforms alone: it refuses hooks on saved tensors, which may be there outside of them.
    """
    if _is_transformed():
        return torch.func.vjp(function, *values)[1](cotangents)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        values = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in values]  # two may be one
        v = function(*values)
        return torch.autograd.grad(v, values, cotangents, create_graph=create_graph, materialize_grads=True)


def _is_transformed() -> bool:
    """Whether torch.func, torch.compile or torch.jit.trace is at work, which must see the op itself."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def _is_batched() -> bool:
    """Whether gradients are taken side by side, `is_grads_batched=True`: by a vmap that is not torch.func's."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def _may_be_differentiated(arguments) -> bool:
    # torch.jit.trace checks that the graph is the same without gradients
    return torch.jit.is_tracing() or (torch.is_grad_enabled() and (_is_transformed() or _requires_grad(arguments)))


def _requires_grad(arguments) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def room_for_votes(namespace: str, u: Tensor, weight: Tensor | None, options: reference.Options) -> int:
    """How many numbers of votes the forward leaves to the backward: on the CPU, of up to 4 samples, 12 MiB at most.

    To make them anew would read the whole weight again for so few samples. What does not fit is made anew all the same;
    csrc/cpu/way.h keeps as many between passes where no gradient is wanted. Compiled code has no room, as a graph would
    be compiled again for each size of it.
    """
    few = namespace == "capsroute" and u.device.type == "cpu" and u.shape[0] <= 4
    if not few or weight is None or weight.dim() != 4 or options.iterations == 1 or options.detach_coupling:
        return 0
    inputs, outputs, features, _ = weight.shape
    row = outputs * _whole(features, 16) + 16  # padded to the longest vectors, and to an odd number of them
    size = reference.accumulation_dtype(u.dtype).itemsize
    return min(u.shape[0] * _whole(inputs, 64) * row, (12 << 20) // size)


def _whole(count: int, group: int) -> int:
    return -(-count // group) * group


# The ops


def register(namespace: str) -> None:
    """Give the ops of a set their derivatives."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name in _FUNCTIONS:
        library.impl(name, partial(_autograd_kernel, name, namespace), "Autograd", with_keyset=True)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # what they implement lasts no longer than they


def _autograd_kernel(name, namespace, keyset, *arguments):
    """What the dispatcher calls in place of an op, for autograd and for each level of torch.func."""
    if in_forward_mode() and any(isinstance(x, Tensor) and _has_tangent(x) for x in arguments):
        raise NotImplementedError(f"{namespace}::{name} has no forward-mode derivatives (jvp)")
    op, below = _op(namespace, name), keyset & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and _requires_grad(arguments):
        with enable_single_level_autograd_function():
            return _FUNCTIONS[name].apply(op, below, *arguments)
    return _run_below(op, below, arguments)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _call(name, namespace, *arguments):
    """Call an op from Python; outside transforms past the dispatch to autograd, whose time shows in small calls."""
    op = _op(namespace, name)
    if _is_transformed() or in_forward_mode() or _is_batched():
        return op(*arguments)
    if torch.is_grad_enabled() and _requires_grad(arguments):
        # tensors that a transform saved stay wrapped after it ends, and plain autograd does not unwrap them
        return _FUNCTIONS[name].apply(op, None, *unwrap_dead_wrappers(arguments))
    return _run_below(op, None, arguments)


def _op(namespace, name):
    return getattr(getattr(torch.ops, namespace), name).default


def _run_below(op, keyset, arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments) if keyset is None else op.redispatch(keyset, *arguments)


def _run_recorded(op, keyset, arguments):
    """The same in a Function, where grad mode is off; the levels of torch.func below, which come next, need it."""
    if keyset is None:
        return _run_below(op, None, arguments)
    with torch.enable_grad():
        return _run_below(op, keyset, arguments)


class _Recorded(torch.autograd.function._SingleLevelFunction):
    """An op that autograd records: `apply(op, keyset, *arguments)`, with no keyset from eager code.

    The dispatcher has peeled off the levels of torch.func by then: Function would look for them once more, and from
    torch 2.15 on refuse them.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)  # only Function has one


class _Route(_Recorded):
    @staticmethod
    def forward(ctx, op, keyset, *arguments):
        v, *saved, c = outputs = _run_recorded(op, keyset, arguments)
        ctx.mark_non_differentiable(*saved, c)
        ctx.save_for_backward(*arguments[:5], *saved)
        ctx.namespace, ctx.scalars = op.namespace, arguments[5:10]
        return outputs if keyset else (v, c)  # an output takes longer to save than another tensor

    @staticmethod
    def backward(ctx, grad_v, *_):
        *tensors, mask, s, norm, last_logits, votes = ctx.saved_tensors
        s, norm, votes = s.contiguous(), norm.contiguous(), votes.contiguous()  # hooks may have changed their order
        iterations, *scalars, save = ctx.scalars
        needs = list(ctx.needs_input_grad[2:6])
        if save == 0:
            raise RuntimeError("route has no gradient with save=0, which keeps nothing for it")
        if save < iterations:  # the coupling of the last pass is a constant: so that of one pass with its logits
            tensors[3], iterations, needs[3] = last_logits, 1, False
        arguments = grad_v, s, norm, votes, *tensors, mask, iterations, *scalars, False, *needs
        grads = _call("route_backward", ctx.namespace, *arguments)
        return None, None, *_where(needs, grads), *[None] * 8


class _RouteBackward(_Recorded):
    @staticmethod
    def forward(ctx, op, keyset, *arguments):
        grad_v, _, _, _, *tensors = arguments[:9]
        iterations, over_inputs, leaky, eps, ctx.per_sample, *needs = arguments[9:]
        ctx.save_for_backward(grad_v, *tensors)
        ctx.options = reference.Options(iterations, "in" if over_inputs else "out", leaky, False, eps)
        ctx.needs = needs
        return _run_recorded(op, keyset, arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_v, *tensors = _second_derivatives(reference.routing, ctx, cotangents)
        return None, None, grad_v, None, None, None, *tensors, *[None] * 9


class _RoutingPass(_Recorded):
    @staticmethod
    def forward(ctx, op, keyset, *arguments):
        s, norm, c = outputs = _run_recorded(op, keyset, arguments)
        *tensors, over_inputs, leaky, save, _ = arguments
        ctx.mark_non_differentiable(norm, c)
        # a softmax over j does without s, so that the caller may change it in place
        ctx.save_for_backward(*tensors, s if over_inputs else None, norm)
        ctx.namespace, ctx.scalars, ctx.save = op.namespace, (over_inputs, leaky), save
        return outputs if keyset else (s, c)

    @staticmethod
    def backward(ctx, grad_s, *_):
        if not ctx.save:
            raise RuntimeError("routing_pass has no gradient with save=False, which keeps nothing for it")
        *tensors, s, norm = ctx.saved_tensors
        s = (grad_s if s is None else s).contiguous()  # any tensor of its shape: the numbers have no effect
        norm = norm.contiguous()
        needs = ctx.needs_input_grad[2:6]
        grads = _call("routing_pass_backward", ctx.namespace, grad_s, s, norm, *tensors, *ctx.scalars, False, *needs)
        return None, None, *_where(needs, grads), *[None] * 5


class _RoutingPassBackward(_Recorded):
    @staticmethod
    def forward(ctx, op, keyset, *arguments):
        grad_s, _, _, *tensors = arguments[:8]
        over_inputs, leaky, ctx.per_sample, *needs = arguments[8:]
        ctx.save_for_backward(grad_s, *tensors)
        ctx.options = reference.Options(1, "in" if over_inputs else "out", leaky)
        ctx.needs = needs
        return _run_recorded(op, keyset, arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_s, *tensors = _second_derivatives(reference.routing_pass, ctx, cotangents)
        return None, None, grad_s, None, None, *tensors, *[None] * 7


_FUNCTIONS = {
    "route": _Route,
    "route_backward": _RouteBackward,
    "routing_pass": _RoutingPass,
    "routing_pass_backward": _RoutingPassBackward,
}


def _where(needs, grads) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _second_derivatives(operator, ctx, cotangents):
    """They are rare: differentiate the reference twice."""
    grad, *tensors, mask = ctx.saved_tensors
    given = [k for k, x in enumerate(tensors) if x is not None]
    needed = [k for k in given if ctx.needs[k]]

    def placed(values):
        """What belongs to the tensors that are given, at their places, and None at the others."""
        own = dict(zip(given, values, strict=True))
        return [own.get(k) for k in range(len(tensors))]

    def forward(mask, *values):
        return operator(*placed(values), mask, ctx.options)[0]

    def backward(mask, grad, *values):
        grads = placed(vjp(partial(forward, mask), values, grad))
        return tuple(grads[k] for k in needed)

    def per_sample(mask, grad, *values):
        size = grad.shape[0]
        shared = (1,) if operator is reference.routing_pass else (1, 2)  # the weight, and the bias, which is no query
        own = [k not in shared and tensors[k].shape[0] == size for k in given]
        dims = [None if mask is None or mask.shape[0] != size else 0, 0, *(0 if x else None for x in own)]
        batches = [x if dim is None else x.unsqueeze(1) for x, dim in zip((mask, grad, *values), dims, strict=True)]
        grads = torch.vmap(backward, tuple(dims))(*batches)  # each of one sample
        return tuple(x.squeeze(1) if own[given.index(k)] else x for k, x in zip(needed, grads, strict=True))

    with _autocast.off(grad):
        second = vjp(
            partial(per_sample if ctx.per_sample else backward, mask),
            (grad, *(tensors[k] for k in given)),
            tuple(cotangents[k] for k in needed),
        )
    return second[0], *placed(second[1:]), None
