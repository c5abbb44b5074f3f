"""What a forward reads and sets of its layer, beside parameters, buffers and modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def watched(layer: nn.Module, names: set[str]) -> nn.Module:
    """The layer, which from now on adds the names of what is read of it."""

    def read(self, name):
        names.add(name)
        return super(made, self).__getattribute__(name)

    made = type(type(layer).__name__, (type(layer),), {"__getattribute__": read})
    layer.__class__ = made
    return layer


def state(layer: nn.Module) -> dict[str, tuple[Any, int]]:
    """Its own attributes, and how often those that are tensors were written to."""
    of_every_module = vars(nn.Module())
    return {
        name: (x, x._version if isinstance(x, Tensor) and not x.is_inference() else 0)
        for name, x in vars(layer).items()
        if name not in of_every_module
    }


def changed(before: dict[str, tuple[Any, int]], after: dict[str, tuple[Any, int]]) -> list[str]:
    """The names of what was made, set, written to or deleted."""

    def stays(name):
        return name in before and name in after and all(x is y for x, y in zip(before[name], after[name], strict=True))

    return sorted(name for name in before.keys() | after.keys() if not stays(name))


def fixed(layer: nn.Module, names: set[str]) -> tuple[str | None, dict[str, Any]]:
    """Copies of attributes that must stay as they are, or the name of one of which a change would not be seen.

    Those of the class count, and not where tensors are to be made, which changes as the layer is moved.
    """
    values = _of_class(type(layer), names) | {name: x for name, (x, _) in state(layer).items() if name in names}
    values = {name: x for name, x in values.items() if name != "device" and not isinstance(x, torch.device)}
    parts = *layer.named_children(), *layer.named_buffers(recurse=False)
    unseen = [name for name, _ in parts if name in names]
    unseen += [name for name, x in values.items() if isinstance(x, Tensor) or not _compares(x)]
    return (unseen[0], {}) if unseen else (None, copy.deepcopy(values))


def _of_class(layer: type[nn.Module], names: set[str]) -> dict[str, Any]:
    """What the class has of these names that is neither a method or property nor of every module."""
    own = {name: getattr(layer, name) for name in names if hasattr(layer, name) and not hasattr(nn.Module, name)}
    return {name: x for name, x in own.items() if not callable(x) and not hasattr(x, "__get__")}


def _compares(x: object) -> bool:
    """Whether == says that a copy, which a copied layer has, is the same."""
    try:
        return (x == copy.deepcopy(x)) is True
    except Exception:  # of a foreign class
        return False
