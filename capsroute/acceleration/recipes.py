"""How a foreign capsule layer is computed with our operators, by its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Recipe(NamedTuple):
    """A foreign layer's forward, written with capsroute's operators.

    Attributes:
        layer: the class; or its full name ``"package.module.Class"``, which is not imported; or a bare name
            ``"Class"``, for snippets that people copy into files of their own.
        forward: takes what the layer's own forward takes, the layer itself first, and returns what it returns.
        probe: from the layer, a tuple of random arguments of its forward, floating-point ones in its dtype and device.
        refuses: from the layer, why it cannot be swapped, or None.
        batched: the first dimension of every argument is the batch, of which one sample is then probed alone, too.
    """

    layer: type[nn.Module] | str
    forward: Callable[..., Any]
    probe: Callable[[nn.Module], tuple]
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    batched: bool = False


_recipes: list[Recipe] = []


def register(recipe: Recipe) -> None:
    """Make :func:`capsroute.accelerate` know a layer; the last recipe registered for a class is used.

    Args:
        recipe: the layer, and what computes the same by the operators.

    Raises:
        TypeError: if ``recipe`` is not a :class:`Recipe` of functions, for a module class or its name.
    """
    layer = recipe.layer if isinstance(recipe, Recipe) else None
    if not (isinstance(layer, str) or (isinstance(layer, type) and issubclass(layer, nn.Module))):
        raise TypeError(f"recipe must be a Recipe for a subclass of torch.nn.Module or its name, got {recipe!r}")
    for name in ("forward", "probe", "refuses"):
        if not callable(function := getattr(recipe, name)):
            raise TypeError(f"recipe.{name} must be a function, got {function!r}")
    _recipes.append(recipe)


def find(layer: type[nn.Module]) -> Recipe | None:
    """The recipe for exactly this class; a subclass may have changed what its parent computes."""
    if layer.__module__.partition(".")[0] == "capsroute":  # capsroute.nn.classic has a CapsuleLayer too
        return None
    names = (layer, f"{layer.__module__}.{layer.__qualname__}", layer.__name__)
    return next((recipe for recipe in reversed(_recipes) if recipe.layer in names), None)
