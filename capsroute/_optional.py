"""Libraries that only some commands need: import them where they are used, or say which extra installs them."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional(module: str, extra: str = "demo") -> ModuleType:
    """The module, imported, which an extra of the package installs.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(
            f"{library} is needed here: in a clone of capsroute run pip install '.[{extra}]' ({error})"
        ) from error
