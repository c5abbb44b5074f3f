"""The private dispatcher ops, and the library that holds the C++ kernels.

An op set is a namespace of torch.ops with four ops: `route`, the whole operator; `routing_pass`, one pass of
it; and the backward of each. Here are their schemas, their shapes (fake kernels) and their rules for vmap;
_autograd.py has their derivatives.
A backend implements a set: the C++ libraries implement `capsroute`, each for its device.
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import _autograd
from .reference import accumulation_dtype, out_capsules

# u [B, I, D] or votes [B, I, J, O]; weight [I, J, O, D], [J, O, D] or [O, D]; bias [J, O]; query [B, J, O] in
# the accumulation dtype; logits [B|1, I|1, J]; mask [B|1, I|1]; over_inputs: the softmax runs over i, not j
_ROUTE = (
    "Tensor u, Tensor? weight, Tensor? bias, Tensor? logits, Tensor? mask, "
    "int iterations, bool over_inputs, bool leaky, float eps"
)
_PASS = "Tensor u, Tensor? weight, Tensor? query, Tensor? logits, Tensor? mask, bool over_inputs, bool leaky"
_SCHEMAS = {
    # v [B, J, O]; of the last `save` passes s [save, B, J, O] before squash, in the accumulation dtype, and, over
    # inputs, norm [2, save, B, J], the largest logit over i and the sum of exp(logit - largest); last_logits
    # [B, I, J] of the last pass, where some but not all passes are saved; votes [room], where the CPU kernels leave
    # those of up to 4 samples to the backward, in their own order; the coupling [B, I, J] of the last pass, if asked
    # for. What is not there is empty.
    "route": f"({_ROUTE}, int save, int room, bool return_coupling) "
    "-> (Tensor v, Tensor s, Tensor norm, Tensor last_logits, Tensor votes, Tensor coupling)",
    # s and norm of all passes; votes of the same tensors, or empty. Gradients in the tensors' own shapes, empty where
    # not needed; that of a weight [I, J, O, D] has the strides of torch.empty_like(weight). With a constant coupling it
    # is that of one pass from last_logits.
    "route_backward": f"(Tensor grad_v, Tensor s, Tensor norm, Tensor votes, {_ROUTE}, bool need_u, bool need_weight, "
    "bool need_bias, bool need_logits) -> (Tensor u, Tensor weight, Tensor bias, Tensor logits)",
    # s [B, J, O] in the accumulation dtype; norm [2, 1, B, J], coupling as above
    "routing_pass": f"({_PASS}, bool save, bool return_coupling) -> (Tensor s, Tensor norm, Tensor coupling)",
    # the numbers of s matter over inputs alone
    "routing_pass_backward": f"(Tensor grad_s, Tensor s, Tensor norm, {_PASS}, bool need_u, bool need_weight, "
    "bool need_query, bool need_logits) -> (Tensor u, Tensor weight, Tensor query, Tensor logits)",
}


def define(namespace: str) -> None:
    """Define an op set; whoever calls this also implements it."""
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"{namespace}::{name}", schema)
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


define("capsroute")
torch.library.define("capsroute::cpu_capability", "() -> str")
# of the CPU kernels, for people to read
torch.library.define("capsroute::plan", f"({_ROUTE}, int room, bool backward) -> str")

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


_loaded, _cuda_loaded = _load_cpu(), _load_cuda()


def cpu_library() -> tuple[bool, str]:
    """Whether the library of CPU kernels is loaded, and for which instruction set, or why not."""
    return _loaded


def cuda_library() -> tuple[bool, str]:
    """Whether the library of CUDA kernels is loaded, or why not. Whether there is a device is another question."""
    return _cuda_loaded
