"""Triton's interpreter, made fast enough for a test suite.

It replaces the functions of `triton.language` at every call of a jitted function, nested ones included, which takes
longer than what they compute. Where only the interpreter runs, once is enough.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Iterator


def patch() -> None:
    """Once for the process."""
    patch_language_once()
    round_to_nearest()


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
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return original(data, source, target, rounding)

    interpreter._convert_float = convert


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Collect the bytes of every load and store, of the lanes that take part."""
    from triton.runtime.interpreter import interpreter_builder as builder

    moved: list[int] = []
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers, mask):
        moved.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(pointers, mask, *rest):
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield moved
    finally:
        del builder.create_masked_load, builder.create_masked_store
