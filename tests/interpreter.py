"""Triton's interpreter, made fast enough for a test suite.

It replaces the functions of `triton.language` at every call of a jitted function, nested ones included, which takes
longer than what they compute. Where only the interpreter runs, once is enough.
"""

from __future__ import annotations

import inspect
import types


def patch_once() -> None:
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
