"""The private dispatcher ops, and the library that holds their kernels.

`capsroute::route` is the whole operator for coupling="out": with a weight, capsule_linear; without,
dynamic_routing of the votes given as `u`. `capsroute::route_backward` is its backward. Here are their
schemas, their shapes (fake kernels) and their rule for vmap; the kernels are in csrc.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .reference import accumulation_dtype, out_capsules

# u [B, I, D] or votes [B, I, J, O]; weight [I, J, O, D], [J, O, D] or [O, D]; bias [J, O];
# logits [B|1, I|1, J]; mask [B|1, I|1]
_PROBLEM = "Tensor u, Tensor? weight, Tensor? bias, Tensor? logits, Tensor? mask, int iterations, bool leaky, float eps"
# v [B, J, O]; s [R, B, J, O] before squash, empty unless save; coupling [B, I, J], empty unless asked for
torch.library.define(
    "capsroute::route", f"({_PROBLEM}, bool save, bool return_coupling) -> (Tensor v, Tensor s, Tensor coupling)"
)
# Gradients in the tensors' own shapes, but [I, D, J, O] for a weight [I, J, O, D]; empty where not needed.
torch.library.define(
    "capsroute::route_backward",
    f"(Tensor grad_v, Tensor s, {_PROBLEM}, bool detach_coupling, bool need_u, bool need_weight, bool need_bias, "
    "bool need_logits) -> (Tensor u, Tensor weight, Tensor bias, Tensor logits)",
)
torch.library.define("capsroute::cpu_capability", "() -> str")
ops = torch.ops.capsroute

LIBRARY = Path(__file__).with_name("libcapsroute.so")


def _load() -> tuple[bool, str]:
    if not LIBRARY.exists():
        return False, (
            "the C++ kernels were not built: install capsroute where g++ and torch are present, "
            "and without CAPSROUTE_NO_EXT=1"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return False, f"the C++ kernels could not be loaded: {error}"
    return True, f"C++ kernels for {ops.cpu_capability()}"


_loaded = _load()


def cpu_library() -> tuple[bool, str]:
    """Whether the library of CPU kernels is loaded, and for which instruction set, or why not."""
    return _loaded


@torch.library.register_fake("capsroute::route")
def _(u, weight, bias, logits, mask, iterations, leaky, eps, save, return_coupling):
    outputs = out_capsules(u, weight, bias, logits)
    v = (*u.shape[:1], outputs, u.shape[3] if weight is None else weight.shape[-2])
    s = u.new_empty((iterations, *v) if save else (0,), dtype=accumulation_dtype(u.dtype))
    coupling = u.new_empty((*u.shape[:2], outputs) if return_coupling else (0,))
    return u.new_empty(v), s, coupling


@torch.library.register_fake("capsroute::route_backward")
def _(grad_v, s, u, weight, bias, logits, mask, iterations, leaky, eps, detach_coupling, *needs):
    tensors = u, weight, bias, logits
    shapes = [() if x is None else x.shape for x in tensors]
    if weight is not None and weight.dim() == 4:
        inputs, outputs, out_features, in_features = weight.shape
        shapes[1] = (inputs, in_features, outputs, out_features)
    return tuple(
        x.new_empty(shape) if need else u.new_empty(0) for x, shape, need in zip(tensors, shapes, needs, strict=True)
    )


def _one_by_one(op):
    """vmap as a loop: what is mapped over may be the weight, or a gradient that sums over the batch."""

    def rule(info, in_dims, *args):
        def at(k):
            return [x if dim is None else x.select(dim, k) for x, dim in zip(args, in_dims, strict=True)]

        outputs = [op(*at(k)) for k in range(info.batch_size)]
        stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


torch.library.register_vmap("capsroute::route", _one_by_one(ops.route))
torch.library.register_vmap("capsroute::route_backward", _one_by_one(ops.route_backward))
