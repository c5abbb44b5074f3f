"""Triton's interpreter, made fast enough for a test suite.

It replaces the functions of `triton.language` at every call of a jitted function, nested ones included, which takes
longer than what they compute. Where only the interpreter runs, once is enough.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable

import numpy as np
import torch


def patch() -> None:
    """Once for the process."""
    patch_language_once()
    round_to_nearest()
    watch_memory()


def patch_language_once() -> None:
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()
    nothing = types.SimpleNamespace(restore=lambda: None)

    def patch_lang(function):
        names = {
            module.__name__
            for module in function.__globals__.values()
            if inspect.ismodule(module) and module.__name__.startswith("triton.language")
        }
        if not names <= done:
            original(function)
            done.update(names)
        return nothing

    interpreter._patch_lang = patch_lang


def round_to_nearest() -> None:
    """float32 to bfloat16 as a GPU does it; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return original(data, source, target, rounding)

    interpreter._convert_float = convert


class Watch:
    """Of the launch that runs: where it may read and write, and the bytes that it has moved.

    Reads and writes out of bounds are silent in the interpreter, as on a GPU.
    """

    def __init__(self):
        self.first = self.last = None  # addresses of its tensors, in order
        self.moved = 0

    def begin(self, tensors: Iterable[torch.Tensor]) -> None:
        spans = sorted((x.data_ptr(), x.data_ptr() + extent(x)) for x in tensors if x.numel())
        self.first, self.last = np.array(spans, dtype=np.uint64).reshape(-1, 2).T
        self.moved = 0

    def access(self, pointers, mask) -> None:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.moved += int(lanes.sum()) * size
        addresses = pointers.data[lanes]
        if addresses.size:
            assert self.first.size, "a kernel reads or writes, and has no tensors"
            place = np.searchsorted(self.first, addresses, side="right") - 1
            inside = (place >= 0) & (addresses + np.uint64(size) <= self.last[place])
            assert inside.all(), "a kernel reads or writes outside of its tensors"


def extent(x: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to the end of the last."""
    return (sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.itemsize


watch = Watch()


def watch_memory() -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    from capsroute._triton.problem import Launch

    load, store, run = builder.create_masked_load, builder.create_masked_store, Launch.run

    def watched_load(pointers, mask, *rest):
        watch.access(pointers, mask)
        return load(pointers, mask, *rest)

    def watched_store(pointers, value, mask, *rest):
        watch.access(pointers, mask)
        return store(pointers, value, mask, *rest)

    def watched_run(launch):
        watch.begin(x for x in launch.args if isinstance(x, torch.Tensor))
        run(launch)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    Launch.run = watched_run
