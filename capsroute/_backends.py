"""Which backends there are, which can run here, and which one serves a call.

The order of BACKENDS is the order in which "auto" asks them. A backend says (can it, why or why not)
twice: for this machine, and for one call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _autograd, _ops, _triton, reference

log = logging.getLogger("capsroute")

Verdict = tuple[bool, str]


class Backend(NamedTuple):
    here: Callable[[], Verdict]
    serves: Callable[[Tensor, reference.Options], Verdict]
    route: Callable[..., tuple[Tensor, Tensor]]
    routing_pass: Callable[..., tuple[Tensor, Tensor]]


def of_ops(namespace: str, here, serves) -> Backend:
    """The backend that an op set implements."""
    return Backend(here, serves, partial(_autograd.route, namespace), partial(_autograd.routing_pass, namespace))


def _cpu_serves(u: Tensor, options: reference.Options) -> Verdict:
    if not u.is_cpu:
        return False, f"the input capsules are on {u.device}, not on the CPU"
    return _ops.cpu_library()


def _route_by_reference(u, weight, bias, logits, mask, options, return_coupling):
    return reference.routing(u, weight, bias, logits, mask, options)


def _pass_by_reference(u, weight, query, logits, mask, options, return_coupling):
    return reference.routing_pass(u, weight, query, logits, mask, options)


BACKENDS = {
    "cpu": of_ops("capsroute", _ops.cpu_library, _cpu_serves),
    "triton": of_ops(_triton.NAMESPACE, _triton.installed, lambda u, options: _triton.serves(u)),
    "reference": Backend(
        lambda: (True, "plain PyTorch, on any device"),
        lambda u, options: (True, "it serves every call"),
        _route_by_reference,
        _pass_by_reference,
    ),
}


def backends() -> dict[str, Verdict]:
    """The backends by name, each with whether it can run here and why or why not.

    Returns:
        ``{name: (can it run here, why or why not)}``, in the order in which ``backend="auto"`` asks.
    """
    return {name: backend.here() for name, backend in BACKENDS.items()}


_logged: set[tuple[str, str]] = set()


def _log_once(candidate: str, why: str, refused: str) -> None:
    if not torch.compiler.is_compiling():  # a log call would break the graph
        _logged.add((candidate, refused))
        log.info(f"backend {candidate}: {why}{refused}")


def choose(name: str, u: Tensor, options: reference.Options) -> Backend:
    """The backend that serves the call: the first willing one for "auto", else the named one or an error."""
    if name == "auto":
        refused = ""
        for candidate, backend in BACKENDS.items():
            can, why = backend.serves(u, options)
            if can:
                if (candidate, refused) not in _logged:
                    _log_once(candidate, why, refused)
                return backend
            refused += f"; not {candidate}: {why}"
    if name not in BACKENDS:
        expected = ", ".join(f'"{known}"' for known in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {expected}, got {name!r}")
    can, why = BACKENDS[name].serves(u, options)
    if not can:
        raise RuntimeError(f'backend="{name}" cannot serve this call: {why}')
    return BACKENDS[name]
