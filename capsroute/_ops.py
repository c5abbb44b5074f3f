"""The private dispatcher ops, and the library that holds the C++ kernels.

An op set is a namespace of torch.ops with four ops: `route`, the whole operator; `routing_pass`, one pass of
it; and the backward of each. schemas.txt has their schemas, here are their shapes (fake kernels) and their rules for
vmap; _autograd.py has their derivatives.
A backend implements a set: the C++ libraries implement `capsroute`, each for its device.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from . import _autograd
from .reference import accumulation_dtype, out_capsules

# Of the ops of a set, by name; schemas.txt says what their tensors are.
SCHEMAS = {
    schema.partition("(")[0]: " ".join(schema.split())
    for schema in re.findall(r"^\w.*(?:\n +.*)*", Path(__file__).with_name("schemas.txt").read_text(), re.MULTILINE)
}


def define(namespace: str) -> None:
    """Define an op set, if its library does not; whoever calls this also implements it."""
    for name, schema in SCHEMAS.items():
        if not hasattr(getattr(torch.ops, namespace), name):
            torch.library.define(f"{namespace}::{name}", schema.removeprefix(name))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name])
        torch.library.register_vmap(f"{namespace}::{name}", _one_by_one(getattr(getattr(torch.ops, namespace), name)))
    _autograd.register(namespace)


def _fake_route(u, weight, bias, logits, mask, iterations, over_inputs, leaky, eps, save, room, return_coupling):
    v = (u.shape[0], out_capsules(u, weight, bias, logits), u.shape[3] if weight is None else weight.shape[-2])
    norm, coupling = _fake_extras(u, save, v[1], save and over_inputs, return_coupling)
    s = u.new_empty((save, *v) if save else (0,), dtype=accumulation_dtype(u.dtype))
    last_logits = s.new_empty((*u.shape[:2], v[1]) if 0 < save < iterations else (0,))
    return u.new_empty(v), s, norm, last_logits, s.new_empty(room), coupling


def _fake_routing_pass(u, weight, query, logits, mask, over_inputs, leaky, save, return_coupling):
    s = (u.shape[0], out_capsules(u, weight, query, logits), u.shape[3] if weight is None else weight.shape[-2])
    norm, coupling = _fake_extras(u, 1, s[1], save and over_inputs, return_coupling)
    return u.new_empty(s, dtype=accumulation_dtype(u.dtype)), norm, coupling


def _fake_extras(u, saved, outputs, has_norm, has_coupling):
    norm = u.new_empty((2, saved, u.shape[0], outputs) if has_norm else (0,), dtype=accumulation_dtype(u.dtype))
    return norm, u.new_empty((*u.shape[:2], outputs) if has_coupling else (0,))


def _fake_route_backward(grad_v, s, norm, votes, *arguments):
    return _fake_backward(grad_v, s, norm, *arguments)


def _fake_backward(grad, s, norm, u, weight, third, logits, mask, *options):
    tensors, needs = (u, weight, third, logits), options[-4:]
    grads = [x.new_empty(x.shape) if need else u.new_empty(0) for x, need in zip(tensors, needs, strict=True)]
    if needs[1] and weight.dim() == 4:
        grads[1] = torch.empty_like(weight)
    return tuple(grads)


_FAKES = {
    "route": _fake_route,
    "route_backward": _fake_route_backward,
    "routing_pass": _fake_routing_pass,
    "routing_pass_backward": _fake_backward,
}


def _one_by_one(op):
    """vmap as a loop: what is mapped over may be the weight, or a gradient that sums over the batch."""

    def rule(info, in_dims, *args):
        def at(k):
            return [x if dim is None else _select(x, dim, k) for x, dim in zip(args, in_dims, strict=True)]

        outputs = [op(*at(k)) for k in range(max(1, info.batch_size))]
        stacked = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _select(x, dim, k):
    """x[k] along a dimension; of an empty one zeros, from which the shapes of the results follow."""
    return x.select(dim, k) if x.shape[dim] else x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :])


LIBRARY = Path(__file__).with_name("libcapsroute.so")
CUDA_LIBRARY = Path(__file__).with_name("libcapsroute_cuda.so")


def _load(library: Path, how: str) -> tuple[bool, str]:
    if not library.exists():
        return False, f"{how}, and without CAPSROUTE_NO_EXT=1"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return False, f"the C++ kernels could not be loaded: {error}"
    return True, "C++ kernels"


def _load_cpu() -> tuple[bool, str]:
    how = "the C++ kernels were not built: install capsroute where g++ and torch are present"
    can, why = _load(LIBRARY, how)
    return can, f"{why} for {torch.ops.capsroute.cpu_capability()}" if can else why


def _load_cuda() -> tuple[bool, str]:
    if torch.version.cuda is None:
        return False, "this build of torch has no CUDA"
    how = "the CUDA kernels were not built: install capsroute where nvcc and a CUDA build of torch are present"
    can, why = _load(CUDA_LIBRARY, how)
    return can, f"{why} for CUDA" if can else why


_loaded = _load_cpu()
define("capsroute")
_cuda_loaded = _load_cuda()


def cpu_library() -> tuple[bool, str]:
    """Whether the library of CPU kernels is loaded, and for which instruction set, or why not."""
    return _loaded


def cuda_library() -> tuple[bool, str]:
    """Whether the library of CUDA kernels is loaded, or why not. Whether there is a device is another question."""
    return _cuda_loaded
