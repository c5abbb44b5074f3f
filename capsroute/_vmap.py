"""vmap of the ops of a set: one larger batch where samples stay apart, else a loop."""

from __future__ import annotations

import torch
from torch import Tensor

# Which dimension is the batch, of what the ops take and return, named as in schemas.txt.
_BATCH = {
    **dict.fromkeys(("u", "grad_v", "grad_s", "query", "logits", "mask", "v", "last_logits", "coupling"), 0),
    "s": -3,
    "norm": -2,
}


def rule(op):
    """What torch.library.register_vmap takes for an op."""
    schema = op.default._schema
    names, returned = [x.name for x in schema.arguments], [x.name for x in schema.returns]

    def run(info, in_dims, *values):
        arguments, dims = dict(zip(names, values, strict=True)), dict(zip(names, in_dims, strict=True))
        size = _size(arguments["u"], dims["u"])
        if _stay_apart(arguments, dims, size):
            return _as_one_batch(op, info.batch_size, size, arguments, dims, returned)
        return _loop(op, info.batch_size, arguments, dims)

    return run


def _size(x, dim) -> int:
    """Of the batch, where `dim` is mapped over."""
    return x.shape[1 if dim == 0 else 0]


def _stay_apart(arguments, dims, size) -> bool:
    """Whether many batches may become one: no weight or bias is mapped over, no gradient sums several samples."""
    if any(dim is not None and name not in _BATCH for name, dim in dims.items()):
        return False
    if _has_sums(arguments) and size != 1:
        return False
    if arguments.get("need_logits") and _size(arguments["logits"], dims["logits"]) != size:
        return False
    # a u that all share is copied for each, unless it is one sample: only where its gradient takes as much anyway
    return dims["u"] is not None or size == 1 or bool(arguments.get("need_u"))


def _has_sums(arguments) -> bool:
    """Whether gradients that are sums over the batch are wanted."""
    wanted = arguments.get("need_weight") or arguments.get("need_bias")
    return bool(wanted) and not arguments["per_sample"]


def _as_one_batch(op, count, size, arguments, dims, returned):
    """The batches are joined to one, and the results cut apart.

    Gradients that are sums over a batch are wanted of batches of one sample alone: so they are those of each sample.
    """
    merged = {name: _merged(name, x, dims[name], count, size) for name, x in arguments.items()}
    has_sums = _has_sums(arguments)
    if has_sums:
        merged["per_sample"] = True
    outputs, out_dims = [], []
    for name, x in zip(returned, op(*merged.values()), strict=True):
        there = x.dim() > 1
        at = _BATCH.get(name, 0) % x.dim()
        is_sum = has_sums and name in ("weight", "bias")
        outputs.append(x.unflatten(at, (count, size)) if there and not is_sum else x)
        out_dims.append(at if there else None)
    return tuple(outputs), tuple(out_dims)


def _merged(name, x, dim, count, size):
    """An argument of `count` batches, mapped over or the same for all, as that of one."""
    if name == "votes":
        return x.new_empty(0)  # those of a few samples, in an order of their own: made anew
    if not isinstance(x, Tensor) or name not in _BATCH or (dim is None and x.dim() == 1):
        return x
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    at = 1 + _BATCH[name] % (x.dim() - 1)
    if dim is None and x.shape[at] != size:
        return x[0]  # the same for every sample
    shape = list(x.shape)
    shape[0], shape[at] = count, size
    return _saved(name, x.expand(shape).movedim(0, at - 1).flatten(at - 1, at))


def _saved(name, x):
    """What the forward saved lies in memory as it saved it: the backward reads it so."""
    return x.contiguous() if name in ("s", "norm") else x


def _loop(op, count, arguments, dims):
    calls = zip(*(_of_each(name, x, dims[name], max(count, 1)) for name, x in arguments.items()), strict=True)
    outputs = [op(*call) for call in calls]
    # what was not asked for is empty, and the same for all
    there = [x.dim() > 1 or x.shape[0] > 0 for x in outputs[0]]
    parts = zip(there, zip(*outputs, strict=True), strict=True)
    return tuple(stack(x)[:count] if y else x[0] for y, x in parts), tuple(0 if y else None for y in there)


def _of_each(name, x, dim, count):
    """x of each call. An empty dimension gives one of zeros, a sum, which is in the graph, for the results' shapes."""
    if dim is None:
        return [x] * count
    if x.shape[dim] == 0:
        return [x.sum(dim, dtype=x.dtype)]
    return [_saved(name, one) for one in _unstack(x.movedim(dim, 0))]


# torch.stack and Tensor.unbind in the tensors' own order of memory, so that dW lies as the weight does, and their
# gradients, each being that of the other. Slices in place of unbind would each have a gradient as large as x.


def stack(parts) -> Tensor:
    order = _order(parts[0])
    stacked = torch.stack([x.permute(order) for x in parts])
    return stacked.permute(0, *(1 + order.index(d) for d in range(len(order))))


def _unstack(x: Tensor) -> list[Tensor]:
    order = _order(x[0])
    parts = x.permute(0, *(1 + d for d in order)).unbind()
    return [part.permute([order.index(d) for d in range(len(order))]) for part in parts]


def _order(x: Tensor) -> list[int]:
    """The dimensions, that of the largest stride first."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)
