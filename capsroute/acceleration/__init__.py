"""Fused routing inside models that were written for other capsule layers."""

from . import known
from .recipes import Recipe, register
from .swap import Entry, Report, accelerate, restore

__all__ = ["Entry", "Recipe", "Report", "accelerate", "register", "restore"]

for _recipe in known.RECIPES:
    register(_recipe)
