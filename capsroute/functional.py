"""The public operators: check the arguments, bring them to one form, choose a backend, call it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _backends, _checks, reference


def capsule_linear(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    coupling: str = "out",
    leaky: bool = False,
    detach_coupling: bool = False,
    eps: float = 1e-9,
    return_coupling: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_coupling
    r"""A layer of capsules with routing by agreement, from input capsules and a weight.

    The votes :math:`h_{ij} = W_{ij} u_i` are routed as in Procedure 1 of Sabour, Frosst and Hinton,
    "Dynamic Routing Between Capsules", 2017. The fused backends hold a few MiB of them at most::

        b_ij = logits_ij
        repeat `iterations` times
            c_ij = softmax over j of b_ij
            s_j  = sum over i of c_ij h_ij + bias_j
            v_j  = squash(s_j)
            b_ij = b_ij + h_ij . v_j

    Letters: I input capsules with D features, J output capsules with O features.

    Args:
        u: input capsules ``[*, I, D]``; any number of leading dimensions. float32, float64, bfloat16
            or float16.
        weight: ``[I, J, O, D]``, or shared by all input capsules ``[J, O, D]``, or by all pairs
            ``[O, D]`` (then J comes from ``logits``, else from ``bias``). Any strides; the memory
            order I, D, J, O is read in place where O fills whole vectors, others are copied once a
            call. The dtype of ``u``.
        iterations: R, the number of softmax / weighted-sum passes, at least 1.
        bias: ``[J, O]``, added to s in every pass; the dtype of ``u`` or float32.
        logits: prior logits, broadcast to ``[*, I, J]``; differentiable; ``-inf`` forbids a pair. The
            dtype of ``u`` or float32.
        mask: bool, broadcast to ``[*, I]``; False takes an input capsule out: whatever it holds, NaN
            included, reaches no result, and its gradient is 0.
        coupling: ``"out"`` normalises over the output capsules j, ``"in"`` over the input capsules i.
        leaky: one more logit, fixed at 0, takes part in the softmax over j; its share is dropped.
        detach_coupling: treat the coupling of the last pass as a constant in the backward.
        eps: added to the squared length inside squash's square root.
        return_coupling: also return the coupling of the last pass. It carries no gradient.
        backend: ``"auto"``, or a name from :func:`capsroute.backends`, which then never falls back.

    Returns:
        v ``[*, J, O]`` in the dtype of ``u``; with ``return_coupling`` also c ``[*, I, J]``.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or value, by its name.
        RuntimeError: if an explicit backend cannot serve the call, with the reason.
    """
    options = _checks.check_options(iterations, coupling, leaky, detach_coupling, eps)
    return _route(_check_linear, (u, weight, bias, logits, mask), options, return_coupling, backend)


def dynamic_routing(
    votes: Tensor,
    iterations: int = 3,
    *,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    coupling: str = "out",
    leaky: bool = False,
    detach_coupling: bool = False,
    eps: float = 1e-9,
    return_coupling: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_coupling
    """Routing by agreement of votes that are given (Sabour, Frosst and Hinton 2017, Procedure 1).

    As :func:`capsule_linear`, which should be preferred where votes are W u, since it does not store them.

    Args:
        votes: ``[*, I, J, O]``; any number of leading dimensions, any strides.
        iterations, bias, logits, mask, coupling, leaky, detach_coupling, eps, return_coupling, backend:
            as in :func:`capsule_linear`.

    Returns:
        v ``[*, J, O]`` in the dtype of ``votes``; with ``return_coupling`` also c ``[*, I, J]``.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`capsule_linear`.
    """
    options = _checks.check_options(iterations, coupling, leaky, detach_coupling, eps)
    return _route(_check_routing, (votes, None, bias, logits, mask), options, return_coupling, backend)


def routing_pass(
    u: Tensor,
    weight: Tensor,
    query: Tensor | None,
    *,
    scale: float = 1.0,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    coupling: str = "out",
    leaky: bool = False,
    return_coupling: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_coupling
    r"""One pass of routing, the unit that most published routings are made of.

    With the votes :math:`h_{ij} = W_{ij} u_i`, of which the fused backends hold a few MiB at most::

        c_ij = softmax over j (or i) of (scale h_ij . query_j + logits_ij)
        s_j  = sum over i of c_ij h_ij

    :func:`capsule_linear` is R of these with ``query`` the sum of the outputs so far, a bias and
    :func:`squash` between them. With another query, scale, normaliser or nonlinearity it is another
    routing; with ``coupling="in"`` and a weight ``[J, O, D]`` it is attention of J queries over I keys.

    Args:
        u: input capsules ``[*, I, D]``. float32, float64, bfloat16 or float16.
        weight: ``[I, J, O, D]``, or shared, ``[J, O, D]`` or ``[O, D]`` (then J comes from ``logits``,
            else from ``query``). The dtype of ``u``.
        query: what votes are compared with, broadcast to ``[*, J, O]``; None means zero. The dtype of
            ``u`` or float32.
        scale: of the agreement h . query, a finite number.
        logits, mask, coupling, leaky, return_coupling, backend: as in :func:`capsule_linear`.

    Returns:
        s ``[*, J, O]`` in the dtype of ``u``; with ``return_coupling`` also c ``[*, I, J]``, which carries
        no gradient. Every tensor but ``mask`` has a gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`capsule_linear`.
    """
    _checks.check_coupling(coupling, leaky)
    options = reference.Options(1, coupling, leaky)
    return _pass(_check_pass, (u, weight, query, logits, mask), scale, options, return_coupling, backend)


def votes_pass(
    votes: Tensor,
    query: Tensor | None,
    *,
    scale: float = 1.0,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    coupling: str = "out",
    leaky: bool = False,
    return_coupling: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_coupling
    """One pass of routing over votes that are given: :func:`routing_pass` without a weight.

    Args:
        votes: ``[*, I, J, O]``; any number of leading dimensions, any strides.
        query, scale, logits, mask, coupling, leaky, return_coupling, backend: as in
            :func:`routing_pass`.

    Returns:
        s ``[*, J, O]`` in the dtype of ``votes``; with ``return_coupling`` also c ``[*, I, J]``.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`capsule_linear`.
    """
    _checks.check_coupling(coupling, leaky)
    options = reference.Options(1, coupling, leaky)
    return _pass(_check_votes_pass, (votes, None, query, logits, mask), scale, options, return_coupling, backend)


def squash(s: Tensor, dim: int = -1, eps: float = 1e-9, power: float = 1.0) -> Tensor:
    """Shrink vectors to a length below 1, keeping their direction (Sabour et al. 2017, eq. 1).

    v = (n2 / (1 + n2))^power * s / sqrt(n2 + eps), n2 = |s|^2. Low precision is computed in float32. Value and
    gradient are right, not merely finite, at s = 0 and for |s| from 1e-30 to 1e18 (1e4 in float16); with a power below
    1 from 1e-18, where n2 does not underflow.

    Args:
        s: vectors along ``dim``; float32, float64, bfloat16 or float16.
        dim: the dimension that holds a vector's features.
        eps: added to the squared length inside the square root.
        power: 1 in the paper; a smaller one makes short vectors longer, as some recommenders do. Positive.

    Returns:
        A tensor of the shape and dtype of ``s``.
    """
    _checks.check_tensor("s", s, "with vectors along dim")
    _checks.check_eps(eps)
    _checks.check_positive("power", power)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if not -s.dim() <= dim < s.dim():
        raise ValueError(f"dim must be a dimension of s {list(s.shape)}, got {dim}")
    return reference.squash(s.to(reference.accumulation_dtype(s.dtype)), dim, eps, power).to(s.dtype)


def _route(check, tensors, options, return_coupling, backend):
    u, weight, sizes, autocast = _checked(check, tensors)
    run = _backends.choose(backend, u, weight).route
    bias, logits, mask = tensors[2:]
    if options.detach_coupling and logits is not None:  # they reach the output through the coupling alone
        logits = logits.detach()
    return _run(run, u, weight, (bias, logits, mask), sizes, options, return_coupling, autocast)


def _pass(check, tensors, scale, options, return_coupling, backend):
    _checks.check_scale(scale)
    u, weight, sizes, autocast = _checked(check, tensors)
    query, logits, mask = tensors[2:]
    if query is not None:
        lead, outputs, features = sizes
        batch = math.prod(lead)
        query = _flatten_lead(query, lead, batch, 2).expand(batch, outputs, features)
        query = query.to(reference.accumulation_dtype(u.dtype))
        query = query if scale == 1 else query * scale
    run = _backends.choose(backend, u, weight).routing_pass
    result = _run(run, u, weight, (query, logits, mask), sizes, options, return_coupling, autocast)
    return (result[0].to(u.dtype), result[1]) if return_coupling else result.to(u.dtype)


_sizes = {}  # of arguments that passed a check, by the check and their kinds
_MOST_SIZES = 1024


def _checked(check, tensors):
    """u (or the votes) and the weight, cast under autocast; their sizes (leading dimensions, J, O); whether it is on.

    The checks take longer than a small problem: arguments like those that passed them before pass again.
    """
    u, weight = tensors[:2]
    autocast = isinstance(u, Tensor) and _autocast.is_on(u)
    if autocast or torch.compiler.is_compiling() or torch.jit.is_tracing():  # sizes of a trace are tensors
        return *check(*tensors), autocast
    try:
        key = check, *map(_kind, tensors)
        sizes = _sizes.get(key)
    except (TypeError, RuntimeError):  # a symbolic size has no hash, a nested tensor no sizes
        return *check(*tensors), autocast
    if sizes is None:
        sizes = check(*tensors)[2]
        if len(_sizes) >= _MOST_SIZES:  # another thread may have added one
            _sizes.clear()
        _sizes[key] = sizes
    return u, weight, sizes, autocast


def _kind(x):
    """All that a check looks at."""
    if x is None:
        return None
    return (x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) else type(x)


def _check_linear(u, weight, bias, logits, mask):
    u, weight, outputs = _check_weight(u, weight, logits, bias, "bias")
    return u, weight, _check_parameters(u, u.shape[:-1], outputs, weight.shape[-2], bias, logits, mask)


def _check_routing(votes, _, bias, logits, mask):
    votes, (*lead, outputs, features) = _check_votes(votes)
    return votes, None, _check_parameters(votes, lead, outputs, features, bias, logits, mask)


def _check_pass(u, weight, query, logits, mask):
    u, weight, outputs = _check_weight(u, weight, logits, query, "query")
    return u, weight, _check_parameters(u, u.shape[:-1], outputs, weight.shape[-2], None, logits, mask, query)


def _check_votes_pass(votes, _, query, logits, mask):
    votes, (*lead, outputs, features) = _check_votes(votes)
    return votes, None, _check_parameters(votes, lead, outputs, features, None, logits, mask, query)


def _check_weight(u, weight, logits, third, name):
    """u and weight, checked and cast, and J, or None.

    A weight [O, D] does not say what J is: then it is that of the logits, else of `third`, the bias or query.
    """
    _checks.check_input(u)
    _checks.check_tensor("weight", weight, "[I, J, O, D], [J, O, D] or [O, D]")
    cast = _autocast.cast(u, weight)
    _checks.check_weight(weight, u, cast[0].dtype == cast[1].dtype)
    u, weight = cast
    outputs = weight.shape[-3] if weight.dim() > 2 else None
    if outputs is None and logits is None and third is None:
        raise ValueError(
            f"logits or {name} must be given with weight [O, D], which does not say what J is "
            "(and all output capsules would be identical)"
        )
    if outputs is None and logits is not None:
        _checks.check_parameter("logits", logits, "[*, I, J]", u)
        outputs = logits.shape[-1] if logits.dim() else 0
        if outputs == 0:
            raise ValueError(f"logits must be [*, I, J] with J >= 1, got {list(logits.shape)}")
    return u, weight, outputs


def _check_votes(votes):
    _checks.check_votes(votes)
    return _autocast.cast(votes)[0], votes.shape


def _check_parameters(u, lead_and_inputs, outputs, features, bias, logits, mask, query=None):
    """The leading dimensions, J and O."""
    *lead, inputs = lead_and_inputs
    if bias is not None:
        _checks.check_bias(bias, outputs, features, u)
        outputs = bias.shape[0]
    if query is not None:
        outputs = _checks.check_query(query, lead, outputs, features, u)
    if logits is not None:
        _checks.check_parameter("logits", logits, "[*, I, J]", u)
        _checks.check_broadcast("logits", logits, (*lead, inputs, outputs), "[*, I, J]")
    if mask is not None:
        _checks.check_mask(mask, (*lead, inputs), u)
    return lead, outputs, features


def _run(run, u, weight, parameters, sizes, options, return_coupling, autocast):
    """Call a backend with one batch dimension, and give its results the caller's leading ones."""
    _checks.check_flag("return_coupling", return_coupling)
    lead, outputs, _ = sizes
    third, logits, mask = parameters
    if logits is not None:  # [B or 1, I or 1, J]
        logits = _flatten_lead(logits, lead, math.prod(lead), 2).expand(-1, -1, outputs)
    if mask is not None:  # [B or 1, I or 1]
        mask = _flatten_lead(mask, lead, math.prod(lead), 1)
    if len(lead) != 1:
        u = u.reshape(math.prod(lead), *u.shape[len(lead) :])
    arguments = u, weight, third, logits, mask, options, return_coupling
    if autocast:
        with _autocast.off(u):
            v, c = run(*arguments)
    else:
        v, c = run(*arguments)
    if len(lead) != 1:
        v = v.reshape(*lead, *v.shape[1:])
        c = c.reshape(*lead, *c.shape[1:]) if return_coupling else c
    return (v, c) if return_coupling else v


def _flatten_lead(x: Tensor, lead: list[int], batch: int, kept: int) -> Tensor:
    """x, broadcastable to [*lead, ...kept], as [batch or 1, ...kept], without copying what broadcasts."""
    x = x.reshape(*(1,) * (len(lead) + kept - x.dim()), *x.shape)
    if len(lead) == 1:
        return x
    if all(map(_checks.is_one, x.shape[: len(lead)])):
        return x.reshape(1, *x.shape[len(lead) :])
    return x.expand(*lead, *(-1,) * kept).reshape(batch, *x.shape[len(lead) :])
