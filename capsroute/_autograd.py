"""Gradients of the fused operators: autograd Functions over an op set of _ops.py, which is named by its namespace."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autocast, reference


def route(namespace, u, weight, bias, logits, mask, options, return_coupling) -> tuple[Tensor, Tensor]:
    """v [B, J, O] and, if asked for, the coupling [B, I, J]."""
    if _is_transformed():
        tensors = _as_seen_by_dynamo(u, weight, bias, logits)
        v, *_, c = _Route.apply(*tensors, mask, namespace, options, 0, return_coupling)
    elif _wants_gradient(u, weight, bias, logits):
        room = room_for_votes(namespace, u, weight, options)
        v, c = _QuickRoute.apply(u, weight, bias, logits, mask, namespace, options, room, return_coupling)
    else:
        op = getattr(torch.ops, namespace).route.default
        v, *_, c = op(u, weight, bias, logits, mask, *_scalars(options), 0, 0, return_coupling)
    return v, c


def routing_pass(namespace, u, weight, query, logits, mask, options, return_coupling) -> tuple[Tensor, Tensor]:
    """s [B, J, O] in the accumulation dtype and, if asked for, the coupling [B, I, J]."""
    if _is_transformed():
        tensors = _as_seen_by_dynamo(u, weight, query, logits)
        s, _, c = _RoutingPass.apply(*tensors, mask, namespace, options, return_coupling)
    elif _wants_gradient(u, weight, query, logits):
        s, c = _QuickPass.apply(u, weight, query, logits, mask, namespace, options, return_coupling)
    else:
        op = getattr(torch.ops, namespace).routing_pass.default
        over_inputs = options.coupling == "in"
        s, _, c = op(u, weight, query, logits, mask, over_inputs, options.leaky, False, return_coupling)
    return s, c


def _as_seen_by_dynamo(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """dynamo believes that what torch.func differentiates needs no gradient; of a view of it, it knows better."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(None if x is None else x.view_as(x) for x in tensors)


def lost_by_dynamo(*tensors: Tensor | None) -> bool:
    """Whether the derivatives of a call that dynamo traces here would be 0, without an error.

    dynamo keeps a Function's gradient for one level of differentiation: autograd's, or one torch.func.grad. Inside
    vmap, of a backward, and in forward mode it keeps the raw ops alone, which have no derivatives.
    """
    if not torch.compiler.is_dynamo_compiling():
        return False
    stack, is_recorded = _transformations()
    kinds = [kind for kind, _ in stack]
    if "Jvp" in kinds or forward_ad._current_level >= 0:
        return True
    if not stack or not torch.is_grad_enabled():
        return False
    if kinds != ["Grad"] and set(kinds) != {"Vmap"}:
        return True
    return is_recorded and any(x is not None and _outermost(x, stack).requires_grad for x in tensors)


def _transformations() -> tuple[tuple[tuple[str, int], ...], bool]:
    """Kind and level of the transformations of torch.func at work, and whether autograd records what is outside."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    grads = [torch._C._functorch.CGradInterpreterPtr(x) for x in stack if x.key().name == "Grad"]
    return tuple((x.key().name, x.level()) for x in stack), all(x.prevGradMode() for x in grads)


_transformations._dynamo_marked_constant = True  # to dynamo; torch.compiler's decorator for it would import dynamo


def _outermost(x: Tensor, stack: tuple[tuple[str, int], ...]) -> Tensor:
    """What the transformations wrapped, of which alone dynamo knows whether it requires a gradient."""
    for kind, level in reversed(stack):
        if kind == "Grad":
            x = torch._C._functorch._unwrap_for_grad(x, level)
        else:
            x = torch._C._functorch._unwrap_batched(x, level)[0]
    return x


def _is_transformed() -> bool:
    """Whether torch.func or torch.compile is at work, or forward mode, whose tangents a raw op would drop silently."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _scalars(options: reference.Options) -> tuple[int, bool, bool, float]:
    return options.iterations, options.coupling == "in", options.leaky, options.eps


