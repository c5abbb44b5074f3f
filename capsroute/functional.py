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
    "Dynamic Routing Between Capsules", 2017::

        b_ij = logits_ij
        repeat `iterations` times
            c_ij = softmax over j of b_ij
            s_j  = sum over i of c_ij h_ij + bias_j
            v_j  = squash(s_j)
            b_ij = b_ij + h_ij . v_j

    Letters: I input capsules with D features, J output capsules with O features. The CPU kernels hold the votes of a
    few samples only: for each thread at most 12 MiB that are kept between passes, and where votes are made anew in each
    pass, those of 4 samples and 16 input capsules.

    Args:
        u: input capsules ``[*, I, D]``; any number of leading dimensions. float32, float64, bfloat16
            or float16.
        weight: ``[I, J, O, D]``, or shared by all input capsules ``[J, O, D]``, or by all pairs
            ``[O, D]`` (then J comes from ``logits``, else from ``bias``). Any strides; the memory
            order I, D, J, O is read in place where O fills whole vectors; others are multiplied as they
            lie for few samples, else brought into it in every call. Its gradient lies as it does. The dtype of ``u``.
        iterations: R, the number of softmax / weighted-sum passes, at least 1.
        bias: ``[J, O]``, added to s in every pass; the dtype of ``u`` or float32.
        logits: prior logits, broadcast to ``[*, I, J]``; differentiable unless ``detach_coupling``; ``-inf``
            forbids a pair. The dtype of ``u`` or float32.
        mask: bool, broadcast to ``[*, I]``; False takes an input capsule out: whatever it holds, NaN
            included, reaches no result, and its gradient is 0.
        coupling: ``"out"`` normalises over the output capsules j, ``"in"`` over the input capsules i.
        leaky: one more logit, fixed at 0, takes part in the softmax over j; its share is dropped.
        detach_coupling: treat the coupling of the last pass as a constant in the backward.
        eps: added to the squared length inside squash's square root.
        return_coupling: also return the coupling of the last pass. It carries no gradient.
        backend: ``"auto"``, or a name from :func:`capsroute.backends`; a named backend never falls back to
            another.

    Returns:
        v ``[*, J, O]`` in the dtype of ``u``; with ``return_coupling`` also c ``[*, I, J]``.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
        RuntimeError: if a named backend cannot serve the call; the message says why.
    """
    options = _checks.check_options(iterations, coupling, leaky, detach_coupling, eps)
    return _route(False, (u, weight, bias, logits, mask), options, return_coupling, backend)


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

    Where the votes are W u, prefer :func:`capsule_linear`, which does not store them.

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
    return _route(True, (votes, None, bias, logits, mask), options, return_coupling, backend)


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

    With the votes :math:`h_{ij} = W_{ij} u_i`, which the fused backends do not store::

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
        scale: factor on the agreement h . query; finite.
        logits, mask, coupling, leaky, return_coupling, backend: as in :func:`capsule_linear`.

    Returns:
        s ``[*, J, O]`` in the dtype of ``u``; with ``return_coupling`` also c ``[*, I, J]``, which carries
        no gradient. All inputs but ``mask`` have gradients.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`capsule_linear`.
    """
    _checks.check_coupling(coupling, leaky)
    options = reference.Options(1, coupling, leaky)
    return _pass(False, (u, weight, query, logits, mask), scale, options, return_coupling, backend)


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
    return _pass(True, (votes, None, query, logits, mask), scale, options, return_coupling, backend)


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

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """
    _checks.check_tensor("s", s, "with vectors along dim")
    eps, power = _checks.check_eps(eps), _checks.check_positive("power", power)
    _checks.check_int("dim", dim)
    if not -s.dim() <= dim < s.dim():
        raise ValueError(f"dim must be a dimension of s {list(s.shape)}, got {dim}")
    return reference.squash(s.to(reference.accumulation_dtype(s.dtype)), dim, eps, power).to(s.dtype)


def _route(is_votes, tensors, options, return_coupling, backend):
    u, weight, sizes, autocast = _checked(is_votes, "bias", tensors)
    run = _backends.choose(backend, u, weight).route
    bias, logits, mask = tensors[2:]
    if options.detach_coupling and logits is not None:  # they reach the output through the coupling alone
        logits = logits.detach()
    return _run(run, u, weight, (bias, logits, mask), sizes, options, return_coupling, autocast)


def _pass(is_votes, tensors, scale, options, return_coupling, backend):
    scale = _checks.check_scale(scale)
    u, weight, sizes, autocast = _checked(is_votes, "query", tensors)
    query, logits, mask = tensors[2:]
    if query is not None:
        lead, outputs, features = sizes
        query = _flatten_lead(query, lead, 2).expand(math.prod(lead), outputs, features)
        query = query.to(reference.accumulation_dtype(u.dtype))
        query = query if scale == 1 else query * scale
    run = _backends.choose(backend, u, weight).routing_pass
    result = _run(run, u, weight, (query, logits, mask), sizes, options, return_coupling, autocast)
    return (result[0].to(u.dtype), result[1]) if return_coupling else result.to(u.dtype)


_sizes = {}  # of arguments that passed the check, by their kinds
_MOST_SIZES = 1024


def _checked(is_votes, third_name, tensors):
    """u (or the votes) and the weight, cast under autocast; their sizes (leading dimensions, J, O); whether it is on.

    The checks take longer than a small problem: arguments like those that passed them before pass again.
    """
    u, weight = tensors[:2]
    autocast = isinstance(u, Tensor) and _autocast.is_on(u)
    if autocast or torch.compiler.is_compiling() or torch.jit.is_tracing():  # sizes of a trace are tensors
        return *_check(is_votes, third_name, *tensors), autocast
    try:
        key = is_votes, third_name, *map(_kind, tensors)
        sizes = _sizes.get(key)
    except (TypeError, RuntimeError):  # a symbolic size has no hash, a nested tensor no sizes
        return *_check(is_votes, third_name, *tensors), autocast
    if sizes is None:
        sizes = _check(is_votes, third_name, *tensors)[2]
        if len(_sizes) >= _MOST_SIZES:  # another thread may have added one
            _sizes.clear()
        _sizes[key] = sizes
    return u, weight, sizes, autocast


def _kind(x):
    """All that a check looks at."""
    if x is None:
        return None
    return (x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) else type(x)


def _check(is_votes, third_name, u, weight, third, logits, mask):
    """u (or the votes) and the weight, checked and cast, and the sizes; `third` is the bias or the query."""
    if is_votes:
        _checks.check_votes(u)
        u, (*lead, inputs, outputs, features) = _autocast.cast(u)[0], u.shape
    else:
        u, weight, outputs = _check_weight(u, weight, logits, third, third_name)
        (*lead, inputs), features = u.shape[:-1], weight.shape[-2]
    if third is not None and third_name == "bias":
        outputs = _checks.check_bias(third, outputs, features, u)
    elif third is not None:
        outputs = _checks.check_query(third, lead, outputs, features, u)
    if logits is not None:
        _checks.check_parameter("logits", logits, "[*, I, J]", u)
        _checks.check_broadcast("logits", logits, (*lead, inputs, outputs), "[*, I, J]")
    if mask is not None:
        _checks.check_mask(mask, (*lead, inputs), u)
    return u, weight, (lead, outputs, features)


def _check_weight(u, weight, logits, third, third_name):
    """u and weight, checked and cast, and J, or None.

    A weight [O, D] does not say what J is: then it is that of the logits, else of the bias or query.
    """
    _checks.check_input(u)
    _checks.check_tensor("weight", weight, "[I, J, O, D], [J, O, D] or [O, D]")
    cast = _autocast.cast(u, weight)
    _checks.check_weight(weight, u, cast[0].dtype == cast[1].dtype)
    u, weight = cast
    outputs = weight.shape[-3] if weight.dim() > 2 else None
    if outputs is None and logits is None and third is None:
        raise ValueError(
            f"logits or {third_name} must be given with weight [O, D], which does not say what J is "
            "(and all output capsules would be identical)"
        )
    if outputs is None and logits is not None:
        _checks.check_parameter("logits", logits, "[*, I, J]", u)
        outputs = logits.shape[-1] if logits.dim() else 0
        if outputs == 0:
            raise ValueError(f"logits must be [*, I, J] with J >= 1, got {list(logits.shape)}")
    return u, weight, outputs


def _run(run, u, weight, parameters, sizes, options, return_coupling, autocast):
    """Call a backend with one batch dimension, and give its results the caller's leading ones."""
    _checks.check_flag("return_coupling", return_coupling)
    lead, outputs, _ = sizes
    third, logits, mask = parameters
    if logits is not None:  # [B or 1, I or 1, J]
        logits = _flatten_lead(logits, lead, 2).expand(-1, -1, outputs)
    if mask is not None:  # [B or 1, I or 1]
        mask = _flatten_lead(mask, lead, 1)
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


def _flatten_lead(x: Tensor, lead: list[int], kept: int) -> Tensor:
    """x, broadcastable to [*lead, ...kept], as [B or 1, ...kept], without copying what broadcasts."""
    x = x.reshape(*(1,) * (len(lead) + kept - x.dim()), *x.shape)
    if len(lead) == 1:
        return x
    if all(map(_checks.is_one, x.shape[: len(lead)])):
        return x.reshape(1, *x.shape[len(lead) :])
    return x.expand(*lead, *(-1,) * kept).reshape(math.prod(lead), *x.shape[len(lead) :])
