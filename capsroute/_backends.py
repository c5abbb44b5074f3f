"""Which backends there are, which can run here, and which one serves a call.

The order of BACKENDS is the order in which "auto" asks them. A backend says (can it, why or why not)
twice: for this machine, and for one call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _autograd, _checks, _ops, _triton, reference

log = logging.getLogger("capsroute")

Verdict = tuple[bool, str]


class Backend(NamedTuple):
    here: Callable[[], Verdict]
    serves: Callable[[Tensor, Tensor | None], Verdict]  # of u or the votes, and the weight
    route: Callable[..., tuple[Tensor, Tensor]]
    routing_pass: Callable[..., tuple[Tensor, Tensor]]


def of_ops(namespace: str, here, serves) -> Backend:
    """The backend that an op set implements."""
    return Backend(here, serves, partial(_autograd.route, namespace), partial(_autograd.routing_pass, namespace))


def _cpu_serves(u: Tensor, weight: Tensor | None) -> Verdict:
    if not u.is_cpu:
        return False, f"the input capsules are on {u.device}, not on the CPU"
    return _ops.cpu_library()


def _cuda_here() -> Verdict:
    can, why = _ops.cuda_library()
    if can and not torch.cuda.is_available():
        return False, f"{why}, but torch sees no CUDA device here"
    return can, why


def _cuda_serves(u: Tensor, weight: Tensor | None) -> Verdict:
    if u.device.type != "cuda":
        return False, f"the input capsules are on {u.device}, not on a CUDA device"
    can, why = _ops.cuda_library()
    return _cuda_fits(u, weight) if can else (can, why)


def _cuda_fits(u: Tensor, weight: Tensor | None) -> Verdict:
    """Whether the rows of a stream fit in the registers of 8 warps, and indices in 32 bits: csrc/cuda/kernels.h.

    J of a weight [O, D] is not known here.
    """
    most = 64 if u.dtype == torch.float64 else 128
    if weight is None:
        lead, indices, features = u.shape[:-3], u.shape[-3:-1], u.shape[-1:]  # *; I, J; O
    else:
        lead, indices = u.shape[:-2], (*u.shape[-2:], *weight.shape[-3:-2])  # *; I, D, J
        features = weight.shape[-2:-1] if weight.dim() == 4 else weight.shape[-2:]  # O, and D of a shared weight
    if max(features) > most:
        return False, f"its kernels take O, and D of a shared weight, up to {most} in {u.dtype}, got {max(features)}"
    for size in (math.prod(lead), *indices):
        if _checks.is_known(size > 2**30):
            return False, f"its kernels take B, I, D and J up to 2^30, got {size}"
    return True, "C++ kernels for CUDA"


def _triton_serves(u: Tensor, weight: Tensor | None) -> Verdict:
    """Whether the kernels take W_i, since a padded W_ij is one tile and places in W_i have 32 bits, and u's device."""
    most = 2**20
    if weight is not None and weight.dim() == 4:
        rows, columns = weight.shape[-2:]
        # the quick question first; the other does not round sizes to powers of two, as they may be symbols
        if _checks.is_known(rows * columns > most // 4) and all(
            _checks.is_known((rows > 1 << n) | (columns > most >> n)) for n in range(most.bit_length())
        ):
            return False, f"its kernels take O x D, each padded to a power of two, up to 2^20, got {rows} x {columns}"
        if _checks.is_known(weight.shape[1] * rows * columns >= 2**31):
            return False, f"its kernels take J x O x D below 2^31, got {weight.shape[1]} x {rows} x {columns}"
    return _triton.serves(u)


def _route_by_reference(u, weight, bias, logits, mask, options, return_coupling):
    return reference.routing(u, weight, bias, logits, mask, options)


def _pass_by_reference(u, weight, query, logits, mask, options, return_coupling):
    return reference.routing_pass(u, weight, query, logits, mask, options)


BACKENDS = {
    "cpu": of_ops("capsroute", _ops.cpu_library, _cpu_serves),
    "cuda": of_ops("capsroute", _cuda_here, _cuda_serves),
    "triton": of_ops(_triton.NAMESPACE, _triton.here, _triton_serves),
    "reference": Backend(
        lambda: (True, "plain PyTorch, on any device"),
        lambda u, weight: (True, "it serves every call"),
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


def check_name(name: str) -> None:
    """Raise ValueError unless it is "auto" or the name of a backend, whether or not that can run here."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        expected = ", ".join(f'"{known}"' for known in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {expected}, got {name!r}")


_logged: set[tuple[str, str]] = set()


def choose(name: str, u: Tensor, weight: Tensor | None) -> Backend:
    """The backend that serves the call: the first willing one for "auto", else the named one or an error."""
    reference_alone = "" if name == "reference" else _why_reference_alone()
    if name == "auto" and reference_alone:
        return BACKENDS["reference"]
    if name == "auto":
        refused = ""
        for candidate, backend in BACKENDS.items():
            can, why = backend.serves(u, weight)
            if can:
                # compiled code would be compiled anew after the first message, and a log call would break the graph
                if not torch.compiler.is_compiling() and (candidate, refused) not in _logged:
                    _logged.add((candidate, refused))
                    log.info(f"backend {candidate}: {why}{refused}")
                return backend
            refused += f"; not {candidate}: {why}"
    check_name(name)
    can, why = (False, reference_alone) if reference_alone else BACKENDS[name].serves(u, weight)
    if not can:
        raise RuntimeError(f'backend="{name}" cannot serve this call: {why}')
    return BACKENDS[name]


def _why_reference_alone() -> str:
    """Why no other backend can serve any call for now, or nothing."""
    if _autograd.in_forward_mode():
        return "it has no forward-mode derivatives (jvp)"
    if (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export():
        return "ONNX does not have its operators"
    return ""