def room_for_votes(namespace: str, u: Tensor, weight: Tensor | None, options: reference.Options) -> int:
    """Numbers for votes that the CPU kernels keep for the backward, of up to 4 samples and as many as 12 MiB hold.

    All the weight would be read again to make them anew for so few: csrc/cpu/way.h keeps as many where no gradient is
    wanted, and whatever the room is, what does not fit is made anew. Compiled code does without, as it would be
    compiled again for them.
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


class _Arguments(inspect.Signature):
    """The signature of a `forward` that is called with every argument in its place.

    Function.apply binds its arguments by this on every call; inspect's own way of doing so takes 60 us.
    """

    class Bound(NamedTuple):
        args: tuple
        kwargs: dict

        def apply_defaults(self) -> None:
            pass

    def bind(self, *args) -> Bound:
        return self.Bound(args, {})


def _positional(forward):
    forward.__signature__ = _Arguments(inspect.signature(forward).parameters.values())
    return forward


class _Route(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_positional
    def forward(u, weight, bias, logits, mask, namespace, options, room, return_coupling):
        route = getattr(torch.ops, namespace).route.default
        save = 1 if options.detach_coupling else options.iterations
        return route(u, weight, bias, logits, mask, *_scalars(options), save, room, return_coupling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, namespace, options, _, _ = inputs
        _, *saved, c = output
        ctx.mark_non_differentiable(*saved, c)
        ctx.save_for_backward(*tensors, *saved)
        ctx.namespace, ctx.options = namespace, options

    @staticmethod
    def backward(ctx, grad_v, *_):
        *tensors, s, norm, last_logits, votes = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        needs[3] = needs[3] and not ctx.options.detach_coupling
        options = ctx.namespace, ctx.options, tuple(needs)
        grads = _run(_RouteBackward, grad_v, *tensors, *options, s, norm, last_logits, votes)
        return *_where(needs, grads), None, None, None, None, None


class _RoutingPass(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_positional
    def forward(u, weight, query, logits, mask, namespace, options, return_coupling):
        routing_pass = getattr(torch.ops, namespace).routing_pass
        over_inputs = options.coupling == "in"
        return routing_pass(u, weight, query, logits, mask, over_inputs, options.leaky, True, return_coupling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, namespace, options, _ = inputs
        s, norm, c = output
        ctx.mark_non_differentiable(norm, c)
        # a softmax over j does without s, so that the caller may change it in place
        ctx.save_for_backward(*tensors, s if options.coupling == "in" else None, norm)
        ctx.namespace, ctx.options = namespace, options

    @staticmethod
    def backward(ctx, grad_s, *_):
        *tensors, s, norm = ctx.saved_tensors
        s = grad_s.contiguous() if s is None else s  # of its shape; the numbers have no effect
        needs = ctx.needs_input_grad[:4]
        grads = _run(_RoutingPassBackward, grad_s, *tensors, ctx.namespace, ctx.options, needs, s, norm)
        return *_where(needs, grads), None, None, None, None


def _quick(function):
    """The same for a call without transformations, which alone need `setup_context` and what is saved as outputs.

    It takes half the time, which a small call notices; so does an `apply` that does not look for them once more, as
    that of torch's public Function does.
    """

    class Quick(torch.autograd.Function):  # a base of it would do, but not to compiled autograd
        apply = torch._C._FunctionBase.__dict__["apply"]

        @staticmethod
        def forward(ctx, *inputs):
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output[0], output[-1]

        backward = staticmethod(function.backward)

    return Quick


_QuickRoute, _QuickPass = _quick(_Route), _quick(_RoutingPass)


class _Backward(torch.autograd.Function):
    """A backward as a function of its own, so that it can be differentiated once more."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, *tensors, _, options, needs = inputs[:9]
        ctx.save_for_backward(grad, *tensors)
        ctx.options, ctx.needs, ctx.inputs = options, needs, len(inputs)


class _RouteBackward(_Backward):
    @staticmethod
    @_positional
    def forward(grad_v, u, weight, bias, logits, mask, namespace, options, needs, s, norm, last_logits, votes):
        route_backward = getattr(torch.ops, namespace).route_backward
        if options.detach_coupling:  # the coupling of the last pass is a constant: so that of one pass with its logits
            logits = logits if options.iterations == 1 else last_logits
            options = options._replace(iterations=1)
        return _in_logical_order(
            *route_backward(grad_v, s, norm, votes, u, weight, bias, logits, mask, *_scalars(options), *needs)
        )

    @staticmethod
    def backward(ctx, *cotangents):
        return _second_derivatives(reference.routing, ctx, cotangents)


class _RoutingPassBackward(_Backward):
    @staticmethod
    @_positional
    def forward(grad_s, u, weight, query, logits, mask, namespace, options, needs, s, norm):
        routing_pass_backward = getattr(torch.ops, namespace).routing_pass_backward
        over_inputs = options.coupling == "in"
        return _in_logical_order(
            *routing_pass_backward(grad_s, s, norm, u, weight, query, logits, mask, over_inputs, options.leaky, *needs)
        )

    @staticmethod
    def backward(ctx, *cotangents):
        return _second_derivatives(reference.routing_pass, ctx, cotangents)


def _run(backward, *args):
    """The gradients; as a Function only where they may be differentiated once more."""
    return backward.apply(*args) if torch.is_grad_enabled() or _is_transformed() else backward.forward(*args)


def _in_logical_order(du, dweight, dthird, dlogits):
    """The weight's gradient from the kernels' memory order [I, D, J, O] to [I, J, O, D]."""
    return du, dweight.permute(0, 2, 3, 1) if dweight.dim() == 4 else dweight, dthird, dlogits


def _where(needs, grads) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _second_derivatives(operator, ctx, cotangents):
    """They are rare: differentiate the reference twice."""
    grad, *tensors, mask = ctx.saved_tensors
    given = [k for k, x in enumerate(tensors) if x is not None]
    needed = [k for k in given if ctx.needs[k]]

    def forward(*values):
        full = [None] * len(tensors)
        for k, value in zip(given, values, strict=True):
            full[k] = value
        return operator(*full, mask, ctx.options)[0]

    def backward(grad, *values):
        grads = dict(zip(given, torch.func.vjp(forward, *values)[1](grad), strict=True))
        return tuple(grads[k] for k in needed)

    with _autocast.off(grad):
        _, pullback = torch.func.vjp(backward, grad, *(tensors[k] for k in given))
        second = pullback(tuple(cotangents[k] for k in needed))
    result = [None] * len(tensors)
    for k, x in zip(given, second[1:], strict=True):
        result[k] = x
    return second[0], *result, *[None] * (ctx.inputs - 5)
